"""Replays: the executor's rounds over recorded curves, what is counted, and what stock pruners make of them."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import optuna
import pytest
from numpy.typing import NDArray

from rapidfire_automl import replay
from rapidfire_automl.histories import COST_ATTR
from rapidfire_automl.pruners import PolicyPruner
from rapidfire_automl.replay import Replay, ReplayResult, _InOrder, hold_last
from rapidfire_automl.replay_study import RowSampler, StudyMirror, space_of
from rapidfire_policies import ASHA, Decision, History, Median, Nop, Policy, TrialHistory, TrialState, Verdict

CURVES = Path(__file__).parents[1] / ".." / "shared" / "data" / "curves"
C, P, S, D = Verdict.CONTINUE, Verdict.PAUSE, Verdict.STOP, Verdict.COMPLETE
optuna.logging.set_verbosity(optuna.logging.WARNING)


def curves(trials: int, chunks: int, seed: int = 0) -> NDArray[np.float64]:
    """Falling curves with a little noise."""
    rng = np.random.default_rng(seed)
    return rng.random((trials, 1)) + 1 / np.arange(1, chunks + 1) + 0.01 * rng.standard_normal((trials, chunks))


@dataclass(frozen=True)
class Dice(Policy):
    """Any verdict, by a hash of where a trial stands; a paused one comes back sooner or later or never."""

    salt: int = 0
    odds: str = "ccccccppsd"

    def decide(self, history: History) -> Mapping[int, Decision]:
        told = {"c": C, "p": P, "s": S, "d": D}
        total = sum(trial.resource for trial in history.trials)
        decisions = {}
        for trial in history.trials:
            throw = crc32(f"{self.salt} {trial.number} {trial.resource} {total}".encode())
            if trial.is_live and throw % 7:
                decisions[trial.number] = Decision(told[self.odds[throw // 7 % len(self.odds)]], f"throw {throw}")
        return decisions


@dataclass(frozen=True)
class Script(Policy):
    """Verdicts by (trial, chunks done), of running and of paused trials; keeps what it was shown."""

    running: Mapping[tuple[int, int], Verdict] = field(default_factory=dict)
    paused: Mapping[tuple[int, int], Verdict] = field(default_factory=dict)
    seen: list[History] = field(default_factory=list)

    def decide(self, history: History) -> Mapping[int, Decision]:
        self.seen.append(history)
        return {
            trial.number: Decision(verdict, "so")
            for trial in history.trials
            if (verdict := (self.paused if trial.state is TrialState.PAUSED else self.running).get(place(trial)))
        }


@dataclass
class Watched(Policy):
    """A policy, and all that it was shown and said."""

    inner: Policy
    seen: list[Any] = field(default_factory=list)

    def decide(self, history: History) -> Mapping[int, Decision]:
        trials = sorted(history.trials, key=lambda trial: trial.number)
        decisions = self.inner.decide(history)
        self.seen.append(([(t.number, t.values, t.state) for t in trials], sorted(decisions.items())))
        return decisions


def place(trial: TrialHistory) -> tuple[int, int]:
    return trial.number, trial.resource


def told(result: ReplayResult) -> list[tuple[int, int, Verdict]]:
    return [(verdict.trial, verdict.chunk, verdict.verdict) for verdict in result.verdicts]


# -- the executor's rounds ---------------------------------------------------------------------------------------------


def conducted(table: NDArray[np.float64], policy: Policy, slots: int, most: int) -> dict[int, Any]:
    """The records of the executor's own conductor and referee, over threads that read their values off a table."""
    from rapidfire_automl.executor.arm import Arm, Leave
    from rapidfire_automl.executor.commands import Commands
    from rapidfire_automl.executor.conductor import Conductor
    from rapidfire_automl.executor.context import TrialContext
    from rapidfire_automl.executor.requests import Boundary
    from rapidfire_automl.executor.rounds import Referee
    from rapidfire_automl.executor.sources import Asking
    from rapidfire_automl.plan import Plan
    from rapidfire_automl.records import TrialRecord

    records: dict[int, TrialRecord] = {}
    chunks = table.shape[1]
    referee = Referee(records, chunks, slots, lambda *a, **k: None, "tokens")
    commands = Commands(records, chunks, lambda *a, **k: None, lambda: None)
    conductor = Conductor(slots, most, Plan(), referee, lambda *a, **k: None, lambda: 0.0, commands)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0), pruner=PolicyPruner(policy))
    threads: dict[int, threading.Thread] = {}

    def train(arm: Arm) -> None:
        arm.go.wait()
        state = TrialState.COMPLETE
        try:
            for k in range(chunks):
                referee.record(arm, (float(table[arm.number, k]),), [0.0], {})
                decision = conductor.submit(arm, Boundary(k + 1))
                if decision.verdict in (S, D):
                    state = TrialState.STOPPED if decision.verdict is S else TrialState.COMPLETE
                    break
        except Leave:
            state = TrialState.FAILED
        arm.record.state = state
        conductor.leave(arm)

    def start(trial: optuna.Trial) -> Arm:
        record = records[trial.number] = TrialRecord(trial.number, boundaries=list(range(1, chunks + 1)))
        arm = Arm(trial, TrialContext(0), record, minimize=(True,))
        threads[trial.number] = threading.Thread(target=train, args=(arm,), daemon=True)
        threads[trial.number].start()
        return arm

    def retire(arm: Arm) -> None:
        threads.pop(arm.number).join()
        stopped = arm.record.state is TrialState.STOPPED
        study.tell(
            arm.trial,
            None if stopped else arm.record.values[-1],
            state=optuna.trial.TrialState.PRUNED if stopped else None,
        )

    conductor.run(Asking(study, len(table), start, None), retire, TrialContext.capture())
    return dict(records)


