"""Joint passes: the requests of many trials through one multiplexed decoder and one head, forward and backward."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from rapidfire_automl import failpoints
from rapidfire_automl.executor import attention, seams
from rapidfire_automl.executor.adapters import AdapterBank, LoraSite
from rapidfire_automl.executor.head import Head, entropy_jacobian, score
from rapidfire_automl.executor.lean import make_lean
from rapidfire_automl.executor.multiplex import JointPass, MultiplexedLinear, Segment
from rapidfire_automl.executor.requests import Forward
from rapidfire_automl.plan import Plan


class Member(Protocol):
    """What a pass needs of a trial."""

    @property
    def row(self) -> int:
        """Its row in the adapter bank."""

    @property
    def sites(self) -> Mapping[str, LoraSite]:
        """Its adapter."""

    def generator(self, device: torch.device) -> torch.Generator:
        """A generator on a device, in the trial's present state."""

    def put_generator(self, generator: torch.Generator) -> None:
        """Take the generator's state back after its draws."""


@dataclass(slots=True, eq=False)
class Part:
    """One trial's share of a pass: what went in, and the leaf at which its own autograd graph ends.

    Args:
        member: The trial.
        request: Its request.
        segment: Its rows.
        state: Its generator's state before the pass, to run it again.
        leaves: The answer's tensors that ask for a gradient, by name.
        positions: `(positions,)`, flat index of each scored position in the pass's hidden states.
        jacobian: `(positions, hidden)`, see `head`.
        live: Whether a backward may still come from it.
    """

    member: Member
    request: Forward
    segment: Segment
    state: Tensor
    leaves: dict[str, Tensor] = field(default_factory=dict)
    positions: Tensor | None = None
    jacobian: Tensor | None = None
    scored_hidden: Tensor | None = None
    live: bool = True

    @property
    def rows(self) -> int:
        """Rows of the request."""
        return self.request.input_ids.shape[0]

    @property
    def width(self) -> int:
        """Tokens of a row."""
        return self.request.input_ids.shape[1]

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return self.rows * self.width


@dataclass(slots=True, eq=False)
class OpenPass:
    """A joint forward that waits for its backward."""

    joint: JointPass
    parts: list[Part]
    hidden: Tensor


@dataclass(slots=True)
class Timing:
    """Seconds and counts, for `explain` and the throughput experiment."""

    forward_s: float = 0.0
    backward_s: float = 0.0
    head_s: float = 0.0
    passes: int = 0
    trials: int = 0
    tokens: int = 0
    padded_tokens: int = 0


