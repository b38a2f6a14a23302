"""What a trial is worth at a chunk boundary: per-example scores on one shared set, comparable across trials.

Built-in metrics score through the same seam the training goes through, so that all trials that stand at a boundary are
evaluated in joint passes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from transformers import Trainer
from trl import DPOTrainer, SFTTrainer

from rapidfire_automl.executor import seams
from rapidfire_automl.sampling import Sampling

Metric = Callable[[Trainer], Any]
"""From a trainer to a number or to one score an example; to several of them in a study with several objectives."""
PREFERENCE_BETA = 0.1
"""The one beta at which preferences are judged, whatever beta a trial trains with."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One evaluation.

    Args:
        vector: One value an objective: the mean of its scores, or what the metric returned.
        scores: Per example, shape `(examples,)`, or `(objectives, examples)` with several objectives; empty where the
            metric gives numbers, packing loses the order, or the objectives are scored on sets of different sizes.
    """

    vector: tuple[float, ...]
    scores: NDArray[np.float64]

    @property
    def value(self) -> float:
        """The first objective's value."""
        return self.vector[0]


@dataclass(slots=True)
class Evaluator:
    """Scores trainers, and keeps what does not change between trials: collated batches and reference log-probabilities.

    Args:
        metric: A built-in's name, a callable on the trainer, None for the trainer's own built-in, or a sequence of
            those, one an objective.
        batch_size: Examples of a forward, prompts of a rollout.
        sampling: How answers are sampled where rewards are compared.
    """

    metric: str | Metric | Sequence[str | Metric] | None
    batch_size: int
    sampling: Sampling = field(default_factory=Sampling)
    _weights: tuple[float, ...] | None = None
    _batches: dict[str, list[tuple[list[int], dict[str, Tensor]]]] = field(default_factory=dict)
    _reference: dict[str, list[Tensor]] = field(default_factory=dict)
    _keys: WeakKeyDictionary[Trainer, str] = field(default_factory=WeakKeyDictionary)

    @property
    def _metrics(self) -> tuple[str | Metric | None, ...]:
        if self.metric is None or isinstance(self.metric, str) or callable(self.metric):
            return (self.metric,)
        return tuple(self.metric)

    def check_objectives(self, objectives: int) -> None:
        """Raise ValueError if the metric can't be what a study with so many directions needs."""
        if len(self._metrics) != objectives and not callable(self.metric):
            got = self.metric if self.metric is None or isinstance(self.metric, str) else list(self.metric)
            if objectives == 1:
                raise ValueError(f"`study` must have {len(self._metrics)} directions for `metric` {got!r}, got 1.")
            raise ValueError(
                f"`metric` must give {objectives} values for a study with {objectives} directions: a list of "
                f"{objectives} metrics, or a function that returns {objectives} numbers; got {got!r}."
            )

    def check(self, trainer: Trainer) -> None:
        """Raise ValueError or TypeError if this trainer can't be evaluated."""
        builtin = [metric for metric in self._metrics if not callable(metric)]
        if not builtin:
            return
        if trainer.eval_dataset is None:
            raise ValueError(
                "`eval_dataset` must be given: trials are compared on it after every chunk. "
                "Pass it to the trainer, or give the executor a `metric`."
            )
        for metric in builtin:
            self._builtin(trainer, metric)

    def measure(self, trainer: Trainer, *, minimize: Sequence[bool]) -> Measured:
        """Score a trainer's model.

        Args:
            trainer: The trial's trainer.
            minimize: The study's directions; a built-in metric is negated if that runs against its own.

        Returns:
            Values and scores in the study's directions.
        """
        if callable(self.metric) and len(minimize) > 1:
            return _together(_several(self.metric(trainer), len(minimize)))
        return _together(
            [
                _measured(metric(trainer)) if callable(metric) else self._measure_builtin(trainer, metric, down)
                for metric, down in zip(self._metrics, minimize, strict=True)
            ]
        )

    def _measure_builtin(self, trainer: Trainer, metric: str | None, minimize: bool) -> Measured:
        name = self._builtin(trainer, metric)
        was_training = trainer.model.training
        trainer.model.eval()
        try:
            if name == "reward":
                rewards = self._rewards(trainer)
                rewards = -rewards if minimize else rewards
                return Measured((float(rewards.mean()),), rewards)
            with torch.no_grad(), trainer.compute_loss_context_manager():
                scores = self._nll(trainer) if name == "nll" else self._preference(trainer, name)
        finally:
            trainer.model.train(was_training)
        if minimize == (name in ("preference_accuracy", "reward_margin")):
            scores = -scores
        return Measured((float(scores.mean()),), np.empty(0) if _is_packed(trainer.eval_dataset) else scores)

    def _builtin(self, trainer: Trainer, metric: str | None) -> str:
        mine: tuple[str, ...]
        if isinstance(trainer, SFTTrainer):
            mine = ("nll",)
        elif isinstance(trainer, DPOTrainer):
            mine = ("preference_loss", "preference_accuracy", "reward_margin")
        elif seams.has_rollouts(trainer):
            mine = ("reward",)
            if why := seams.why_no_rewards(trainer):
                raise TypeError(f"`metric` must be a function for a trainer with {why}.")
        else:
            raise TypeError(f"`metric` must be a function for a {type(trainer).__name__}: it has no built-in one.")
        name = metric or mine[0]
        if name not in mine:
            raise ValueError(f"`metric` must be one of {', '.join(mine)} for a {type(trainer).__name__}, got {name!r}.")
        return name

    def _rewards(self, trainer: Trainer) -> NDArray[np.float64]:
        """The mean reward of each held-out prompt's answers, sampled alike for all trials."""
        weights = self.sampling.reward_weights or tuple(trainer.reward_weights.tolist())
        self._weights = self._weights or weights
        if weights != self._weights:
            raise ValueError(
                f"`reward_weights` differ between trials, {list(weights)} and {list(self._weights)}: their rewards "
                "don't compare. Give the executor `eval_sampling=Sampling(reward_weights=(...))`."
            )
        sets = trainer.eval_dataset
        parts: list[Dataset] = list(sets.values()) if isinstance(sets, dict) else [sets]
        rows = [row for part in parts for row in part]
        if not rows:
            raise ValueError("`eval_dataset` must not be empty.")
        scores = []
        with seams.sampling_as(trainer, self.sampling):
            for start in range(0, len(rows), self.batch_size):
                got = seams.sample_rewards(trainer, rows[start : start + self.batch_size], self.sampling)
                total = (got * torch.tensor(weights, dtype=torch.float64)).nansum(1)
                total[got.isnan().all(1)] = torch.nan
                scores.append(total.view(-1, self.sampling.num_generations).nanmean(1))
        scored: NDArray[np.float64] = torch.cat(scores).numpy()
        if np.isnan(scored).any():
            place = int(np.isnan(scored).argmax())
            raise ValueError(f"No reward function scored the answers to `eval_dataset[{place}]`.")
        return scored

    # -- data --------------------------------------------------------------------------------------------------------

    def _data(self, trainer: Trainer) -> tuple[str, list[tuple[list[int], dict[str, Tensor]]]]:
        """Batches of examples of similar length, with each example's place; the same objects for equal data."""
        known = self._keys.get(trainer)
        if known is not None:
            return known, self._batches[known]
        sets = trainer.eval_dataset
        parts: list[Dataset] = list(sets.values()) if isinstance(sets, dict) else [sets]
        trainer._set_signature_columns_if_needed()
        wanted = trainer._signature_columns or []
        rows: list[dict[str, Any]] = []
        for part in parts:
            names = [n for n in part.column_names if n in wanted] or part.column_names
            if not trainer.args.remove_unused_columns:
                names = part.column_names
            columns = {name: part[name][:] for name in names}
            for i in range(len(part)):
                rows += _unpacked({name: columns[name][i] for name in names})
        if not rows:
            raise ValueError("`eval_dataset` must not be empty.")
        collate = trainer.data_collator
        if getattr(collate, "padding_free", False):  # it makes one row of all examples
            collate = replace(collate, padding_free=False)
        key = hashlib.sha256(repr(rows).encode()).hexdigest() + type(collate).__name__
        if key not in self._batches:
            order = sorted(range(len(rows)), key=lambda i: (-_length(rows[i]), i))
            batches = []
            for start in range(0, len(order), self.batch_size):
                places = order[start : start + self.batch_size]
                batch = collate([dict(rows[i]) for i in places])
                batches.append((places, batch))
            self._batches[key] = batches
        self._keys[trainer] = key
        return key, self._batches[key]

    def _scored(self, trainer: Trainer) -> Iterator[tuple[list[int], dict[str, Tensor], Tensor, Tensor]]:
        """Per batch: places, inputs, log-probabilities `(rows, width - 1)` and mask of the scored tokens."""
        for places, batch in self._data(trainer)[1]:
            inputs = {name: x.to(trainer.args.device) for name, x in batch.items() if isinstance(x, Tensor)}
            labels = _labels(inputs)
            output = trainer.model(**_model_inputs(inputs), labels=labels, fused_lm_head=True, use_cache=False)
            yield places, inputs, output.log_probs, output.label_mask

    # -- built-in metrics --------------------------------------------------------------------------------------------

    def _nll(self, trainer: Trainer) -> NDArray[np.float64]:
        """Negative log-likelihood in nats a token, weighted so that the mean over examples is the mean over tokens."""
        pairs: dict[int, tuple[float, float]] = {}
        for places, _, log_probs, mask in self._scored(trainer):
            sums, counts = (-log_probs.double()).sum(1).tolist(), mask.sum(1).tolist()
            pairs.update({place: (s, n) for place, s, n in zip(places, sums, counts, strict=True)})
        sums_, counts_ = np.array([pairs[i] for i in range(len(pairs))]).T
        if not counts_.sum():
            raise ValueError("`eval_dataset` has no token to score.")
        scores: NDArray[np.float64] = sums_ * (len(pairs) / counts_.sum())
        return scores

    def _preference(self, trainer: Trainer, name: str) -> NDArray[np.float64]:
        """Per pair, from the margin `(log p(chosen) - ref) - (log p(rejected) - ref)`."""
        key, _ = self._data(trainer)
        policy = [log_probs.double().sum(1) for _, _, log_probs, _ in self._scored(trainer)]
        if key not in self._reference:
            with trainer.model.disable_adapter():
                self._reference[key] = [log_probs.double().sum(1) for _, _, log_probs, _ in self._scored(trainer)]
        margins: dict[int, float] = {}
        for (places, _), mine, reference in zip(self._batches[key], policy, self._reference[key], strict=True):
            chosen, rejected = (mine - reference).chunk(2)
            margins.update(zip(places, (chosen - rejected).tolist(), strict=True))
        margin = torch.tensor([margins[i] for i in range(len(margins))], dtype=torch.float64)
        result = {
            "preference_loss": lambda: -F.logsigmoid(PREFERENCE_BETA * margin),
            "preference_accuracy": lambda: (margin > 0).double() + 0.5 * (margin == 0).double(),
            "reward_margin": lambda: PREFERENCE_BETA * margin,
        }[name]()
        scores: NDArray[np.float64] = result.numpy()
        return scores