@pytest.mark.parametrize("slots", [1, 3, 4])
@pytest.mark.parametrize("policy", [ASHA(), Median(grace=2), Dice(1), Dice(2), Dice(3, "ccppppps"), Dice(4, "cpppp")])
def test_rounds_are_the_conductors(policy: Policy, slots: int) -> None:
    table = curves(12, 5)
    here, there = Watched(policy), Watched(policy)
    result = replay(table, here, slots=slots, max_alive=2 * slots)
    records = conducted(table, there, slots, most=2 * slots)
    assert len(here.seen) > 3
    assert here.seen == there.seen
    for number, record in records.items():
        mine = [(v.chunk, str(v.verdict), v.reason) for v in result.verdicts if v.trial == number]
        assert mine == record.verdicts
        assert result.resource[number] == len(record.values)
    assert result.stopped == {n for n, record in records.items() if record.state is TrialState.STOPPED}
    assert result.complete == {n for n, record in records.items() if record.state is TrialState.COMPLETE}


def test_a_free_slot_is_refilled_before_the_next_round() -> None:
    policy = Script({(0, 1): S, (2, 2): S})
    result = replay(curves(5, 3), policy, slots=2)
    standing = [[place(trial) for trial in history.running] for history in policy.seen]
    assert standing == [
        [(0, 1), (1, 1)], [(1, 2), (2, 1)], [(2, 2)], [(3, 1), (4, 1)], [(3, 2), (4, 2)],
    ]  # fmt: skip
    assert result.order == (0, 1, 2, 3, 4)
    assert result.slot_rounds.tolist() == [2, 2, 2, 2, 2, 2]


def test_a_resumed_trial_goes_before_newcomers() -> None:
    policy = Script({(0, 1): P}, {(0, 1): C})
    replay(curves(4, 2), policy, slots=1, n_trials=3)
    # 0 pauses, 1 takes the slot; after 1's first chunk 0 is wanted back, and gets the slot when 1 has ended.
    standing = [([t.number for t in history.running], [t.number for t in history.paused]) for history in policy.seen]
    assert standing == [([0], []), ([1], [0]), ([], [0]), ([2], [])]


def test_when_all_are_paused_the_policy_is_asked_once_more() -> None:
    pausing = {(number, 1): P for number in range(4)}
    policy = Script(pausing, {(2, 1): C})
    result = replay(curves(4, 2), policy, slots=4)
    assert [len(history.paused) for history in policy.seen] == [0, 4, 3, 3]
    assert result.complete == {2}
    assert result.stopped == {0, 1, 3}
    assert result.verdicts[-1].reason == "paused when the search ended"


def test_paused_trials_wait_for_the_whole_cohort_unless_too_many_live() -> None:
    pausing = {(number, 1): P for number in range(6)}
    everyone = Script(pausing)
    replay(curves(6, 2), everyone, slots=2)
    assert [len(history.paused) for history in everyone.seen] == [0, 2, 4, 6]
    capped = Script(pausing)
    result = replay(curves(6, 2), capped, slots=2, max_alive=4)
    assert [len(history.paused) for history in capped.seen] == [0, 2, 4, 0, 2]
    assert result.stopped == set(range(6))
    assert result.resource.tolist() == [1] * 6


