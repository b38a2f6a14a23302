"""The races on per-example scores: by hand, by enumeration, and 300 null simulations that alpha must hold in."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import optimize, stats

from rapidfire_policies import (
    BettingRace,
    Decision,
    History,
    NonInferior,
    PairedRace,
    Policy,
    TrialHistory,
    TrialState,
    Wilcoxon,
    betting_race,
    paired_race,
)
from rapidfire_policies.betting_race import log_capitals
from rapidfire_policies.paired import spent
from rapidfire_policies.paired_race import lower_bounds
from rapidfire_policies.wilcoxon import p_values

RACES = [PairedRace(), BettingRace(), Wilcoxon(), NonInferior()]


def trial(number: int, *scores: Sequence[float] | NDArray[np.float64], **fields: object) -> TrialHistory:
    """A trial whose values are the means of its scores, a row of scores a chunk."""
    rows = tuple(np.asarray(row, dtype=float) for row in scores)
    return TrialHistory(number, tuple(float(row.mean()) for row in rows), scores=rows, **fields)  # type: ignore[arg-type]


def verdicts(policy: Policy, *trials: TrialHistory, chunks: int = 4) -> dict[int, str]:
    return {n: str(d.verdict) for n, d in policy.decide(History(trials, chunks, slots=len(trials))).items()}


def stopped(decisions: Mapping[int, Decision]) -> set[int]:
    return {number for number, decision in decisions.items() if decision.verdict == "stop"}


# -- PairedRace ----------------------------------------------------------------------------------------------------


def test_a_bound_is_student_s_where_the_tail_is_on_the_right() -> None:
    """Twenty-four zeros and a five: mean 0.2, standard deviation 1, skewness 4.7."""
    differences = np.array([[0.0] * 24 + [5.0]])
    expected = 0.2 - stats.t.isf(0.05, 24) * 1.0 / 5
    assert lower_bounds(differences, 0.05) == pytest.approx([expected], rel=1e-6)


@pytest.mark.parametrize("level", [0.05, 0.001])
def test_a_bound_solves_hall_s_equation(level: float) -> None:
    differences = 1 - np.random.default_rng(0).standard_exponential((3, 60))
    for d, bound in zip(differences, lower_bounds(differences, level), strict=True):
        n, s = len(d), d.std(ddof=1)
        g = min(0.0, 1.5 * float(stats.skew(d)) - math.sqrt(6 / n))

        def excess(lower: float, d: NDArray[np.float64] = d, s: float = s, g: float = g, n: int = n) -> float:
            m = (d.mean() - lower) / s
            return m + g * m**2 / 3 + g**2 * m**3 / 27 + g / (6 * n) - stats.t.isf(level, n - 1) / math.sqrt(n)

        assert bound == pytest.approx(optimize.brentq(excess, d.mean() - 99 * s, d.mean() + s), abs=1e-9)


def test_a_longer_left_tail_lowers_the_bound() -> None:
    even = np.tile([-1.0, 1.0], 25)
    tail = np.sort(np.r_[[-6.0], np.full(49, 6 / 49)])
    bounds = lower_bounds(np.stack([even, tail / tail.std()]), 0.01)
    assert bounds[1] < bounds[0] < -stats.t.isf(0.01, 49) / math.sqrt(49)


@pytest.mark.parametrize(("examples", "level", "judged"), [(19, 0.1, False), (20, 0.1, True), (20, 0.005, False)])
def test_few_examples_bound_nothing(examples: int, level: float, judged: bool) -> None:
    assert math.isfinite(lower_bounds(np.ones((1, examples)), level)[0]) == judged


def test_paired_race_stops_who_is_surely_worse_than_the_best() -> None:
    rng = np.random.default_rng(0)
    base, noise = rng.normal(size=200), rng.normal(size=(3, 200)) * 0.1
    trials = [trial(0, base), trial(1, base + 0.05 + noise[0]), trial(2, base + 0.005 + noise[1])]
    decisions = PairedRace().decide(History(tuple(trials), chunks=4))
    assert stopped(decisions) == {1}
    assert decisions[0].reason == "chunk 1: best of 3"
    assert decisions[1].reason.startswith("chunk 1: against trial 0, worse by 0.04")
    assert decisions[1].reason.endswith("(200 examples, level 0.0063)")


def test_alpha_is_spent_over_chunks_and_over_all_who_ever_reported() -> None:
    ended = TrialHistory(2, (0.5,), TrialState.STOPPED)
    silent = TrialHistory(3)
    two = [trial(0, np.zeros(30), np.zeros(30)), trial(1, np.zeros(30), np.ones(30))]
    assert spent(0.1, History((*two, ended, silent), chunks=5)) == pytest.approx(0.1 / (5 * 2))
    assert spent(0.1, History(tuple(two), chunks=5)) == pytest.approx(0.1 / 5)
    assert spent(0.1, History((), chunks=5)) == pytest.approx(0.1 / 5)


@pytest.mark.parametrize("state", [s for s in TrialState if s is not TrialState.RUNNING])
@pytest.mark.parametrize("policy", RACES[:3], ids=repr)
def test_a_rival_counts_whatever_became_of_it(policy: Policy, state: TrialState) -> None:
    best = trial(0, np.zeros(40), state=state)
    decisions = policy.decide(History((best, trial(1, np.full(40, 0.5)), trial(2, np.zeros(40))), chunks=4))
    assert stopped(decisions) == {1}
    assert "against trial 0" in decisions[1].reason


# -- BettingRace ---------------------------------------------------------------------------------------------------


def test_capital_by_hand() -> None:
    """Four wins of 1 at level 1/2: 2 ln 2 / 4 = 0.3466; second moments 1/4, 5/8, 3/4, 13/16; the first bet is capped."""
    bets = [0.9] + [math.sqrt(math.log(2) / 2 / v) for v in (5 / 8, 3 / 4, 13 / 16)]
    paths = log_capitals(np.array([[1.0, 1.0, 1.0, 1.0], [1.0, -1.0, 0.0, 1.0]]), 0.5)
    assert np.exp(paths[0]) == pytest.approx(np.cumprod([1 + bet for bet in bets]))
    assert bets == pytest.approx([0.9, 0.7447, 0.6798, 0.6532], abs=1e-4)
    # The second row's second moments are 1/4, 5/8, 9/12, 9/16.
    assert math.exp(paths[1, 1]) == pytest.approx(1.9 * (1 - bets[1]))
    assert math.exp(paths[1, 3]) == pytest.approx(1.9 * (1 - bets[1]) * (1 + math.sqrt(math.log(2) / 2 / (9 / 16))))


@pytest.mark.parametrize("level", [0.3, 0.05, 0.001])
@pytest.mark.parametrize(("win", "lose"), [(0.5, 0.5), (0.1, 0.1), (0.02, 0.02), (0.2, 0.3), (0.0, 0.4)])
def test_betting_is_exact_by_enumeration(level: float, win: float, lose: float) -> None:
    """All 3**7 outcomes of seven paired binary examples: no gain in expectation, 1 / a reached with chance <= a."""
    outcomes = np.array(list(itertools.product([1.0, 0.0, -1.0], repeat=7)))
    chances = np.prod(np.where(outcomes == 1, win, np.where(outcomes == -1, lose, 1 - win - lose)), axis=1)
    paths = log_capitals(outcomes, level)
    expectation = chances @ np.exp(paths)
    if win == lose:
        assert expectation == pytest.approx(np.ones(7))
    assert (expectation <= 1 + 1e-12).all()
    for a in {level, 0.3, 0.1}:
        assert chances @ (paths.max(axis=1) >= -math.log(a)) <= a


@pytest.mark.parametrize("rare", [0.5, 0.1, 0.01])
def test_betting_is_exact_for_skewed_differences(rare: float) -> None:
    """Often a little worse, rarely far better, in the mean equal: where a studentised mean errs."""
    small = rare / (1 - rare)
    outcomes = np.array(list(itertools.product([small, -1.0], repeat=10)))
    chances = np.prod(np.where(outcomes < 0, rare, 1 - rare), axis=1)
    paths = log_capitals(outcomes, 0.05)
    assert chances @ np.exp(paths) == pytest.approx(np.ones(10))
    assert chances @ (paths.max(axis=1) >= math.log(20)) <= 0.05


def test_betting_race_of_few_examples() -> None:
    """Ten of ten: 2 trials, 1 chunk, so the capital has to reach 20."""
    right, wrong = np.zeros(10), np.ones(10)
    assert verdicts(BettingRace(), trial(0, right), trial(1, wrong), chunks=1) == {0: "continue", 1: "stop"}
    assert verdicts(BettingRace(), trial(0, right[:3]), trial(1, wrong[:3]), chunks=1)[1] == "continue"


def test_the_sign_of_bounded_scores_plays_no_part_and_wider_bounds_cost_power() -> None:
    scores = [trial(0, -np.ones(12)), trial(1, np.zeros(12))]
    assert verdicts(BettingRace(), *scores) == {0: "continue", 1: "stop"}
    assert verdicts(BettingRace(low=-5, high=5), *scores)[1] == "continue"


def test_scores_beyond_the_bounds_are_not_judged_and_the_reason_says_so() -> None:
    decisions = BettingRace().decide(History((trial(0, np.zeros(50)), trial(1, np.full(50, 2.5))), chunks=4))
    assert str(decisions[1].verdict) == "continue"
    assert decisions[1].reason == (
        "chunk 1: against trial 0, a difference of 2.5 is beyond `high` - `low` = 1: not judged"
    )


# -- Wilcoxon ------------------------------------------------------------------------------------------------------


def test_wilcoxon_by_hand_and_as_scipy_has_it() -> None:
    # Of the 32 signs of five ranks one puts all on the positive side, two more reach 14.
    assert p_values(np.array([[1.0, 2, 3, 4, 5], [-1.0, 2, 3, 4, 5]])) == pytest.approx([1 / 32, 2 / 32])
    assert p_values(np.zeros((1, 8))) == pytest.approx([0.5])
    rng = np.random.default_rng(0)
    for differences in (rng.normal(size=(3, 30)), rng.normal(size=(3, 80)), rng.integers(-1, 3, (3, 60)).astype(float)):
        method = "exact" if differences.shape[1] == 30 else "approx"
        reference = stats.wilcoxon(differences, axis=1, alternative="greater", zero_method="zsplit", method=method)
        assert p_values(differences) == pytest.approx(reference.pvalue)


# -- NonInferior ---------------------------------------------------------------------------------------------------


def generations(*rows: tuple[int, float, float], chunks: int = 6, examples: int = 300) -> dict[int, str]:
    """Verdicts on trials (number, cost, lead over trial 0's score), with a little noise."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=examples)
    trials = [trial(n, base + lead + 0.01 * rng.normal(size=examples), costs=(cost,)) for n, cost, lead in rows]
    return verdicts(NonInferior(margin=0.05), *trials, chunks=chunks)


def test_of_equals_the_cheaper_stays() -> None:
    assert generations((8, 8, 0.0), (16, 16, 0.0)) == {8: "continue", 16: "stop"}
    assert generations((8, 8, 0.0), (16, 16, -0.03)) == {8: "continue", 16: "stop"}
    assert generations((8, 8, 0.0), (16, 16, -0.06)) == {8: "continue", 16: "continue"}
    # A cheap one that is worse is no reason to keep it waiting, nor to stop the other.
    assert generations((4, 4, 0.3), (8, 8, 0.0), (16, 16, 0.0)) == {4: "continue", 8: "continue", 16: "stop"}


def test_equal_within_the_margin_does_not_chain_within_a_chunk() -> None:
    """2 takes 4's place; 8 is within the margin of 4, but not of 2, which stays."""
    assert generations((2, 2, 0.0), (4, 4, -0.04), (8, 8, -0.08)) == {2: "continue", 4: "stop", 8: "continue"}


def test_without_costs_or_with_equal_ones_nobody_is_dropped() -> None:
    assert generations((0, 8, 0.0), (1, 8, 0.0)) == {0: "continue", 1: "continue"}
    decisions = NonInferior().decide(History((trial(0, np.zeros(50)), trial(1, np.zeros(50), costs=(4.0,))), chunks=4))
    assert [decisions[number].reason for number in (0, 1)] == [
        "chunk 1: no costs recorded",
        "chunk 1: no cheaper trial to compare with",
    ]


def test_more_than_the_margin_is_given_up_with_chance_alpha_at_most() -> None:
    """The cheap trial is worse by just the margin."""
    rng = np.random.default_rng(0)
    errors = 0
    for _ in range(300):
        dear = rng.normal(size=50)
        trials = (trial(0, dear + 0.5 + rng.normal(size=50), costs=(1.0,)), trial(1, dear, costs=(2.0,)))
        errors += verdicts(NonInferior(margin=0.5, alpha=0.1), *trials, chunks=1)[1] == "stop"
    assert lower_99(errors, 300) <= 0.1
    assert errors > 10


@pytest.mark.parametrize("state", [TrialState.STOPPED, TrialState.FAILED])
def test_a_cheaper_trial_that_has_ended_takes_nobody_s_place(state: TrialState) -> None:
    ended = trial(0, np.zeros(50), costs=(1.0,), state=state)
    assert verdicts(NonInferior(), ended, trial(1, np.zeros(50), costs=(2.0,))) == {1: "continue"}


# -- what they share -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", RACES, ids=repr)
def test_unequal_example_sets_are_an_error_that_names_the_trials(policy: Policy) -> None:
    trials = (trial(3, np.zeros(30)), trial(5, np.zeros(20)), trial(7, np.zeros(30)))
    message = r"`scores` must hold the same examples .* at chunk 1 they hold 20 \(trial 5\), 30 \(trials 3, 7\)"
    with pytest.raises(ValueError, match=message):
        policy.decide(History(trials, chunks=4))


@pytest.mark.parametrize("policy", RACES, ids=repr)
def test_trials_without_scores_are_left_alone(policy: Policy) -> None:
    trials = (trial(0, np.zeros(40)), TrialHistory(1, (9.0,)), TrialHistory(2, (9.0,), scores=(np.full(40, math.nan),)))
    assert set(verdicts(policy, *trials).values()) == {"continue"}


@pytest.mark.parametrize("policy", RACES, ids=repr)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_diverged_trial_is_stopped_and_no_rival(policy: Policy, bad: float) -> None:
    trials = (trial(0, np.full(40, bad)), trial(1, np.ones(40)), TrialHistory(2, (bad,), TrialState.PAUSED))
    assert verdicts(policy, *trials) == {0: "stop", 1: "continue", 2: "stop"}


@pytest.mark.parametrize("policy", RACES, ids=repr)
def test_paused_trials_are_resumed_unjudged(policy: Policy) -> None:
    trials = (trial(0, np.zeros(40), costs=(1.0,)), trial(1, np.ones(40), state=TrialState.PAUSED, costs=(2.0,)))
    assert verdicts(policy, *trials) == {0: "continue", 1: "continue"}


@pytest.mark.parametrize("cls", [PairedRace, BettingRace, Wilcoxon, NonInferior])
@pytest.mark.parametrize("alpha", [0, 1, -0.1, 5, math.nan, True, "0.05"])
def test_bad_alpha(cls: type[Policy], alpha: object) -> None:
    with pytest.raises(ValueError, match="`alpha` must be a number between 0 and 1, got "):
        cls(alpha=alpha)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("low", "high"), [(1.0, 1.0), (1.0, 0.0), (0.0, math.inf), (math.nan, 1.0), ("0", 1.0), (0.0, None)]
)
def test_bad_bounds(low: object, high: object) -> None:
    with pytest.raises(ValueError, match="`low` and `high` must be finite"):
        BettingRace(low=low, high=high)  # type: ignore[arg-type]


