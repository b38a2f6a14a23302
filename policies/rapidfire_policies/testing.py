"""The contract of a policy, as plain functions: `check_policy(MyPolicy())` in a test is all it takes.

The checks draw small histories from a seeded generator. Values come from a handful of numbers with NaN and
infinities among them, so that ties and diverged trials are common: wide float ranges pass over real bugs.
"""

from __future__ import annotations

import functools
import math
import pickle
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from rapidfire_policies._search import search, verdicts
from rapidfire_policies.base import Decision, History, Policy, TrialHistory, TrialState, Verdict
from rapidfire_policies.survivors import is_finite, survives

HISTORIES = 150
"""Histories that each check draws."""
SEARCHES = 30
"""Searches that `check_resumes` runs through."""

_VALUES = (-1.0, 0.0, 0.25, 0.5, 0.5, 1.0, 3.0, math.nan, math.inf, -math.inf)
_NAMES = ("kl", "reward_std", "loss")
_METRICS = (0.0, 0.0, 0.5, 20.0, math.nan)
_CHUNKS = (1, 2, 3, 4, 6, 9, 12)
_STATES = tuple(TrialState)
_STATE_ODDS = (0.5, 0.1, 0.2, 0.1, 0.1)
_EXPLAINED = (Verdict.STOP, Verdict.PAUSE)
_STANDING = {Verdict.STOP: 0, Verdict.PAUSE: 1, Verdict.CONTINUE: 2, Verdict.COMPLETE: 2}


def check_policy(policy: Policy, *, seed: int = 0, checks: Sequence[Callable[..., None]] | None = None) -> None:
    """Run the contract over a policy.

    Args:
        policy: The policy, hyperparameters set.
        seed: Where the drawn histories come from.
        checks: The checks to run, `CHECKS` by default; leave one out for a policy that breaks it by design.

    Raises:
        AssertionError: The policy breaks a clause; the message names the clause and shows the history.

    >>> from rapidfire_policies import ASHA
    >>> check_policy(ASHA(min_resource=1, reduction_factor=2))
    """
    for check in CHECKS if checks is None else checks:
        check(policy, seed=seed)


def check_answers(policy: Policy, *, seed: int = 0) -> None:
    """`decide` returns a mapping from numbers of the history to decisions whose reasons are one line.

    It raises nothing. A STOP and a PAUSE say why. A trial that has reported nothing yet is not ended: there is nothing
    to judge.
    """
    for history in draw_histories(seed):
        try:
            decisions = policy.decide(history)
        except Exception as error:
            _fail(policy, f"raises {type(error).__name__}: {error}", history, cause=error)
        if not isinstance(decisions, Mapping):
            _fail(policy, f"returns {type(decisions).__name__}, not a mapping", history)
        trials = {trial.number: trial for trial in history.trials}
        for number, decision in decisions.items():
            if number not in trials:
                _fail(policy, f"decides about trial {number!r}, which is unknown", history)
            if not isinstance(decision, Decision) or not isinstance(decision.verdict, Verdict):
                _fail(policy, f"answers {decision!r}, which is no Decision with a Verdict", history)
            if "\n" in decision.reason:
                _fail(policy, f"gives a reason of several lines: {decision.reason!r}", history)
            ends = trials[number].is_live and decision.verdict in (Verdict.STOP, Verdict.COMPLETE)
            if ends and not trials[number].values:
                _fail(policy, f"ends trial {number}, which has no value yet", history)
            if decision.verdict in _EXPLAINED and not decision.reason:
                _fail(policy, f"says {decision.verdict} to trial {number} without a reason", history)


def check_numbers(policy: Policy, *, seed: int = 0) -> None:
    """The numbers of a decision have a place in JSON, and those of a STOP and a PAUSE hold the trial's own value.

    `value` is one of the trial's values (the last one, or that at the rung where it was judged).
    """
    for history in draw_histories(seed):
        trials = {trial.number: trial for trial in history.trials}
        for number, decision in policy.decide(history).items():
            for name, one in decision.numbers.items():
                plain = isinstance(name, str) and all(
                    isinstance(part, (int, float, str)) for part in (one if isinstance(one, tuple) else (one,))
                )
                if not plain:
                    what = f"gives trial {number} the number {name!r}: {one!r}, which has no place in JSON"
                    _fail(policy, what, history)
            values = trials[number].values
            if decision.verdict in _EXPLAINED and values:
                if "value" not in decision.numbers:
                    fix = "see rapidfire_policies.base.numbers_of"
                    _fail(policy, f"says {decision.verdict} to trial {number} without its `value` ({fix})", history)
                if repr(value := decision.numbers["value"]) not in map(repr, values):
                    _fail(policy, f"judges trial {number} by the value {value}, which it never had", history)