def test_a_good_enough_trial_ends_as_complete_and_a_diverged_one_never_does() -> None:
    table = np.array([[1.0, 0.5, 0.4], [math.nan, 0.5, 0.4], [1.0, 0.9, math.inf]])
    result = replay(table, Script({(0, 2): D, (1, 1): D}), slots=3)
    assert result.complete == {0}
    assert result.stopped == set()
    assert result.resource.tolist() == [2, 1, 3]
    assert result.selected == 0


def test_trials_at_their_end_are_complete_before_the_policy_is_asked() -> None:
    policy = Script()
    replay(curves(2, 2), policy, slots=1)
    assert [[t.state for t in history.trials] for history in policy.seen] == [
        [TrialState.RUNNING], [TrialState.COMPLETE, TrialState.RUNNING],
    ]  # fmt: skip


def test_policies_see_values_costs_scores_and_parameters() -> None:
    table, policy = curves(2, 2), Script()
    scores = np.arange(12.0).reshape(2, 2, 3)
    replay(table, policy, slots=2, scores=scores, costs=[2.0, 3.0], params=[{"r": 4}, {"r": 8}])
    [history] = policy.seen
    assert (history.chunks, history.slots) == (2, 2)
    for row, trial in enumerate(history.trials):
        assert trial.values == (table[row, 0],)
        assert trial.costs == ((2.0, 3.0)[row],)
        assert np.array_equal(trial.scores, scores[row, :1])
        assert trial.params == {"r": (4, 8)[row]}


# -- what is counted ---------------------------------------------------------------------------------------------------


def test_clock_cost_and_incumbent() -> None:
    table = np.array([[0.9, 0.4, 0.6], [math.nan, 0.3, 0.2], [-math.inf, 0.1, 0.1]])
    costs = np.array([[1.0, 2.0, 3.0], [10.0, 10.0, 10.0], [0.5, 0.5, 0.5]])
    result = replay(table, Script({(2, 1): S}), slots=3, costs=costs)
    assert result.chunks == 7
    assert result.cost == costs[:2].sum() + 0.5
    assert result.incumbent.tolist() == [[1.0, 0.9], [13.5, 0.4], [23.5, 0.3], [36.5, 0.2]]
    assert math.isnan(result.best_within(0.9))
    assert [result.best_within(cost) for cost in (1.0, 13.4, 13.5, 1e9)] == [0.9, 0.9, 0.4, 0.2]
    assert result.selected == 1
    assert result.resource.tolist() == [3, 3, 1]


def test_no_round_begins_once_the_budget_is_spent() -> None:
    table = np.array([[3.0, 2.0, 1.0], [1.0, 0.9, 0.8], [0.1, 0.1, 0.1]])
    result = replay(table, Nop(), slots=2, costs=[1.0, 0.5, 9.0], budget=2.5)
    assert (result.chunks, result.cost) == (4, 3.0)
    assert result.resource.tolist() == [2, 2, 0]
    assert result.stopped == result.complete == frozenset()
    assert result.selected == 1


@pytest.mark.parametrize(
    ("table", "running", "selected"),
    [
        ([[0.5, 0.3], [0.5, 0.2], [0.5, 0.2]], {}, 1),  # ties to the one that came first
        ([[0.5, math.nan], [0.4, 0.9]], {}, 1),
        ([[0.1, 0.1], [0.5, 0.9]], {(0, 1): S}, 1),  # a complete one goes before a better one that was stopped
        ([[0.1, 0.2, 0.3], [0.5, 0.9, 0.1]], {(0, 1): S, (1, 2): S}, 1),  # else the furthest
        ([[math.nan], [math.inf]], {}, None),
    ],
)
def test_selected(table: list[list[float]], running: dict[tuple[int, int], Verdict], selected: int | None) -> None:
    assert replay(table, Script(running), slots=len(table)).selected == selected


def test_hold_last() -> None:
    nan = math.nan
    held = hold_last([[3.0, 2.0, nan], [nan, 1.0, nan], [nan, nan, nan], [1.0, math.inf, nan]])
    np.testing.assert_equal(held, [[3.0, 2.0, 2.0], [nan, 1.0, 1.0], [nan] * 3, [1.0, math.inf, math.inf]])