@pytest.mark.parametrize("margin", [-0.1, math.inf, math.nan, "0.1", None])
def test_bad_margin(margin: object) -> None:
    with pytest.raises(ValueError, match="`margin` must be a number >= 0, got "):
        NonInferior(margin=margin)  # type: ignore[arg-type]


# -- 300 null simulations ------------------------------------------------------------------------------------------

NULLS = [
    (PairedRace(alpha=0.1), "normal", 2, 10, 20),
    (PairedRace(alpha=0.1), "skewed", 16, 3, 50),
    (BettingRace(alpha=0.1), "binary", 2, 10, 40),
    (BettingRace(alpha=0.1), "binary", 16, 3, 40),
]


def false_eliminations(policy: Policy, kind: str, trials: int, chunks: int, examples: int, searches: int = 300) -> int:
    """Of searches over equal trials, how many stop trial 0; chunks are independent looks, the hardest case."""
    rng = np.random.default_rng(0)
    errors = 0
    for _ in range(searches):
        if kind == "binary":
            scores = rng.integers(0, 2, (trials, chunks, examples)).astype(float)
        else:
            drawn = rng.normal(size=(trials, chunks, examples))
            scores = drawn if kind == "normal" else rng.standard_exponential(drawn.shape) - 1
            scores[0] = 0.0
        for chunk in range(1, chunks + 1):
            history = History(tuple(trial(i, *scores[i, :chunk]) for i in range(trials)), chunks, slots=trials)
            if 0 in stopped(policy.decide(history)):
                errors += 1
                break
    return errors


def lower_99(errors: int, searches: int) -> float:
    """Clopper and Pearson's one-sided lower bound of a rate."""
    return float(stats.beta.ppf(0.01, errors, searches - errors + 1)) if errors else 0.0


@pytest.mark.parametrize(("policy", "kind", "trials", "chunks", "examples"), NULLS)
def test_a_best_trial_is_stopped_with_chance_alpha_at_most(
    policy: Policy, kind: str, trials: int, chunks: int, examples: int
) -> None:
    assert lower_99(false_eliminations(policy, kind, trials, chunks, examples), 300) <= 0.1


@pytest.mark.parametrize(("policy", "kind", "trials", "chunks", "examples"), NULLS)
def test_alpha_unspent_is_alpha_broken(
    policy: Policy, kind: str, trials: int, chunks: int, examples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The simulation above can fail: with alpha for every test it does."""
    monkeypatch.setattr(paired_race, "spent", lambda alpha, history: alpha)
    monkeypatch.setattr(betting_race, "spent", lambda alpha, history: alpha)
    assert lower_99(false_eliminations(policy, kind, trials, chunks, examples, searches=100), 100) > 0.1