def check_empty(policy: Policy, *, seed: int = 0) -> None:
    """An empty history is answered with no decision."""
    for history in draw_histories(seed):
        empty = replace(history, trials=())
        if len(decisions := policy.decide(empty)):
            _fail(policy, f"decides on an empty history: {dict(decisions)}", empty)


def check_pure(policy: Policy, *, seed: int = 0) -> None:
    """The answer depends on the history alone: the same when asked again at once and after other histories.

    Neither global generator (`random`, `numpy.random`) is drawn from.
    """
    histories = list(draw_histories(seed))
    before = _global_randomness()
    asked_twice = [(_said(policy, history), _said(policy, history)) for history in histories]
    later = [_said(policy, history) for history in reversed(histories)][::-1]
    if _global_randomness() != before:
        _fail(policy, "draws from a global random generator", histories[0])
    for history, (one, at_once), then in zip(histories, asked_twice, later, strict=True):
        if not one == at_once == then:
            _fail(policy, f"is not pure, it says {one}, {at_once} and {then} of one history", history)


def check_input_untouched(policy: Policy, *, seed: int = 0) -> None:
    """`decide` changes nothing in the history, its arrays, parameters and metrics included."""
    for history in draw_histories(seed):
        before = _fingerprint(history)
        policy.decide(history)
        if _fingerprint(history) != before:
            _fail(policy, "changes its input", history)


def check_order_invariant(policy: Policy, *, seed: int = 0) -> None:
    """The order in which `trials` are listed plays no part, reasons and numbers included."""
    rng = np.random.default_rng(seed)
    for history in draw_histories(seed):
        shuffled = replace(history, trials=tuple(history.trials[i] for i in rng.permutation(len(history.trials))))
        one, other = _said(policy, history), _said(policy, shuffled)
        if one != other:
            order = [trial.number for trial in shuffled.trials]
            _fail(policy, f"depends on the order of trials, it says {one}, and {other} in the order {order}", history)


def check_relabel_stable(policy: Policy, *, seed: int = 0) -> None:
    """Without ties, the numbers of the trials play no part; for a policy that is `by_age`, only their order does."""
    rng = np.random.default_rng(seed)
    for history in draw_histories(seed, tie_free=True):
        old = [trial.number for trial in history.trials]
        new = rng.permutation(3 * len(old) + 1)[: len(old)].tolist()
        if policy.by_age:
            old, new = sorted(old), sorted(new)
        number = dict(zip(old, new, strict=True))
        relabelled = replace(history, trials=tuple(replace(t, number=number[t.number]) for t in history.trials))
        one, other = verdicts(policy, history), verdicts(policy, relabelled)
        if any(one[trial] is not other[number[trial]] for trial in one):
            _fail(policy, f"depends on trial numbers without a tie: renumbered by {number} it says {other}", history)


def check_non_finite(policy: Policy, *, seed: int = 0) -> None:
    """A running trial whose last value is NaN or infinite never fares better than a finite one at its resource.

    Nor does it ever become COMPLETE.
    """
    for history in draw_histories(seed):
        said = verdicts(policy, history)
        for bad in (trial for trial in history.trials if trial.is_live and trial.values and not is_finite(trial)):
            if said[bad.number] is Verdict.COMPLETE:
                _fail(policy, f"completes trial {bad.number}, whose value is {bad.values[-1]}", history)
            peers = [t for t in history.running if is_finite(t) and t.resource == bad.resource]
            for peer in peers if bad.state is TrialState.RUNNING else ():
                if _STANDING[said[bad.number]] > _STANDING[said[peer.number]]:
                    _fail(
                        policy,
                        f"lets trial {bad.number} with value {bad.values[-1]} {said[bad.number]} "
                        f"over trial {peer.number} with value {peer.values[-1]}",
                        history,
                    )


