"""How requests are split into passes, and which plan a calibration speaks for."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rapidfire_automl.plan import Plan, choose


@dataclass(frozen=True)
class Request:
    number: int
    rows: int
    width: int


sizes = st.lists(st.tuples(st.integers(1, 6), st.sampled_from([1, 7, 8, 16, 16, 17, 64])), max_size=12)
requests_ = sizes.map(lambda found: [Request(i, rows, width) for i, (rows, width) in enumerate(found)])
plans = st.builds(
    Plan,
    budget_tokens=st.sampled_from([1, 16, 100, 256, 10_000]),
    trials_per_pass=st.sampled_from([None, 1, 2, 3]),
    max_padding=st.sampled_from([1.0, 1.35, 10.0]),
)


def padded(group: list[Request]) -> int:
    return sum(request.rows for request in group) * max(request.width for request in group)


@given(requests_, plans)
def test_every_request_goes_into_one_pass(requests: list[Request], plan: Plan) -> None:
    passes = plan.split(requests)
    assert sorted(request.number for group in passes for request in group) == [r.number for r in requests]
    assert all(group for group in passes)


@given(requests_, plans)
def test_a_pass_keeps_the_given_order(requests: list[Request], plan: Plan) -> None:
    for group in plan.split(requests):
        assert [request.number for request in group] == sorted(request.number for request in group)


@given(requests_, plans)
def test_the_limits_hold_for_every_pass_of_several_trials(requests: list[Request], plan: Plan) -> None:
    for group in plan.split(requests):
        if len(group) == 1:
            continue
        assert padded(group) <= plan.budget_tokens
        assert padded(group) <= plan.max_padding * sum(r.rows * r.width for r in group)
        assert plan.trials_per_pass is None or len(group) <= plan.trials_per_pass


@given(requests_, plans)
def test_the_same_requests_are_always_split_the_same_way(requests: list[Request], plan: Plan) -> None:
    assert plan.split(requests) == plan.split(list(requests))


@given(requests_, plans)
def test_a_smaller_budget_never_needs_fewer_passes_of_equal_requests(requests: list[Request], plan: Plan) -> None:
    equal = [Request(request.number, 2, 16) for request in requests]
    assert len(plan.halved().split(equal)) >= len(plan.split(equal))


def test_equal_requests_fill_a_pass_up_to_the_budget() -> None:
    requests = [Request(i, 2, 16) for i in range(8)]
    assert [len(group) for group in Plan(budget_tokens=96).split(requests)] == [3, 3, 2]
    assert len(Plan(budget_tokens=256).split(requests)) == 1
    assert [len(group) for group in Plan(budget_tokens=256, trials_per_pass=1).split(requests)] == [1] * 8


def test_requests_of_similar_width_go_together() -> None:
    requests = [Request(0, 1, 64), Request(1, 1, 8), Request(2, 1, 60), Request(3, 1, 8)]
    passes = Plan(budget_tokens=10_000).split(requests)
    assert [[request.number for request in group] for group in passes] == [[1, 3], [0, 2]]


def test_a_request_larger_than_the_budget_gets_a_pass_of_its_own() -> None:
    requests = [Request(0, 4, 64), Request(1, 1, 60)]
    assert sorted(len(group) for group in Plan(budget_tokens=100).split(requests)) == [1, 1]


def test_halving_ends_at_one_token() -> None:
    plan = Plan(budget_tokens=5)
    assert [plan := plan.halved() for _ in range(4)][-1].budget_tokens == 1
    assert "out of memory" in plan.reason


@given(plans)
def test_a_recorded_plan_is_replayed(plan: Plan) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        plan.save(path)
        assert Plan.load(path) == plan


def test_a_calibrated_plan_is_recorded_whole(tmp_path: Path) -> None:
    plan = choose([(16, 100.0), (64, 300.0), (256, 290.0)])
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "7", '{"budget": 3}', '{"budget_tokens": "many"}', '{"budget_tokens": 0}']
)
def test_a_file_that_is_no_plan_says_so(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="must be"):
        Plan.load(path)


def test_a_missing_plan_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`plan` must be a recorded plan \(plan.json\), could not read"):
        Plan.load(tmp_path / "nothing.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget_tokens": 0}, "`budget_tokens` must be >= 1, got 0."),
        ({"trials_per_pass": 0}, "`trials_per_pass` must be >= 1 or None, got 0."),
    ],
)
def test_a_plan_out_of_range(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan(**arguments)  # type: ignore[arg-type]


def test_choose_takes_the_smallest_size_that_is_about_as_fast_as_the_best() -> None:
    measured = ((16, 100.0), (64, 200.0), (256, 297.0), (1024, 300.0), (4096, 250.0))
    plan = choose(measured)
    assert (plan.budget_tokens, plan.trials_per_pass) == (256, None)
    assert "3.0x" in plan.reason
    assert plan.tokens_per_s == measured


def test_choose_gives_each_trial_a_pass_of_its_own_where_fusing_gains_nothing() -> None:
    plan = choose([(16, 300.0), (64, 280.0), (256, 290.0)])
    assert plan.trials_per_pass == 1
    assert "one trial per pass" in plan.reason


def test_choose_says_when_the_best_is_the_largest_measured() -> None:
    assert "the largest size measured" in choose([(16, 100.0), (64, 300.0)]).reason


def test_choose_without_measurements() -> None:
    assert choose([]) == Plan(reason="not calibrated")


def test_a_plan_is_readable_json(tmp_path: Path) -> None:
    Plan(budget_tokens=64).save(tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text())["budget_tokens"] == 64
