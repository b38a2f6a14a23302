"""Search spaces: what `List` and `Range` accept, names, grids and suggestions."""

from __future__ import annotations

import math

import numpy as np
import optuna
import pytest

from rapidfire_automl.space import GRID_LIMIT, List, Range, Space, distributions, grid, is_concrete, suggest


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: List([]), "at least one value"),
        (lambda: List("abc"), r"Write List\(\['abc'\]\)"),
        (lambda: List(3), "must be a list"),
        (lambda: Range("1e-5", 1e-3), r'`start` must be a number, got the string "1e-5"\. Write it without quotes'),
        (lambda: Range(1e-5, "1e-3"), "`end` must be a number"),
        (lambda: Range(0.0, math.inf), "`end` must be finite, got inf"),
        (lambda: Range(math.nan, 1.0), "`start` must be finite, got nan"),
        (lambda: Range(2, 1), r"`start` must be < `end`, got 2 and 1\. Swap them"),
        (lambda: Range(1, 1), "A single value needs no Range"),
        (lambda: Range(0.0, 1.0, log=True), "`start` must be > 0 in a log Range"),
        (lambda: Range(1, 8, log=True, step=2), "`step` and `log` exclude each other"),
        (lambda: Range(1, 8, step=0.5), "Write the ends as floats"),
        (lambda: Range(1, 8, step=0), "`step` must be > 0"),
        (lambda: Range(0.0, 1.0, step=2.0), "<= `end` - `start`"),
        (lambda: Range(0.5, 2, dtype="int"), "`start` must be a whole number"),
        (lambda: Range(1, 2, dtype="double"), '`dtype` must be "int" or "float"'),
        (lambda: Range(True, 2), "`start` must be a number, got True"),
        (lambda: Range(1, 2, log="yes"), "`log` must be True or False"),
    ],
)
def test_bad_input_is_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_whole_ends_stay_whole():
    assert Range(1, 8).distribution == optuna.distributions.IntDistribution(1, 8)
    assert Range(np.int64(1), 8.0, dtype="int").distribution == optuna.distributions.IntDistribution(1, 8)
    assert Range(1, 8, dtype="float").distribution == optuna.distributions.FloatDistribution(1.0, 8.0)
    assert Range(1, 8.0).distribution == optuna.distributions.FloatDistribution(1.0, 8.0)
    assert Range(2, 8, step=2).distribution == optuna.distributions.IntDistribution(2, 8, step=2)
    assert type(suggest({"r": Range(1, 8)}, optuna.trial.FixedTrial({"r": 3}))["r"]) is int


def test_grid_has_every_combination_in_order():
    points = grid(
        {
            "lora": {"r": List([4, 8])},
            "args": {"lr": List([1e-3, 1e-4]), "seed": 1},
            "tags": ["x", List(["a", ""])],
        }
    )
    assert [(p.value["lora"]["r"], p.value["args"]["lr"], p.value["tags"][1]) for p in points] == [
        (r, lr, t) for r in (4, 8) for lr in (1e-3, 1e-4) for t in ("a", "")
    ]
    assert points[0].params == {"r": 4, "lr": 1e-3, "tags[1]": "a"}
    assert all(is_concrete(p.value) for p in points)


def test_a_range_in_a_grid_is_named():
    with pytest.raises(ValueError, match=r"`training_args.lr` is a Range, and a grid needs values\. Write List"):
        grid({"training_args": {"lr": Range(1e-5, 1e-3)}})
    with pytest.raises(ValueError, match=r"`peft.r` is a Range"):
        grid({"peft": List([{"r": Range(1, 8)}])})


def test_a_huge_grid_is_refused_without_building_it():
    with pytest.raises(ValueError, match=f"more than {GRID_LIMIT}"):
        grid({f"x{i}": List(range(10)) for i in range(12)})


def test_names_are_short_where_unambiguous():
    space = {"a": {"lr": Range(0.1, 1.0), "beta": List([1, 2])}, "b": {"beta": List([1, 2])}}
    assert list(distributions(space)) == ["lr", "a.beta", "b.beta"]


def test_members_share_a_name_only_for_the_same_offer():
    same = {"peft": List([{"r": List([4, 8]), "m": "q"}, {"r": List([4, 8]), "m": "v"}])}
    assert list(distributions(same)) == ["peft", "r"]
    assert distributions(same)["peft"].choices == ("m=q", "m=v")
    other = {"peft": List([{"r": List([4, 8])}, {"r": Range(1, 4)}])}
    assert list(distributions(other)) == ["peft", "peft[0].r", "peft[1].r"]


def test_a_list_in_a_list_has_a_name_of_its_own():
    space = Space({"x": List([List([1, 2]), List([3, 4])])})
    assert sorted(space.distributions()) == ["x", "x[0]", "x[1]"]
    assert [p.value["x"] for p in space.grid()] == [1, 2, 3, 4]


def test_a_list_at_the_root_is_called_config():
    space = Space(List([{"lr": 1.0}, {"lr": Range(2.0, 3.0)}]))
    assert list(space.distributions()) == ["config", "lr"]
    label = space.distributions()["config"].choices[1]
    assert space.suggest(optuna.trial.FixedTrial({"config": label, "lr": 2.5})) == {"lr": 2.5}


@pytest.mark.parametrize(
    "values",
    [
        [["q_proj", "v_proj"], ["q_proj", "k_proj"]],
        [True, 1, 1.0],
        [{"a": 1}, {"a": 2}],
        [len, max],
        [lambda row: row, lambda row: row],
        [object(), object()],
        ["x" * 100, {"k": "x" * 100}],
        [None, "none"],
        [math.nan, 1.0],
        [[], {}],
        [1, 1],
    ],
)
def test_any_value_can_be_a_choice(values):
    space = {"x": List(values)}
    choices = distributions(space)["x"].choices
    assert len(set(map(repr, choices))) == len(values)
    assert all(c is None or isinstance(c, (bool, int, float, str)) for c in choices)
    assert not any(" at 0x" in str(c) for c in choices)
    study = optuna.create_study()
    for params in (p.params for p in grid(space)):
        study.enqueue_trial(params)
    drawn = [suggest(space, study.ask())["x"] for _ in values]
    assert [id(d) for d in drawn] == [id(v) for v in values]


def test_every_grid_point_can_be_enqueued():
    space = Space(
        List([{"lora": List([{"r": List([4, 8])}, {"r": List([16])}]), "lr": List([1e-3, 1e-4])}, {"lr": List([1.0])}])
    )
    points = space.grid()
    assert len(points) == 7
    study = optuna.create_study()
    for point in points:
        study.enqueue_trial(point.params)
    for point in points:
        trial = study.ask()
        assert space.suggest(trial) == point.value
        assert trial.params == point.params


def test_suggestions_follow_the_sampler_seed():
    space = Space({"lr": Range(1e-5, 1e-1, log=True), "r": List([4, 8, 16]), "warm": Range(0, 10, step=5)})

    def draw():
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=3))
        return [space.suggest(study.ask()) for _ in range(20)]

    first = draw()
    assert first == draw()
    assert {p["warm"] for p in first} == {0, 5, 10}
    assert all(1e-5 <= p["lr"] <= 1e-1 for p in first)


def test_a_concrete_value_comes_back_untouched():
    value = {"a": [1, {"b": object()}]}
    assert suggest(value, optuna.trial.FixedTrial({})) is value
    assert [p.value for p in grid(value)] == [value]