def test_non_finite_values_come_through() -> None:
    policy = Script()
    replay([[math.nan, 1.0], [math.inf, 1.0], [-math.inf, 1.0]], policy, slots=3)
    assert [repr(trial.values[0]) for trial in policy.seen[0].trials] == ["nan", "inf", "-inf"]


# -- order, seeds, pickling --------------------------------------------------------------------------------------------


def test_seed_draws_the_order() -> None:
    table = curves(20, 4)
    orders = {seed: replay(table, ASHA(), slots=4, seed=seed, n_trials=12).order for seed in (0, 1, 2)}
    assert orders[0] == tuple(range(12))
    assert len(set(orders.values())) == 3
    assert all(len(set(order)) == 12 for order in orders.values())
    assert replay(table, ASHA(), slots=4, seed=1, n_trials=12).order == orders[1]


def test_trials_are_rows_whatever_their_order() -> None:
    table = curves(20, 4)
    one = replay(table, Nop(), slots=4, seed=5)
    assert one.selected == table[:, -1].argmin()
    assert {v.trial for v in one.verdicts} == set(range(20))


def same(one: ReplayResult, other: ReplayResult) -> bool:
    return repr(one) == repr(other) and one.verdicts == other.verdicts and one.order == other.order


@pytest.mark.parametrize("kind", ["policy", "pruner", "sampler"])
def test_a_pickled_replay_goes_on_bit_for_bit(kind: str) -> None:
    table = curves(24, 6)
    params = [{"x": float(x)} for x in np.linspace(0, 1, 24)]

    def build() -> Replay:
        order = list(range(24))
        if kind == "policy":
            return Replay(table, Dice(5).decide, 4, _InOrder(order).next_row, np.ones(table.shape), max_alive=8)
        pruner = optuna.pruners.SuccessiveHalvingPruner() if kind == "pruner" else None
        sampler = optuna.samplers.TPESampler(seed=3, n_startup_trials=4) if kind == "sampler" else None
        mirror = StudyMirror(pruner, sampler, params, order, 24)
        judge: Callable[[History], Mapping[int, Decision]] = mirror.judge if pruner else ASHA().decide
        return Replay(table, judge, 4, mirror.next_row, np.ones(table.shape), params=params, mirror=mirror)

    whole = build().run()
    for rounds in (1, 3, 7):
        engine = build()
        for _ in range(rounds):
            engine.round()
        frozen = pickle.dumps(engine)
        assert same(engine.run(), whole)
        assert same(pickle.loads(frozen).run(), whole)


# -- stock pruners and samplers ----------------------------------------------------------------------------------------


def in_lockstep(table: NDArray[np.float64], pruner: optuna.pruners.BasePruner, slots: int) -> dict[int, int]:
    """Chunks of each trial in a plain Optuna loop: all of a round report, then each is asked, in trial order."""
    # Hyperband takes a trial's bracket from the study's name.
    sampler = optuna.samplers.RandomSampler(seed=0)
    study = optuna.create_study(sampler=sampler, pruner=pruner, study_name="replay")
    live: list[optuna.Trial] = []
    done: dict[int, int] = {}
    while len(done) < len(table) or live:
        while len(live) < slots and len(done) < len(table):
            live.append(study.ask())
            done[live[-1].number] = 0
        for trial in live:
            done[trial.number] += 1
            trial.report(float(table[trial.number, done[trial.number] - 1]), step=done[trial.number])
        ended = [trial for trial in live if done[trial.number] == table.shape[1]]
        pruned = [trial for trial in live if trial not in ended and trial.should_prune()]
        for trial in live:
            if trial in ended:
                study.tell(trial, float(table[trial.number, -1]))
            elif trial in pruned:
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        live = [trial for trial in live if trial not in ended and trial not in pruned]
    return done


@pytest.mark.parametrize(
    "pruner",
    [
        lambda: optuna.pruners.MedianPruner(n_startup_trials=3),
        lambda: optuna.pruners.PercentilePruner(25.0, n_startup_trials=2),
        lambda: optuna.pruners.SuccessiveHalvingPruner(),
        lambda: optuna.pruners.HyperbandPruner(min_resource=1, max_resource=9, reduction_factor=3),
        lambda: optuna.pruners.PatientPruner(optuna.pruners.MedianPruner(n_startup_trials=2), patience=0),
    ],
)  # fmt: skip
def test_stock_pruners_do_what_they_do_in_a_plain_loop(pruner: Callable[[], optuna.pruners.BasePruner]) -> None:
    table = curves(24, 9, seed=3)
    expected = in_lockstep(table, pruner(), 4)
    result = replay(table, pruner(), slots=4)
    assert {row: int(chunks) for row, chunks in enumerate(result.resource)} == expected
    assert 0 < len(result.stopped) < 24


