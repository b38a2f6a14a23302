"""Searches that several workers share: what their study describes, whoever was first."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import optuna
import pytest

from rapidfire_automl import attempts, sharing, workers
from rapidfire_automl.settings import SettingsError, parse_settings
from rapidfire_automl.storages import load_study, open_storage
from tests import postgres

N_TRIALS = 2


def shared(url: str, study: str, rate: float, **search: Any) -> sharing.Shared:
    """A search that another one differs from by its learning rate."""
    raw = {
        "base": "base",
        "data": {"train": "train.jsonl", "eval": "eval.jsonl"},
        "args": {"learning_rate": rate},
        "space": {"r": [4, 8]},
        "search": {"storage": url, "study": study, "shared": True, "heartbeat_s": 1, "grace_s": 3, **search},
    }
    facts = {"args.learning_rate": rate, "base.model": "base"}
    return sharing.Shared(parse_settings(raw), Path("here"), Path("runs"), facts)


def begin(given: sharing.Shared) -> optuna.Study:
    sampler, pruner = optuna.samplers.RandomSampler(seed=0), optuna.pruners.NopPruner()
    return sharing.join(given, sampler, pruner, N_TRIALS)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'study.db'}"
    else:
        with postgres.server() as server:
            yield server.url()


def test_of_searches_that_begin_at_once_only_equal_ones_share_a_study(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of four want something else than the other two; whoever is first decides which two are refused."""
    together, storages = threading.Barrier(4), threading.local()

    def opened(url: str, **given: Any) -> Any:
        """One a thread: a server has only so many connections."""
        if not hasattr(storages, "mine"):
            storages.mine = open_storage(url, **given)
        return storages.mine

    monkeypatch.setattr(sharing, "open_storage", opened)
    monkeypatch.setattr(workers, "rhythm", lambda study: together.wait(60.0))

    def run(name: str, rate: float) -> float | str:
        try:
            begin(shared(url, name, rate))
        except SettingsError as error:
            return str(error)
        return rate

    own = open_storage(url)
    with ThreadPoolExecutor(4) as threads:
        for name in map(str, range(15)):
            came = [one.result() for one in [threads.submit(run, name, rate) for rate in (0.1, 0.2, 0.1, 0.2)]]
            study = load_study(own, name)
            first = study.user_attrs[sharing.SEARCH_ATTR]["facts"]["args.learning_rate"]
            other = 0.2 if first == 0.1 else 0.1
            assert study.user_attrs[sharing.SEARCH_ATTR]["settings"]["args"] == {"learning_rate": first}
            said = f"`search.study`: study {name} is another search: `args.learning_rate` was {first}, is {other}. "
            assert sorted(came, key=str) == sorted([first, first, *2 * [said + "Take another name."]], key=str)
            assert len(attempts.counted(study.get_trials(deepcopy=False))) == N_TRIALS


def test_what_is_free_may_change(url: str) -> None:
    """How many trials, slots and seconds are no part of what is searched: whoever runs it again may say otherwise."""
    begin(shared(url, "s", 0.1, n_trials=2))
    study = begin(shared(url, "s", 0.1, n_trials=3))
    assert study.user_attrs[sharing.SEARCH_ATTR]["settings"]["search"]["n_trials"] == 3
    with pytest.raises(SettingsError, match=r"`args.learning_rate` was 0.1, is 0.2\."):
        begin(shared(url, "s", 0.2))


def test_a_study_of_something_else_is_left_alone(url: str) -> None:
    optuna.create_study(storage=open_storage(url), study_name="mine").enqueue_trial({"x": 1.0})
    with pytest.raises(SettingsError, match=r"study mine holds something else; take another name\.$"):
        begin(shared(url, "mine", 0.1))
    assert sharing.SEARCH_ATTR not in load_study(url, "mine").user_attrs
