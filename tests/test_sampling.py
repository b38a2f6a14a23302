"""How an evaluation samples."""

from __future__ import annotations

import pytest

from rapidfire_automl import Sampling


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"num_generations": 0}, "`num_generations`"),
        ({"num_generations": 1.5}, "`num_generations`"),
        ({"num_generations": True}, "`num_generations`"),
        ({"temperature": -0.1}, "`temperature`"),
        ({"temperature": float("nan")}, "`temperature`"),
        ({"temperature": 0.0}, "`num_generations` must be 1"),
        ({"top_p": 0.0}, "`top_p`"),
        ({"top_k": -1}, "`top_k`"),
        ({"max_completion_length": 0}, "`max_completion_length`"),
        ({"reward_weights": (float("inf"),)}, "`reward_weights`"),
    ],
)
def test_a_number_out_of_range_is_named(given, named):
    with pytest.raises(ValueError, match=named):
        Sampling(**given)


def test_greedy_takes_one_answer():
    assert Sampling(num_generations=1, temperature=0).temperature == 0