def test_a_sampler_takes_the_nearest_row_that_is_left() -> None:
    params = [{"x": float(x)} for x in np.linspace(0, 1, 9)]

    class Middle(optuna.samplers.RandomSampler):
        def sample_independent(self, study: Any, trial: Any, name: str, distribution: Any) -> float:
            return 0.51

    result = replay(curves(9, 2), Nop(), slots=1, sampler=Middle(), params=params)
    assert result.order[:3] == (4, 5, 3)
    assert sorted(result.order) == list(range(9))


def test_the_study_knows_what_the_sampler_may_learn_from() -> None:
    seen: list[list[tuple[dict[str, Any], dict[int, float], dict[str, Any]]]] = []

    class Spy(optuna.samplers.RandomSampler):
        def before_trial(self, study: optuna.Study, trial: Any) -> None:
            trials = study.get_trials()[:-1]
            seen.append([(t.params, t.intermediate_values, t.user_attrs) for t in trials])

    table = curves(3, 2)
    params: list[dict[str, Any]] = [{"r": 4, "name": "a"}, {"r": 8, "name": "b"}, {"r": 16, "name": "a"}]
    order = replay(table, Nop(), slots=1, sampler=Spy(seed=0), params=params, costs=[1.0, 2.0, 4.0]).order
    assert seen[2] == [
        (params[row], {1: table[row, 0], 2: table[row, 1]}, {COST_ATTR: (1.0, 2.0, 4.0)[row]}) for row in order[:2]
    ]


def test_the_space_around_recorded_parameters() -> None:
    params = [
        {"lr": np.float32(1e-4), "r": np.int64(4), "name": "a", "flag": True, "same": 1, "warmup": 0.0},
        {"lr": np.float32(1e-2), "r": np.int64(64), "name": "b", "flag": False, "same": 1, "warmup": 0.1},
    ]
    kinds = {name: (type(d).__name__, getattr(d, "log", None)) for name, d in space_of(params).items()}
    assert kinds == {
        "lr": ("FloatDistribution", True),
        "r": ("IntDistribution", False),
        "name": ("CategoricalDistribution", None),
        "flag": ("CategoricalDistribution", None),
        "warmup": ("FloatDistribution", False),
    }
    assert sorted(RowSampler(None, params, [0, 1]).space) == sorted(kinds)


@pytest.mark.parametrize("policy", [Nop(), ASHA()])
def test_constant_parameters_leave_nothing_to_sample(policy: Policy) -> None:
    sampler = optuna.samplers.TPESampler(seed=0)
    result = replay(curves(4, 3), policy, sampler=sampler, params=[{"lr": 0.1}] * 4)
    assert result.order == (0, 1, 2, 3)


