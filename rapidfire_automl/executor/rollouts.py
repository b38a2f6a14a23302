"""Joint rollouts: the requests of many trials decoded in one batch, each as if it were alone.

Rows of all trials stand below each other, padded on the left. A trial's tokens come from its own logits processors and
its own generator, and its dropout too, drawn for all rows its own run would have; so what it samples does not depend
on its neighbours. A decode step for 32 rows costs less than two for 4, because few rows leave a machine waiting for the
weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rapidfire_automl.executor.cache import new_cache
from rapidfire_automl.executor.draws import draw
from rapidfire_automl.executor.multiplex import JointPass, Segment
from rapidfire_automl.executor.passes import Member, Multiplexer
from rapidfire_automl.executor.requests import Generate

_LEAVE_SHARE = 1 / 8
"""Rows leave when at least this share of the batch is done: leaving copies the cache."""


@dataclass(slots=True, eq=False)
class Rollout:
    """One trial's share of a joint rollout.

    Args:
        member: The trial.
        request: What it asks for.
        generator: Its draws; the trial takes it back when it is done.
        ids: `(rows, width + max_new_tokens)`, the first `length` columns filled.
        length: Prompt and tokens so far.
        alive: `(rows,)` bool, rows that are not done.
        kept: `(kept rows,)`, which rows are in the batch, or None for all.
        error: What failed it.
        seconds: Its share of the time, by rows.
    """

    member: Member
    request: Generate
    generator: torch.Generator
    ids: Tensor
    length: int
    alive: Tensor
    kept: Tensor | None = None
    error: BaseException | None = None
    seconds: float = 0.0
    live: bool = True
    _tokens: int = 0

    @classmethod
    def begin(cls, member: Member, request: Generate, device: torch.device) -> Rollout:
        """Before its first token."""
        generator = member.generator(device)
        rows, width = request.input_ids.shape
        return cls(
            member,
            request,
            generator,
            ids=F.pad(request.input_ids, (0, request.max_new_tokens)),
            length=width,
            alive=torch.ones(rows, dtype=torch.bool, device=device),
        )

    @property
    def present(self) -> int:
        """Its rows in the batch."""
        return self.request.rows if self.kept is None else len(self.kept)

    @property
    def answer(self) -> Tensor:
        """`(rows, width + new)`: prompts and continuations."""
        return self.ids[:, : self.length].clone()

    @property
    def tokens(self) -> int:
        """Tokens generated, padding not counted."""
        return self._tokens

    def choose(self, logits: Tensor, probabilities: Tensor | None) -> Tensor:
        """Its next tokens, `(kept rows,)`, from `(kept rows, vocabulary)` logits, or from probabilities if known."""
        request = self.request
        if probabilities is None:
            if self.kept is not None:  # processors may know their rows by number
                everybody = logits.new_zeros(request.rows, logits.shape[-1])
                everybody[self.kept] = logits
                logits = everybody
            scores: Tensor = request.process(self.ids[:, : self.length], logits)
            scores = scores if self.kept is None else scores[self.kept]
            if not request.sample:
                return scores.argmax(-1)
            probabilities = F.softmax(scores, dim=-1)
        return draw(probabilities, self.generator, request.rows, self.kept)

    def take(self, chosen: Tensor) -> Tensor:
        """Append a token to each row; returns what the kept rows go on with, `(kept rows,)`."""
        request = self.request
        if self.kept is not None:
            everybody = self.ids.new_zeros(request.rows)
            everybody[self.kept] = chosen
            chosen = everybody
        self._tokens += int(self.alive.sum())
        if request.pad is not None:
            chosen = torch.where(self.alive, chosen, request.pad)
        self.ids[:, self.length] = chosen
        self.length += 1
        self.alive &= ~request.stop(self.ids[:, : self.length], None)
        self.live = bool(self.alive.any()) and self.length < self.ids.shape[1]
        return chosen if self.kept is None else chosen[self.kept]


@dataclass(slots=True)
class Counts:
    """Seconds and counts of rollouts, for `explain` and the rollouts experiment."""

    prefill_s: float = 0.0
    decode_s: float = 0.0
    choose_s: float = 0.0
    steps: int = 0
    row_steps: int = 0
    tokens: int = 0


class Decoding:
    """A joint rollout that is under way.

    Args:
        multiplexer: The shared base.
        requests: Trials and what they ask for, in trial order, of one kind.
        counts: Added to.

    Raises:
        torch.OutOfMemoryError: It didn't fit; a trial's generator is as before until its rollout is done.
    """

    def __init__(
        self, multiplexer: Multiplexer, requests: Sequence[tuple[Member, Generate]], counts: Counts | None = None
    ) -> None:
        self._multiplexer = multiplexer
        self._device = multiplexer.device
        self.autocast = requests[0][1].autocast
        self.counts = Counts() if counts is None else counts
        self.rollouts = [Rollout.begin(member, request, self._device) for member, request in requests]
        self._mask: Tensor | None = None
        self._next = torch.empty(0)
        self._cache = new_cache(multiplexer.model.config.get_text_config(decoder=True))
        begin = time.perf_counter()
        with torch.no_grad():
            self._logits = self._prefill()
        self._account(time.perf_counter() - begin, "prefill_s")

    @property
    def logits(self) -> Tensor:
        """What the next tokens are chosen from, `(rows, vocabulary)` float32."""
        return self._logits

    @property
    def rows(self) -> int:
        """Rows in the batch."""
        return sum(rollout.present for rollout in self.rollouts)

    @torch.no_grad()
    def advance(self) -> list[Rollout]:
        """Give every row a token.

        Returns:
            The rollouts that are done, or failed, with it; their trials have their generators back.
        """
        begin = time.perf_counter()
        chosen = self._choose()
        self.counts.choose_s += time.perf_counter() - begin
        done = [rollout for rollout in self.rollouts if not rollout.live]
        for rollout in done:
            rollout.member.put_generator(rollout.generator)
        self._account(time.perf_counter() - begin)
        begin = time.perf_counter()
        tokens = self._drop_done(torch.cat(chosen))
        if self.rollouts:
            self._logits = self._decode(tokens)
            self._account(time.perf_counter() - begin, "decode_s")
            self.counts.steps += 1
            self.counts.row_steps += len(tokens)
        return done

    @torch.no_grad()
    def drop(self, members: Collection[Member]) -> None:
        """Have trials leave with what they have; the others' next tokens are as if they had stayed."""
        start, keep = 0, []
        for rollout in self.rollouts:
            rows = range(start, start := start + rollout.present)
            if any(rollout.member is member for member in members):
                rollout.member.put_generator(rollout.generator)
            else:
                keep += list(rows)
        self.rollouts = [r for r in self.rollouts if not any(r.member is member for member in members)]
        if not self.rollouts:
            return
        index = torch.tensor(keep, device=self._device)
        self._keep_rows(index)
        self._logits, self._next = self._logits[index], self._next[index]
        if self._mask is not None:
            self._mask = self._mask[index]
        self._joint = self._stack()

    def _choose(self) -> list[Tensor]:
        """Every rollout's next tokens; one that fails keeps its error and is done."""
        plain = [r.request.temperature is not None and r.request.sample for r in self.rollouts]
        probabilities: Tensor | None = None
        if any(plain):
            known = {r.request.temperature for r in self.rollouts}
            scaled = self._logits
            if known != {1.0}:
                temperatures = [[r.request.temperature or 1.0] for r in self.rollouts for _ in range(r.present)]
                scaled = scaled / torch.tensor(temperatures, device=self._device)
            probabilities = F.softmax(scaled, dim=-1)
        chosen, start = [], 0
        for rollout, is_plain in zip(self.rollouts, plain, strict=True):
            rows = slice(start, start := start + rollout.present)
            try:
                tokens = rollout.choose(
                    self._logits[rows], probabilities[rows] if is_plain and probabilities is not None else None
                )
                chosen.append(rollout.take(tokens))
            except Exception as error:
                rollout.error, rollout.live = error, False
                chosen.append(torch.zeros(rollout.present, dtype=torch.long, device=self._device))
        return chosen

    # -- the batch ---------------------------------------------------------------------------------------------------

    def _prefill(self) -> Tensor:
        """Run the prompts; returns float32 logits of the last positions, `(rows, vocabulary)`."""
        requests = [rollout.request for rollout in self.rollouts]
        width = max(request.input_ids.shape[1] for request in requests)
        ids = torch.cat([F.pad(r.input_ids, (width - r.input_ids.shape[1], 0)) for r in requests])
        masks = (torch.ones_like(r.input_ids) if r.attention_mask is None else r.attention_mask for r in requests)
        mask = torch.cat([F.pad(own, (width - own.shape[1], 0)) for own in masks])
        whole = bool(mask.all())
        positions = (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 1)
        first, place, counts = self._distinct(ids, mask)
        self._mask = None if whole else mask[first]
        self._joint = self._stack(counts)
        logits = self._forward(ids[first], positions[first])
        if len(first) < len(ids):
            logits = logits[place]
            self._keep_rows(place)
        self._mask = None if whole else mask
        self._next = positions[:, -1:] + 1
        self._joint = self._stack()
        return logits

    def _distinct(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, list[int]]:
        """Each trial's distinct prompts: a prompt is run once for all of its rows, unless dropout tells them apart.

        Returns:
            `(distinct,)`, the first row of each; `(rows,)`, which of them each row is; how many a trial has.
        """
        first: list[int] = []
        place: list[int] = []
        counts = []
        shown = torch.where(mask.bool(), ids, -1).tolist()
        start = 0
        for rollout, segment in zip(self.rollouts, self._segments(), strict=True):
            hot = any(segment.dropout(key) for key in segment.sites)
            known: dict[Any, int] = {}
            before = len(first)
            for row in range(start, start + rollout.request.rows):
                key = row if hot else tuple(shown[row])
                if key not in known:
                    known[key] = len(first)
                    first.append(row)
                place.append(known[key])
            counts.append(len(first) - before)
            start += rollout.request.rows
        return torch.tensor(first, device=self._device), torch.tensor(place, device=self._device), counts

    def _decode(self, tokens: Tensor) -> Tensor:
        if self._mask is not None:
            self._mask = F.pad(self._mask, (0, 1), value=1)
        positions, self._next = self._next, self._next + 1
        return self._forward(tokens[:, None], positions)

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        with self._multiplexer.running(self._joint, self.autocast):
            logits: Tensor = self._multiplexer.model(
                input_ids=ids,
                attention_mask=self._mask,
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits
        return logits[:, -1].float()

    def _stack(self, prompts: Sequence[int] = ()) -> JointPass:
        """The adapters of the rows in the batch, or of a prefill of so many prompts a trial."""
        segments = self._segments(prompts)
        lane = math.gcd(*(segment.rows for segment in segments))
        return self._multiplexer.joint(segments, self.autocast, lane=0 if lane == 1 else lane)

    def _segments(self, prompts: Sequence[int] = ()) -> list[Segment]:
        segments, start = [], 0
        for i, rollout in enumerate(self.rollouts):
            on = rollout.request.adapter
            rows = prompts[i] if prompts else rollout.present
            segments.append(
                Segment(
                    start=start,
                    stop=start + rows,
                    width=rollout.request.input_ids.shape[1] if prompts else 1,
                    row=rollout.member.row if on else self._multiplexer.bank.zero_row,
                    sites=rollout.member.sites if on else {},
                    generator=rollout.generator,
                    drawn=rollout.request.rows,
                    kept=rollout.kept,
                    left=True,
                )
            )
            start += rows
        return segments

    def _keep_rows(self, index: Tensor) -> None:
        for layer in self._cache.layers:
            layer.batch_select_indices(index)

    def _drop_done(self, tokens: Tensor) -> Tensor:
        """Have rows leave if enough are done; returns what the others go on with."""
        lane = self._joint.lane or 1
        keep, start, dropped = [], 0, 0
        for rollout in self.rollouts:
            kept = torch.arange(rollout.request.rows, device=self._device) if rollout.kept is None else rollout.kept
            stay = torch.nonzero(rollout.alive[kept])[:, 0] if rollout.live else kept[:0]
            if 0 < len(stay) < len(kept):  # whole lanes stay, filled up with rows that are done
                idle = torch.nonzero(~rollout.alive[kept])[:, 0]
                stay = torch.cat([stay, idle[: -len(stay) % lane]]).sort().values
            keep.append((rollout, kept, stay, start))
            start += len(kept)
            dropped += len(kept) - len(stay)
        someone_left = any(not rollout.live for rollout in self.rollouts)
        if not dropped or (dropped < _LEAVE_SHARE * start and not someone_left):
            return tokens
        self.rollouts = [rollout for rollout, _, _, _ in keep if rollout.live]
        if not self.rollouts:
            return tokens[:0]
        for rollout, kept, stay, _ in keep:
            if len(stay) < rollout.request.rows:
                rollout.kept = kept[stay]
        index = torch.cat([stay + first for _, _, stay, first in keep])
        self._keep_rows(index)
        self._next = self._next[index]
        if self._mask is not None:
            self._mask = self._mask[index]
        self._joint = self._stack()
        return tokens[index]

    def _account(self, seconds: float, field_name: str = "") -> None:
        """Split time over the rollouts by rows."""
        if field_name:
            setattr(self.counts, field_name, getattr(self.counts, field_name) + seconds)
        total = self.rows
        for rollout in self.rollouts:
            rollout.seconds += seconds * rollout.present / total