def _measured(got: Any) -> Measured:
    """What a user's metric has returned."""
    try:
        numbers = got.detach().double().cpu() if isinstance(got, Tensor) else got
        if isinstance(numbers, (str, bytes)) or numbers is None:
            raise TypeError
        scores = np.asarray(numbers, dtype=np.float64)
    except (TypeError, ValueError):
        scores = np.empty((0, 0))
    if scores.ndim == 0:
        return Measured((float(scores),), np.empty(0))
    if scores.ndim != 1 or not len(scores):
        raise ValueError(f"`metric` must return a number or one score an example, got {got!r:.80}.")
    return Measured((float(scores.mean()),), scores)


def _several(got: Any, objectives: int) -> list[Measured]:
    """What a user's metric has returned for several objectives at once: numbers, or rows of scores."""
    parts = list(got.values()) if isinstance(got, Mapping) else got
    try:
        parts = list(parts)
    except TypeError:
        parts = []
    if len(parts) != objectives or isinstance(got, (str, bytes)):
        raise ValueError(
            f"`metric` must return {objectives} numbers, or {objectives} rows of one score an example, for a study "
            f"with {objectives} directions, got {got!r:.80}."
        )
    return [_measured(part) for part in parts]


def _together(parts: Sequence[Measured]) -> Measured:
    """One evaluation of one or several objectives."""
    if len(parts) == 1:
        return parts[0]
    alike = len({part.scores.shape for part in parts}) == 1 and len(parts[0].scores) > 0
    return Measured(
        tuple(part.value for part in parts), np.stack([part.scores for part in parts]) if alike else np.empty(0)
    )


def _labels(inputs: dict[str, Tensor]) -> Tensor:
    if "completion_mask" in inputs:
        return inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    return inputs["labels"]


def _model_inputs(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: inputs[name] for name in ("input_ids", "attention_mask", "position_ids") if name in inputs}


def _is_packed(sets: Any) -> bool:
    """Whether a data set's rows hold several examples each, in an order of TRL's."""
    parts = sets.values() if isinstance(sets, dict) else [sets]
    return any("seq_lengths" in part.column_names for part in parts)


def _unpacked(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The examples of a packed row; other rows are one."""
    row = dict(row)
    lengths = row.pop("seq_lengths", None)
    if lengths is None:
        return [row]
    ends = np.cumsum(lengths).tolist()
    spans = zip([0, *ends], ends, strict=False)
    return [{name: values[start:end] for name, values in row.items()} for start, end in spans]


def _length(row: dict[str, Any]) -> int:
    return sum(len(value) for value in row.values() if isinstance(value, (list, tuple)))
