"""A search on every kind of storage: killed and resumed, and with the storage away."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import postgres
from tests.executor.working import Process, of, result

pytestmark = [pytest.mark.slow, pytest.mark.faults]

ALL = bool(os.environ.get("RAPIDFIRE_FAULTS"))
KILLS = ("round.judged=kill@2", "step=kill@7", "trial.ended=kill@1") if ALL else ("round.judged=kill@2",)


@pytest.fixture(scope="module")
def server() -> Iterator[postgres.Server]:
    with postgres.server() as one:
        yield one


@pytest.fixture
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'study.db'}"
    if request.param == "journal":
        return f"journal://{tmp_path / 'study.log'}"
    url: str = request.getfixturevalue("server").fresh()
    return url


def search(folder: Path, storage: str, failpoints: str = "", **options: Any) -> Process:
    return Process(folder, storage, failpoints, shared=False, policy="promotion", n_trials=3, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """A search that nobody disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    search(folder, f"sqlite:///{folder / 'study.db'}").finish()
    return result(f"sqlite:///{folder / 'study.db'}")


def told(found: dict[int, dict[str, Any]]) -> dict[int, Any]:
    return {n: {name: trial[name] for name in ("state", "value", "values", "params")} for n, trial in found.items()}


@pytest.mark.parametrize("where", KILLS)
@pytest.mark.parametrize("storage", ["journal", "postgresql", *(["sqlite"] if ALL else [])], indirect=True)
def test_killed_and_run_again(whole: dict[int, dict[str, Any]], storage: str, tmp_path: Path, where: str) -> None:
    search(tmp_path, storage, where).killed()
    again = search(tmp_path, storage)
    again.finish()
    assert again.of_kind("search_resumed")
    found = result(storage)
    assert told(found) == told(whole)
    assert max(trial["attempt"] for trial in found.values()) == 2


def test_a_storage_that_stays_away_ends_the_search_which_goes_on_later(
    whole: dict[int, dict[str, Any]], server: postgres.Server, tmp_path: Path
) -> None:
    """What was trained before is kept, though the storage can't be told so."""
    storage = server.fresh()
    ends = search(tmp_path, storage, patience_s=1.0, step_s=0.05)
    ends.wait_for(of("chunk_done"))
    server.stop()
    try:
        assert ends.wait() == 1
    finally:
        server.start()
    assert "StorageAway: The study's storage could not be reached for" in ends.err
    assert "run the same command again" in ends.err
    assert "a-secret" not in ends.err + ends.out
    search(tmp_path, storage).finish()
    assert told(result(storage)) == told(whole)


@pytest.mark.skipif(not ALL, reason="`make test-faults` runs it: half a minute")
@pytest.mark.parametrize("patience_s", [60.0, 1.0])
def test_a_server_that_is_frozen_is_waited_for(
    whole: dict[int, dict[str, Any]], server: postgres.Server, tmp_path: Path, patience_s: float
) -> None:
    """It refuses nothing and answers nothing; when the time is over the search hangs up."""
    storage = server.fresh()
    waits = search(tmp_path, storage, step_s=0.05, patience_s=patience_s)
    waits.wait_for(of("chunk_done"))
    pids = server.pids
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    if patience_s < 10.0:
        code = waits.wait()
    else:
        time.sleep(10.0)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    if patience_s < 10.0:
        assert code == 1
        assert "StorageAway" in waits.err
        search(tmp_path, storage).finish()
    else:
        waits.finish()
        assert "no answer for" in waits.of_kind("storage_away")[0]["data"]["reason"]
    assert told(result(storage)) == told(whole)
