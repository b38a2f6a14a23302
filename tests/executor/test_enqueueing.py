"""Values that people give: which are taken, and what is said of the others."""

from __future__ import annotations

from typing import Any

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from rapidfire_automl.control import ControlError
from rapidfire_automl.executor.enqueueing import fit

KNOWN = {
    "learning_rate": FloatDistribution(1e-5, 1e-2, log=True),
    "peft_config.r": IntDistribution(4, 64),
    "lora_alpha": CategoricalDistribution([8, 16]),
    "lora_dropout": FloatDistribution(0.0, 0.5),
    "shift": FloatDistribution(-1.0, 1.0),
}
LEARNING_RATE = "`learning_rate` must be a number > 0 (the search space: 1e-05 to 0.01), got"
RANK = "`peft_config.r` must be a whole number >= 1 (the search space: 4 to 64), got"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"learning_rate": "abc"}, f"{LEARNING_RATE} 'abc'."),
        ({"learning_rate": "1e-4"}, f"{LEARNING_RATE} '1e-4'. Write it without quotes."),
        ({"learning_rate": "/0"}, f"{LEARNING_RATE} '/0'."),
        ({"learning_rate": True}, f"{LEARNING_RATE} True."),
        ({"learning_rate": 0}, f"{LEARNING_RATE} 0."),
        ({"learning_rate": -1e-4}, f"{LEARNING_RATE} -0.0001."),
        ({"weight_decay": -0.1}, "`weight_decay` must be a number >= 0, got -0.1."),
        ({"r": 0}, f"{RANK} 0."),
        ({"r": 1.5}, f"{RANK} 1.5."),
        ({"r": -8}, f"{RANK} -8."),
        ({"r": "eight"}, f"{RANK} 'eight'."),
        ({"r": [8]}, f"{RANK} [8]."),
        ({"r": "/64"}, f"{RANK} 0.5."),
        (
            {"lora_dropout": 1.5},
            "`lora_dropout` must be a number >= 0 and <= 1 (the search space: 0.0 to 0.5), got 1.5.",
        ),
        ({"lora_alpha": 9}, "`lora_alpha` must be one of 8, 16, got 9."),
        ({"shift": "far"}, "`shift` must be a number (the search space: -1.0 to 1.0), got 'far'."),
        ({"shift": float("inf")}, "`shift` must be a number (the search space: -1.0 to 1.0), got inf."),
        ({"r": 8, "peft_config.r": 16}, "`peft_config.r` is given twice, as 8 and as 16. Leave one out."),
        ({"num_train_epochs": 0}, "`num_train_epochs` must be a number > 0, got 0."),
    ],
)
def test_impossible_values_are_refused_by_name_and_range(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ControlError) as caught:
        fit(changes, KNOWN, "the search", strict=False, source={"peft_config.r": 32})
    assert str(caught.value) == says


def test_a_factor_can_lead_nowhere() -> None:
    with pytest.raises(ControlError, match=r"`shift` must be a number .*, got inf\."):
        fit({"shift": "*1e300"}, KNOWN, "trial 0", strict=True, source={"shift": 1e300})


def test_values_outside_the_search_space_are_taken_and_told() -> None:
    given = {"learning_rate": 0.5, "r": 128, "shift": -2, "logging_steps": 3}
    fitted, notes = fit(given, KNOWN, "the search", strict=False)
    assert fitted == {"learning_rate": 0.5, "peft_config.r": 128, "shift": -2.0, "logging_steps": 3}
    assert [note.partition(" is outside")[0] for note in notes] == [
        "`learning_rate` = 0.5",
        "`peft_config.r` = 128",
        "`shift` = -2.0",
    ]


def test_what_the_search_space_has_is_possible() -> None:
    """A user's own parameter may have the name of a field."""
    known = {"learning_rate": FloatDistribution(-5.0, -2.0)}
    assert fit({"learning_rate": -4.0}, known, "the search", strict=True) == ({"learning_rate": -4.0}, [])