class Multiplexer:
    """The shared base, multiplexed.

    Args:
        base: The frozen base.
        bank: The adapters.
    """

    def __init__(self, base: PreTrainedModel, bank: AdapterBank) -> None:
        self.bank = bank
        self.timing = Timing()
        self.device = seams.device_of(base)
        self.head: Head | None = seams.shared_head(base)
        self._mux = seams.share_clone(base)
        seams.keep_head_contiguous(self._mux)
        self._decoder = seams.decoder_of(self._mux)
        self._layers = seams.checkpointing_layers(self._mux)
        self._mux.train()
        self._wrapped: set[str] = set()
        self._current: JointPass | None = None
        self._cast_head: dict[tuple[torch.dtype, float], Head] = {}
        make_lean(self._decoder)
        self.use(Plan())

    def use(self, plan: Plan) -> None:
        """Follow a plan's choice of attention."""
        attention.install(self._mux, dict(plan.short_attention))

    @property
    def model(self) -> PreTrainedModel:
        """The multiplexed causal model; to be called inside `running`."""
        return self._mux

    def wrap(self, sites: Mapping[str, LoraSite]) -> None:
        """Put multiplexed Linears where a trial's adapter needs them."""
        for key in sites.keys() - self._wrapped:
            parent, _, leaf = key.rpartition(".")
            owner = self._mux.get_submodule(parent)
            base = getattr(owner, leaf)
            assert isinstance(base, nn.Linear)
            setattr(owner, leaf, MultiplexedLinear(base, key, lambda: self._current))
            self._wrapped.add(key)

    # -- forward ---------------------------------------------------------------------------------------------------

    def forward(self, requests: Sequence[tuple[Member, Forward]]) -> tuple[list[Part], OpenPass | None]:
        """Run requests of one kind in one pass.

        Args:
            requests: Trials and what they ask for, in trial order.

        Returns:
            A part per request with its answer in `leaves`, and the open pass if a backward may follow.

        Raises:
            torch.OutOfMemoryError: The pass didn't fit; nothing has changed.
        """
        begin = time.perf_counter()
        parts = self._parts(requests)
        first = requests[0][1]
        joint = self.joint([part.segment for part in parts], first.autocast, grad=first.grad)
        try:
            checkpointing = any(request.checkpointing for _, request in requests)
            with self.running(joint, first.autocast, grad=first.grad, checkpointing=checkpointing):
                hidden: Tensor = self._decoder(
                    **self._inputs(parts, width=max(part.width for part in parts)), use_cache=False
                ).last_hidden_state
                failpoints.hit("pass.forward")
        except BaseException:
            for part in parts:
                part.segment.generator.set_state(part.state)
            raise
        for part in parts:
            part.member.put_generator(part.segment.generator)
        split = time.perf_counter()
        self._answer(parts, hidden)
        end = time.perf_counter()
        timing = self.timing
        timing.forward_s += split - begin
        timing.head_s += end - split
        timing.passes += 1
        timing.trials += len(parts)
        timing.tokens += sum(part.tokens for part in parts)
        timing.padded_tokens += hidden.shape[0] * hidden.shape[1]
        return parts, OpenPass(joint, parts, hidden) if hidden.requires_grad else None

    def _parts(self, requests: Sequence[tuple[Member, Forward]]) -> list[Part]:
        parts, row = [], 0
        for member, request in requests:
            rows, width = request.input_ids.shape
            on = request.adapter
            generator = member.generator(self.device)
            segment = Segment(
                start=row,
                stop=row + rows,
                width=width,
                row=member.row if on else self.bank.zero_row,
                sites=member.sites if on else {},
                generator=generator,
            )
            parts.append(Part(member, request, segment, state=generator.get_state()))
            row += rows
        return parts

    def joint(
        self, segments: list[Segment], autocast: torch.dtype | None, *, grad: bool = False, lane: int = 0
    ) -> JointPass:
        """What a pass over these rows has to know, its adapters stacked.

        Args:
            segments: In row order, without gaps.
            autocast: The trials' autocast dtype, or None.
            grad: Whether a backward may follow.
            lane: Rows that share an entry of the stacks; 0: an entry a segment.
        """
        entries = [segment for segment in segments for _ in range(segment.rows // lane if lane else 1)]
        rows = [segment.row for segment in entries]
        stacks: Mapping[str, tuple[Tensor, Tensor]] = {}
        scales: Mapping[str, Tensor] = {}
        if any(segment.sites for segment in segments):
            used = self.bank.sites(rows)
            selected = self.bank.select(rows, autocast)
            stacks = {key: selected[key] for key in used}
            dtype = next(iter(stacks.values()))[0].dtype
            scales = {
                key: torch.tensor(
                    [s.sites[key].scaling if key in s.sites else 0.0 for s in entries],
                    dtype=dtype,
                    device=self.device,
                ).view(-1, 1, 1)
                for key in used
            }
        anchor = torch.zeros((), device=self.device, requires_grad=grad)
        draw_dtype = self.bank.dtype or torch.float32
        return JointPass(segments, stacks, scales, anchor, self.device, draw_dtype, lane)

    @contextlib.contextmanager
    def running(
        self, joint: JointPass, autocast: torch.dtype | None, *, grad: bool = False, checkpointing: bool = False
    ) -> Iterator[None]:
        """While open, the multiplexed model's forward is this pass's."""
        self._current = joint
        self._checkpointing(checkpointing)
        try:
            with torch.set_grad_enabled(grad), self._autocast(autocast):
                yield
        finally:
            self._current = None

    def _inputs(self, parts: Sequence[Part], width: int) -> dict[str, Tensor]:
        """Rows of all parts below each other, padded on the right; a mask only where somebody needs one.

        Under a causal mask no real token sees what stands to its right, so padding on the right needs no mask.
        """

        def padded(x: Tensor) -> Tensor:
            return F.pad(x, (0, width - x.shape[1]))

        requests = [part.request for part in parts]
        inputs = {"input_ids": torch.cat([padded(r.input_ids) for r in requests])}
        if not all(r.attention_mask is None or _is_right_padded(r.attention_mask) for r in requests):
            masks = (torch.ones_like(r.input_ids) if r.attention_mask is None else r.attention_mask for r in requests)
            inputs["attention_mask"] = torch.cat([padded(mask) for mask in masks])
        if any(r.position_ids is not None for r in requests):
            line = torch.arange(width, device=self.device)[None]
            rows = []
            for r in requests:
                count, own = r.input_ids.shape
                given = line[:, :own].expand(count, -1) if r.position_ids is None else r.position_ids
                rows.append(torch.cat([given, line[:, own:].expand(count, -1)], 1))
            inputs["position_ids"] = torch.cat(rows)
        return inputs

    def _answer(self, parts: Sequence[Part], hidden: Tensor) -> None:
        """Cut each part's leaf: hidden states, or the head's fields."""
        grad = hidden.requires_grad
        scored = [part for part in parts if part.request.head is not None]
        for part in parts:
            if part.request.head is None:
                s = part.segment
                leaf = hidden[s.start : s.stop, : s.width].detach()
                part.leaves["hidden"] = leaf.requires_grad_(grad)
        if scored:
            self._score(scored, hidden, grad)

    def _score(self, parts: Sequence[Part], hidden: Tensor, grad: bool) -> None:
        width = hidden.shape[1]
        targets, inverse = [], []
        for part in parts:
            request = part.request
            assert request.head is not None
            assert request.scored is not None
            assert request.targets is not None
            row, column = request.scored.nonzero(as_tuple=True)
            part.positions = (row + part.segment.start) * width + column
            targets.append(request.targets[row, column])
            inverse.append(torch.full((len(row),), request.head.inverse_temperature, device=self.device))
        positions = torch.cat([part.positions for part in parts if part.positions is not None])
        flat = hidden.detach().reshape(-1, hidden.shape[-1])[positions]
        heads = [part.request.head for part in parts if part.request.head is not None]
        plain = all(head.inverse_temperature == 1.0 for head in heads)
        dtype = parts[0].request.autocast or flat.dtype
        result = score(
            flat,
            torch.cat(targets),
            self._head(dtype, heads[0].logit_scale),
            frozenset().union(*(head.outputs for head in heads)),
            inverse_temperature=None if plain else torch.cat(inverse),
            with_gradient=grad,
            dtype=dtype,
        )
        start = 0
        for part, head in zip(parts, heads, strict=True):
            assert part.positions is not None
            assert part.request.scored is not None
            stop = start + len(part.positions)
            for name in head.outputs:
                full = torch.zeros(
                    part.request.scored.shape, dtype=result.fields[name].dtype, device=self.device
                ).masked_scatter_(part.request.scored, result.fields[name][start:stop])
                if grad and name in ("log_probs", "entropy"):
                    full.requires_grad_(True)
                part.leaves[name] = full
            if result.jacobian is not None:
                part.jacobian = result.jacobian[start:stop]
                part.scored_hidden = flat[start:stop]
            start = stop

    def _head(self, dtype: torch.dtype, logit_scale: float) -> Head:
        """The head cast once, not once a pass."""
        assert self.head is not None
        if (dtype, logit_scale) not in self._cast_head:
            bias = None if self.head.bias is None else self.head.bias.to(dtype)
            self._cast_head[dtype, logit_scale] = Head(self.head.weight.to(dtype), bias, logit_scale)
        return self._cast_head[dtype, logit_scale]

    # -- backward --------------------------------------------------------------------------------------------------

    def backward(self, opened: OpenPass) -> None:
        """Run a pass's backward and give each live part's adapter its gradient, added to what it has.

        Raises:
            torch.OutOfMemoryError: It didn't fit; no gradient has been given out.
        """
        begin = time.perf_counter()
        joint, hidden = opened.joint, opened.hidden
        upstream = torch.zeros_like(hidden)
        for part in opened.parts:
            if part.live:
                self._upstream(part, upstream)
        joint.replaying = True
        joint.grads.clear()
        self._current = joint
        try:
            torch.autograd.backward(hidden, upstream)
            failpoints.hit("pass.backward")
        finally:
            self._current = None
        _hand_out(joint, opened.parts)
        self.timing.backward_s += time.perf_counter() - begin

    def again(self, parts: Sequence[Part]) -> None:
        """Run forward and backward of some parts of a pass once more, in a pass of their own (after out of memory)."""
        for part in parts:
            part.segment.generator.set_state(part.state)
        requests = [(_Replay(part.member, part.segment.generator), part.request) for part in parts]
        new, opened = self.forward(requests)
        for fresh, part in zip(new, parts, strict=True):
            for name, leaf in part.leaves.items():
                fresh.leaves[name].grad = leaf.grad
            fresh.live = part.live
        if opened is not None:
            self.backward(opened)

    def _upstream(self, part: Part, upstream: Tensor) -> None:
        """Write the gradient at the cut into the pass's, `(rows, tokens, hidden)`."""
        s = part.segment
        if part.request.head is None:
            grad = part.leaves["hidden"].grad
            if grad is not None:
                upstream[s.start : s.stop, : s.width] = grad
            return
        assert part.positions is not None
        assert part.jacobian is not None
        assert part.request.scored is not None
        total = None
        if (grad := part.leaves["log_probs"].grad) is not None:
            total = grad[part.request.scored][:, None].float() * part.jacobian
        entropy = part.leaves.get("entropy")
        if entropy is not None and entropy.grad is not None:
            assert part.scored_hidden is not None
            assert part.request.head is not None
            head = part.request.head
            slope = entropy_jacobian(
                part.scored_hidden,
                self._head(part.request.autocast or part.scored_hidden.dtype, head.logit_scale),
                inverse_temperature=torch.full((len(part.positions),), head.inverse_temperature, device=self.device),
                dtype=part.request.autocast or part.scored_hidden.dtype,
            )
            extra = entropy.grad[part.request.scored][:, None].float() * slope
            total = extra if total is None else total + extra
        if total is not None:
            upstream.view(-1, upstream.shape[-1])[part.positions] = total.to(upstream.dtype)

    # -- the rest --------------------------------------------------------------------------------------------------

    def _autocast(self, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
        if dtype is None:
            return torch.autocast(self.device.type, enabled=False)
        return torch.autocast(self.device.type, dtype=dtype)

    def _checkpointing(self, on: bool) -> None:
        """Recompute activations if any trial of the pass wants that: it costs time and changes no number."""
        for layer in self._layers:
            layer.gradient_checkpointing = on


@dataclass(slots=True)
class _Replay:
    """A member whose generator must not move: its pass is being run a second time."""

    member: Member
    _generator: torch.Generator

    @property
    def row(self) -> int:
        return self.member.row

    @property
    def sites(self) -> Mapping[str, LoraSite]:
        return self.member.sites

    def generator(self, device: torch.device) -> torch.Generator:
        """The one of the first run."""
        return self._generator

    def put_generator(self, generator: torch.Generator) -> None:
        """The draws were counted the first time."""


def _is_right_padded(mask: Tensor) -> bool:
    return bool((mask[:, 1:] <= mask[:, :-1]).all()) and bool(mask[:, 0].all())


def _hand_out(joint: JointPass, parts: Sequence[Part]) -> None:
    """Give each live part's parameters their gradients; they are views of the pass's, which nobody else reads."""
    for key, (a, b) in joint.grads.items():
        a, b = a.to(joint.draw_dtype), b.to(joint.draw_dtype)
        shares = zip(parts, a.unbind(), b.transpose(1, 2).unbind(), strict=True)
        for part, of_a, of_b in shares:
            site = part.segment.sites.get(key) if part.live else None
            if site is None:
                continue
            if site.rank < of_a.shape[0]:
                of_a, of_b = of_a[: site.rank], of_b[:, : site.rank]
            for parameter, grad in ((site.a, of_a), (site.b, of_b)):
                if parameter.grad is None:
                    parameter.grad = grad
                else:
                    parameter.grad.add_(grad)