def check_ties(policy: Policy, *, seed: int = 0) -> None:
    """Of equal trials at equal resource at least one goes on, and listing them backwards changes nothing."""
    rng = np.random.default_rng(seed)
    for _ in range(HISTORIES):
        chunks = int(rng.choice(_CHUNKS))
        resource = int(rng.integers(1, chunks + 1))
        trials = tuple(TrialHistory(number, (0.5,) * resource) for number in range(int(rng.integers(1, 17))))
        history = History(trials, chunks=chunks, slots=len(trials))
        one = verdicts(policy, history)
        if all(verdict is Verdict.STOP for verdict in one.values()):
            _fail(policy, "stops every one of equal trials", history)
        if one != verdicts(policy, replace(history, trials=trials[::-1])):
            _fail(policy, "breaks ties by the order in which trials are listed", history)


def check_survivor(policy: Policy, *, seed: int = 0) -> None:
    """A history with a finite live trial still has a finite trial, live or complete, when the decisions are done."""
    for history in draw_histories(seed):
        finite = [trial for trial in history.trials if is_finite(trial)]
        decisions = policy.decide(history)
        if any(trial.is_live for trial in finite) and not any(survives(trial, decisions) for trial in finite):
            _fail(policy, "stops the last finite trial (see rapidfire_policies.survivors.keep_one)", history)


def check_resumes(policy: Policy, *, seed: int = 0) -> None:
    """Trials that a policy pauses are taken back: no search ends with a finite trial paused and no finite one complete.

    Small searches are run through, with slots, newcomers and room for as many paused trials as there are slots. When
    all trials are paused and no newcomer may come, the policy is asked once more and must let one go on, or they end.
    """
    for whole in _searches(seed):
        for history, said, last_call in search(policy, whole):
            finite = [trial for trial in history.trials if is_finite(trial)]
            left = [trial.number for trial in finite if said.get(trial.number) is Verdict.PAUSE]
            goes_on = not {Verdict.CONTINUE, Verdict.COMPLETE}.isdisjoint(said.values())
            if last_call and left and not (goes_on or any(t.state is TrialState.COMPLETE for t in finite)):
                _fail(policy, f"leaves all trials paused, finite ones ({left}) too, and none is complete", history)


def check_pickle(policy: Policy, *, seed: int = 0) -> None:
    """A pickled and restored policy, and one restored after use, answers as the original does."""
    histories = list(draw_histories(seed))
    try:
        fresh = pickle.loads(pickle.dumps(policy))
        expected = [_said(policy, history) for history in histories]
        used = pickle.loads(pickle.dumps(policy))
    except (pickle.PickleError, AttributeError, TypeError) as error:
        raise AssertionError(f"{policy!r} cannot be pickled: {error}") from error
    for history, answer in zip(histories, expected, strict=True):
        for copy in (fresh, used):
            if _said(copy, history) != answer:
                _fail(policy, f"answers {answer}, but its pickled copy does not", history)


CHECKS: tuple[Callable[..., None], ...] = (
    check_answers,
    check_numbers,
    check_empty,
    check_pure,
    check_input_untouched,
    check_order_invariant,
    check_relabel_stable,
    check_non_finite,
    check_ties,
    check_survivor,
    check_resumes,
    check_pickle,
)
"""The whole contract, in the order in which a broken policy is easiest to mend."""


def draw_histories(seed: int, *, tie_free: bool = False) -> Iterator[History]:
    """Yield `HISTORIES` histories: cohorts in lockstep and trials all over the place, running or paused.

    Every second one has scores, costs and metrics.

    Args:
        seed: The same seed gives the same histories.
        tie_free: All values finite, no two equal.

    >>> sum(history.chunks for history in draw_histories(0)) == sum(history.chunks for history in draw_histories(0))
    True
    """
    # Every caller gets arrays of its own: a policy under test may write to them.
    yield from pickle.loads(_drawn(seed, tie_free))