# -- bad input, imports, size ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"curves": [1.0, 2.0]}, r"`curves` must have the axes \(trials, chunks\), got the shape \(2,\)"),
        ({"curves": [[1.0, 2.0], [3.0]]}, r"`curves` must be a table of numbers with the axes \(trials, chunks\)"),
        ({"curves": [["a", "b"]]}, "`curves` must be a table of numbers"),
        ({"scores": [[[1.0, 2.0], [1.0]]] * 3}, "`scores` must be a table of numbers"),
        ({"costs": [[1.0, 2.0], [1.0], [1.0]]}, "`costs` must be a table of numbers"),
        ({"curves": np.zeros((0, 4))}, "`curves` must hold at least one trial and one chunk"),
        ({"curves": np.zeros((4, 0))}, "`curves` must hold at least one trial and one chunk"),
        ({"slots": 0}, "`slots` must be an integer >= 1, got 0"),
        ({"slots": 1.5}, "`slots` must be an integer >= 1, got 1.5"),
        ({"slots": True}, "`slots` must be an integer >= 1, got True"),
        ({"n_trials": 0}, "`n_trials` must be an integer >= 1, got 0"),
        ({"max_alive": 0}, "`max_alive` must be an integer >= 1, got 0"),
        ({"budget": 0.0}, "`budget` must be > 0, got 0.0"),
        ({"budget": "12"}, "`budget` must be > 0, got '12'"),
        ({"budget": math.nan}, "`budget` must be > 0, got nan"),
        ({"seed": -1}, "`seed` must be an integer >= 0, got -1"),
        ({"seed": None}, "`seed` must be an integer >= 0, got None"),
        ({"scores": np.zeros((3, 2))}, r"`scores` must have the axes \(trials, chunks, examples\)"),
        ({"scores": np.zeros((3, 9, 2))}, r"`scores` must begin with the shape \(3, 2\)"),
        ({"costs": [1.0, 2.0]}, r"`costs` must begin with the shape \(3,\)"),
        ({"costs": np.ones((3, 9))}, r"`costs` must begin with the shape \(3, 2\)"),
        ({"costs": 1.0}, r"`costs` must have the axes \(trials, chunks\)"),
        ({"costs": [1.0, 2.0, -1.0]}, "`costs` must be finite and >= 0"),
        ({"costs": [1.0, 2.0, math.nan]}, "`costs` must be finite and >= 0"),
        ({"params": [{"r": 4}]}, r"`params` must begin with the shape \(3,\)"),
        (
            {"params": [{"r": 4}, {"r": 8}, {"q": 1}], "sampler": optuna.samplers.RandomSampler()},
            "`params` must all have",
        ),
        ({"params": [{"r": 4}] * 3, "sampler": "tpe"}, "`sampler` must be an Optuna sampler, got 'tpe'"),
        ({"sampler": optuna.samplers.RandomSampler()}, "pass them as `params`"),
        ({"policy": PolicyPruner(ASHA())}, "got a PolicyPruner. Pass its `.policy`"),
        ({"policy": "asha"}, "`policy` must be a rapidfire_policies.Policy or an Optuna pruner, got 'asha'"),
        ({"policy": ASHA}, "`policy` must be a rapidfire_policies.Policy or an Optuna pruner"),
    ],
)
def test_bad_input(given: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"curves": curves(3, 2), "policy": ASHA(), **given}
    with pytest.raises(ValueError, match=message):
        replay(arguments.pop("curves"), arguments.pop("policy"), **arguments)


@pytest.mark.parametrize(
    "code",
    [
        "from rapidfire_automl import replay; import rapidfire_automl.replay",
        "import rapidfire_automl.replay; from rapidfire_automl import replay",
        "from rapidfire_automl.replay import replay",
        "import rapidfire_automl; replay = rapidfire_automl.replay",
        "import rapidfire_automl.replay as module; from rapidfire_automl import replay; module([[1.0]], ASHA())",
    ],
)
def test_replay_can_be_called_whichever_is_imported_first(code: str) -> None:
    code = f"from rapidfire_policies import ASHA; {code}; print(replay([[2.0, 1.0]], ASHA()).chunks)"
    code += "; from rapidfire_automl.replay import hold_last"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert (done.stdout, done.stderr) == ("2\n", "")


@pytest.mark.slow
@pytest.mark.parametrize("slots", [8, 64])
def test_ten_thousand_trials_take_seconds(slots: int) -> None:
    table = curves(10_000, 27)
    begin = time.process_time()
    result = replay(table, ASHA(), slots=slots)
    assert time.process_time() - begin < 30
    assert len(result.order) == 10_000


@dataclass(frozen=True)
class Silent(Policy):
    """Says nothing: what is left is the engine's own work."""

    def decide(self, history: History) -> Mapping[int, Decision]:
        return {}


def test_the_engines_own_time_grows_with_chunks_only() -> None:
    def seconds(trials: int) -> float:
        table = curves(trials, 4)
        begin = time.process_time()
        replay(table, Silent(), slots=8)
        return time.process_time() - begin

    seconds(200)
    small, large = min(seconds(1000) for _ in range(3)), min(seconds(4000) for _ in range(3))
    assert large < 10 * small  # 4 if linear, 16 if quadratic


@pytest.mark.skipif(not CURVES.exists(), reason="the recorded curves of ../shared/data/curves are not here")
def test_on_recorded_curves_the_policy_saves_and_the_full_search_finds_the_best() -> None:
    with np.load(CURVES / "taskset_patch32_gru64_avg_bs128.npz") as file:
        table = hold_last(file["curve"][:64])
    whole, halved = replay(table, Nop()), replay(table, ASHA())
    assert whole.chunks == table.size
    assert whole.selected == table[:, -1].argmin()
    assert halved.chunks < whole.chunks / 5
    assert halved.selected in halved.complete