@functools.cache
def _drawn(seed: int, tie_free: bool) -> bytes:
    histories = []
    rng = np.random.default_rng(seed)
    for index in range(HISTORIES):
        chunks = int(rng.choice(_CHUNKS))
        count = int(rng.integers(1, 13))
        in_lockstep = bool(rng.random() < 0.5)
        live = TrialState.PAUSED if rng.random() < 0.2 else TrialState.RUNNING
        shared_resource = int(rng.integers(1, chunks + 1))
        distinct = rng.permutation(count * chunks) / 8.0
        trials = []
        for row, number in enumerate(rng.choice(3 * count, size=count, replace=False)):
            state = TrialState.RUNNING if in_lockstep else _STATES[rng.choice(len(_STATES), p=_STATE_ODDS)]
            resource = shared_resource if in_lockstep else int(rng.integers(state is TrialState.COMPLETE, chunks + 1))
            drawn = distinct[row * chunks :][:resource] if tie_free else rng.choice(_VALUES, size=resource)
            state = live if state is TrialState.RUNNING else state
            trials.append(_trial(int(number), drawn.tolist(), state, rng, with_scores=index % 2 == 1))
        histories.append(History(tuple(trials), chunks=chunks, slots=int(rng.integers(1, count + 1))))
    return pickle.dumps(histories)


def _searches(seed: int) -> Iterator[History]:
    """Yield small searches as they would be if every trial trained to its end."""
    rng = np.random.default_rng(seed)
    for index in range(SEARCHES):
        chunks, count = int(rng.choice(_CHUNKS[1:])), int(rng.integers(1, 10))
        curves = rng.choice(_VALUES[: rng.choice((7, len(_VALUES)))], size=(count, chunks))
        trials = (
            _trial(number, curve.tolist(), TrialState.COMPLETE, rng, with_scores=index % 2 == 1)
            for number, curve in enumerate(curves)
        )
        yield History(tuple(trials), chunks=chunks, slots=int(rng.integers(1, 5)))


def _trial(
    number: int, values: Sequence[float], state: TrialState, rng: np.random.Generator, *, with_scores: bool
) -> TrialHistory:
    chunks = len(values)
    return TrialHistory(
        number=number,
        values=tuple(values),
        state=state,
        scores=tuple(_scores(value, rng) for value in values) if with_scores else (),
        costs=tuple(rng.choice((1.0, 4.0), size=chunks).tolist()) if with_scores else (),
        params={"r": int(rng.choice((4, 16)))},
        metrics={name: tuple(rng.choice(_METRICS, size=chunks).tolist()) for name in _NAMES if with_scores},
    )


def _scores(value: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Eight per-example scores, shape `(8,)` float64, whose mean is the value."""
    return value + rng.permutation(np.array([-0.5, -0.25, -0.25, 0.0, 0.0, 0.25, 0.25, 0.5]))


def _said(policy: Policy, history: History) -> dict[int, tuple[Decision, str]]:
    """The decisions, with their numbers as comparable data (NaN equals itself)."""
    decisions = policy.decide(history).items()
    return {number: (decision, repr(sorted(decision.numbers.items()))) for number, decision in decisions}


def _fingerprint(history: History) -> object:
    """Everything in a history as comparable data (NaN equals itself)."""
    trials = tuple(
        (
            trial.number,
            trial.state,
            repr(trial.values),
            tuple(scores.tobytes() for scores in trial.scores),
            repr(trial.costs),
            repr(sorted(trial.params.items())),
            repr(sorted(trial.metrics.items())),
        )
        for trial in history.trials
    )
    return trials, history.chunks, history.slots


def _global_randomness() -> tuple[object, str]:
    # The legacy state is what a careless policy would draw from.
    return random.getstate(), repr(np.random.get_state())  # noqa: NPY002


def _fail(policy: Policy, what: str, history: History, cause: Exception | None = None) -> NoReturn:
    """Raise the AssertionError, with the history in one line a trial."""
    lines = [
        f"  trial {trial.number} {trial.state}: {', '.join(f'{value:g}' for value in trial.values) or 'no value yet'}"
        for trial in history.trials
    ]
    facts = f"chunks={history.chunks}, slots={history.slots}"
    raise AssertionError("\n".join([f"{policy!r} {what}", f"History with {facts}:", *lines])) from cause
