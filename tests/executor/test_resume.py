"""A search that is killed and run again is the search that was not: real processes, real signals, a small real model."""

from __future__ import annotations

import logging
import os
import pickle
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from safetensors.torch import load_file

from rapidfire_automl.event_log import read_events
from rapidfire_automl.events import Event
from rapidfire_automl.executor.journal import Journal, read
from rapidfire_automl.failpoints import FailpointError
from rapidfire_automl.refusals import FolderInUse, SearchDiffers
from rapidfire_policies import Decision, TrialState, Verdict
from tests.executor import resumable
from tests.executor.forking import Forked
from tests.executor.searches import PLAN, make_executor, sft, tiny_model

pytestmark = pytest.mark.faults

Whole = Callable[[str, bool], dict[str, Any]]
ADAPTER = "adapter_model.safetensors"


def start(folder: Path, failpoints: str = "", **options: Any) -> Forked:
    """A search in `folder` in a process of its own; the same call goes on with it."""
    folder.mkdir(parents=True, exist_ok=True)
    storage = f"sqlite:///{folder / 'study.db'}"
    return Forked(resumable.run, folder / "out", storage, failpoints=failpoints, **options)


ALL = bool(os.environ.get("RAPIDFIRE_FAULTS"))
"""Whether `make test-faults` asks for every fault; otherwise one of each kind is tried."""
POLICIES = ("promotion", "asha") if ALL else ("promotion",)
KILLS = ["step=kill@11", "checkpoint.renaming=kill@4", "round.reported=kill@2", "round.judged=kill@3"]
KILLS += ["trial.asking=kill@3", "trial.asked=kill@4", "objective=kill@1", "trial.ended=kill@2"]
MORE_KILLS = ["step=kill@3", "checkpoint.writing=kill@2", "checkpoint.renamed=kill@5", "round.judging=kill@3"]
MORE_KILLS += ["round.judged=kill@1", "trial.asking=kill@1", "trial.asking=kill@6", "trial.asked=kill@5"]
MORE_KILLS += ["trial.ended=kill@1", "pass.backward=kill@9", "pass.forward=kill@9"]
PLACES = ("step", "checkpoint.writing", "checkpoint.renaming", "checkpoint.replacing", "checkpoint.renamed")
PLACES += ("round.reported", "round.judging", "round.judged", "trial.asking", "trial.asked", "objective", "trial.ended")
PLACES += ("pass.forward", "pass.backward")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], dict[str, Any]]:
    """Searches nobody disturbs, by policy, and whether each trial has its passes for itself."""
    folder = tmp_path_factory.mktemp("whole")
    known: dict[str, dict[str, Any]] = {}

    def search(policy: str, alone: bool) -> dict[str, Any]:
        key = f"{policy}-{alone}"
        if key not in known:
            begin = time.monotonic()
            known[key] = start(folder / key, policy=policy, alone=alone).result()
            known[key]["seconds"] = time.monotonic() - begin
        return known[key]

    return search


def assert_same(found: Mapping[str, Any], whole: Mapping[str, Any], *, alone: bool = True) -> None:
    """Bit by bit the same adapters, the same verdicts with the same reasons; in joint passes to 1e-6."""
    assert found["optuna"] == whole["optuna"]
    if alone:
        assert found["trials"] == whole["trials"]
        assert found["log"] == whole["log"]
        return
    assert found["trials"].keys() == whole["trials"].keys()
    for number, trial in whole["trials"].items():
        same = found["trials"][number]
        assert (same["state"], same["params"]) == (trial["state"], trial["params"])
        assert [verdict[:2] for verdict in same["verdicts"]] == [verdict[:2] for verdict in trial["verdicts"]]
        assert same["values"] == pytest.approx(trial["values"], rel=1e-6)
        if trial["adapter"] is not None:
            mine, theirs = (load_file(Path(run["adapters"][number]) / ADAPTER) for run in (found, whole))
            for name, expected in theirs.items():
                torch.testing.assert_close(mine[name], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("where", [*KILLS, *(MORE_KILLS if ALL else [])])
def test_killed_and_run_again(whole: Whole, tmp_path: Path, where: str, policy: str) -> None:
    """The same search in the end, and at most a chunk a trial done again."""
    start(tmp_path, policy=policy, failpoints=where).killed()
    found = start(tmp_path, policy=policy).result()
    assert_same(found, whole(policy, True))
    assert "search_resumed" in found["events"]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["step=kill@11", *(KILLS if ALL else [])])
def test_killed_in_joint_passes(whole: Whole, tmp_path: Path, where: str) -> None:
    start(tmp_path, policy="promotion", alone=False, failpoints=where).killed()
    found = start(tmp_path, policy="promotion", alone=False).result()
    assert_same(found, whole("promotion", False), alone=False)
    assert "search_resumed" in found["events"]


@pytest.mark.skipif(not ALL, reason="`make test-faults` runs it: minutes")
@pytest.mark.parametrize("seed", range(20))
def test_killed_at_any_moment(whole: Whole, tmp_path: Path, seed: int) -> None:
    """SIGKILL up to three times, at moments or passed places that the seed draws, then to the end."""
    draw = random.Random(seed)
    policy = draw.choice(POLICIES)
    undisturbed = whole(policy, True)
    for _ in range(draw.randint(1, 3)):
        if draw.random() < 0.5:
            moment = draw.uniform(0.0, 1.2 * undisturbed["seconds"])
            process, how = start(tmp_path, policy=policy), f"after {moment:.2f} s"
            if not process.ends_within(moment):
                process.send(signal.SIGKILL)
        else:
            place = draw.choice(PLACES)
            how = f"{place}=kill@{draw.randint(1, 12)}"
            amid: dict[str, Any] = {}
            if place == "checkpoint.replacing":  # which only a trial comes to that is put on disk amid a chunk
                how, amid = f"{place}=kill@{draw.randint(1, 2)}", {"term_at": draw.randint(9, 12)}
            process = start(tmp_path, policy=policy, failpoints=how, **amid)
        print(f"seed {seed}: {policy}, {how}: ended with {process.wait()}")
        if process.code == 0:
            break
    else:
        process = start(tmp_path, policy=policy)
    assert_same(process.result(), undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("step", [7, 8, 9])
def test_sigterm_leaves_a_search_that_goes_on(whole: Whole, tmp_path: Path, step: int) -> None:
    """Every trial finishes its step and is on disk as of then: no step is done again."""
    process = start(tmp_path, policy="promotion", term_at=step)
    assert process.wait() == 128 + signal.SIGTERM, process.err
    assert len(steps(tmp_path)) <= step + 3, "two trials train, each to the end of its step"
    assert_same(start(tmp_path, policy="promotion").result(), whole("promotion", True))
    assert max(Counter(steps(tmp_path)).values()) == 1


@pytest.mark.slow
def test_killed_while_a_checkpoint_is_replaced(whole: Whole, tmp_path: Path) -> None:
    """By a later one of the same chunk: the trial goes on from the one that was to be replaced."""
    start(tmp_path, policy="promotion", term_at=9, failpoints="checkpoint.replacing=kill").killed()
    assert_same(start(tmp_path, policy="promotion").result(), whole("promotion", True))
    assert Counter(steps(tmp_path))[0, 1] == Counter(steps(tmp_path))[1, 1] == 1, "no trial has begun anew"


@pytest.mark.slow
def test_a_second_sigterm_leaves_at_once(whole: Whole, tmp_path: Path) -> None:
    """While trials finish their steps: they go on from their last checkpoints."""
    process = start(tmp_path, policy="promotion", term_at=7, terms=2)
    assert process.wait(20.0) == 128 + signal.SIGTERM, process.err
    assert len(steps(tmp_path)) == 7, "who was in the middle of a step did not end it"
    assert_same(start(tmp_path, policy="promotion").result(), whole("promotion", True))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["bit", "truncated"])
def test_killed_and_its_newest_checkpoint_damaged(whole: Whole, tmp_path: Path, how: str) -> None:
    start(tmp_path, policy="promotion", failpoints="step=kill@11").killed()
    damage(tmp_path, how)
    found = start(tmp_path, policy="promotion").result()
    assert "checkpoint_damaged" in found["events"]
    assert_same(found, whole("promotion", True))


@pytest.mark.slow
def test_a_checkpoint_on_request(whole: Whole, tmp_path: Path) -> None:
    """In the first chunk, of four steps; killed when it is written, nothing up to there is done again."""
    start(tmp_path, policy="promotion", checkpoint_at=3).killed()
    assert all((tmp_path / "out" / "trials" / str(number) / "checkpoints" / "chunk-0000").exists() for number in (0, 1))
    [told] = [line.event for line in read_events(tmp_path / "out").lines if line.event.kind == "command"]
    assert told.data["effect"] == "applied" and "0, 1" in told.data["text"]
    assert_same(start(tmp_path, policy="promotion").result(), whole("promotion", True))
    again = {step for step, times in Counter(steps(tmp_path)).items() if times > 1}
    assert again.isdisjoint({(0, 1), (0, 2), (0, 3), (1, 1), (1, 2)})


def damage(folder: Path, how: str) -> None:
    """Damage the newest checkpoint."""
    newest = max(folder.glob("out/trials/*/checkpoints/chunk-*"), key=lambda path: path.name)
    tensors = newest / "tensors.safetensors"
    content = bytearray(tensors.read_bytes())
    if how == "truncated":
        tensors.write_bytes(content[: len(content) // 2])
    elif how == "bit":
        content[len(content) // 2] ^= 1
        tensors.write_bytes(content)
    elif how == "pickle":
        (newest / "optimizer.pt").write_bytes(pickle.dumps({"state": {}}))
    else:
        tensors.unlink()


def steps(folder: Path) -> list[tuple[int | None, int]]:
    """Of all attempts: trial and step."""
    lines = read_events(folder / "out").lines
    return [(line.event.trial, line.event.data["step"]) for line in lines if line.event.kind == "step"]


@pytest.mark.slow
def test_a_folder_given_by_way_of_another(whole: Whole, tmp_path: Path) -> None:
    """Killed and run again with `..` in the path."""
    (tmp_path / "here").mkdir()
    folder = tmp_path / "here" / ".." / "runs"
    start(folder, policy="promotion", failpoints="step=kill@11").killed()
    assert_same(start(folder, policy="promotion").result(), whole("promotion", True))


# -- in this process: what is on the disk, and what is refused ---------------------------------------------------------


def interrupted(folder: Path, monkeypatch: pytest.MonkeyPatch, failpoint: str = "round.judged=raise@3") -> None:
    """A search that an error has ended."""
    monkeypatch.setattr("rapidfire_automl.failpoints._passed", {})
    monkeypatch.setenv("RAPIDFIRE_FAILPOINTS", failpoint)
    with pytest.raises(FailpointError):
        search(folder)
    monkeypatch.delenv("RAPIDFIRE_FAILPOINTS")


def search(folder: Path, **options: Any) -> dict[str, Any]:
    return resumable.run(folder / "out", f"sqlite:///{folder / 'study.db'}", policy="promotion", **options)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return search(tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.slow
def test_an_error_of_the_search_loses_nothing(
    undisturbed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(tmp_path, monkeypatch)
    found = search(tmp_path)
    assert found["trials"] == undisturbed["trials"]
    assert found["attempts"] > len(found["optuna"])


@pytest.mark.parametrize(
    "how", ["bit", *(pytest.param(how, marks=pytest.mark.slow) for how in ("truncated", "pickle", "missing"))]
)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    undisturbed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    interrupted(tmp_path, monkeypatch)
    damage(tmp_path, how)
    found = search(tmp_path)
    assert "checkpoint_damaged" in found["events"]
    assert found["trials"] == undisturbed["trials"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"chunks": 2}, "`chunks` was 3, is 2"),
        ({"hidden": 48}, "`base` was"),
        ({"train_rows": 14}, "`train_dataset` was"),
        ({"lowest": 1e-3}, "the search space of `lr` was"),
    ],
)
def test_another_search_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], says: str
) -> None:
    interrupted(tmp_path, monkeypatch)
    with pytest.raises(SearchDiffers, match=re.escape(says)):
        search(tmp_path, **changed)


@pytest.mark.slow
def test_the_same_executor_goes_on_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a notebook does it: in the same process, which has the folder open."""
    study = optuna.create_study(storage=f"sqlite:///{tmp_path / 'study.db'}")
    heard: list[Event] = []
    executor = make_executor(slots=2, chunks=3, plan=PLAN, output_dir=tmp_path / "out", model=tiny_model())
    executor.add_listener(heard.append)

    def objective(trial: optuna.Trial) -> Any:
        return sft(executor, trial, lr=trial.suggest_float("lr", 1e-3, 1e-2), num_train_epochs=2)

    monkeypatch.setattr("rapidfire_automl.failpoints._passed", {})
    monkeypatch.setenv("RAPIDFIRE_FAILPOINTS", "round.judged=raise@2")
    with executor:
        with pytest.raises(FailpointError):
            executor.optimize(study, objective, n_trials=3)
        kept = checkpoints(tmp_path)
        assert kept
        executor.optimize(study, objective, n_trials=3)
    assert [event.data["going_on"] for event in heard if event.kind == "search_resumed"] == [2]
    assert [record.state for record in executor.records.values()] == [TrialState.COMPLETE] * 3
    done = Counter((event.trial, event.chunk) for event in heard if event.kind == "chunk_done")
    assert all(times == 1 or chunk == 2 for (_, chunk), times in done.items()), done


def checkpoints(folder: Path) -> set[Path]:
    return set(folder.glob("out/trials/*/*/chunk-*"))


@pytest.mark.parametrize(
    ("storage", "name", "says"),
    [
        ("other.db", "search", "study search lacks trials that were begun there (0, 1"),
        ("study.db", "other", "its study is search, this one is other"),
    ],
)
def test_another_study_does_not_take_the_checkpoints_of_a_search_that_is_not_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: str, name: str, says: str
) -> None:
    interrupted(tmp_path, monkeypatch)
    before = checkpoints(tmp_path)
    assert before
    with pytest.raises(SearchDiffers, match=re.escape(says)):
        resumable.run(tmp_path / "out", f"sqlite:///{tmp_path / storage}", study_name=name, policy="promotion")
    assert checkpoints(tmp_path) == before
    assert "search_resumed" in search(tmp_path)["events"]


@pytest.mark.parametrize("damage", ["the line", "all lines", "the file"])
def test_a_journal_that_no_longer_says_what_is_searched_costs_no_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    interrupted(tmp_path, monkeypatch)
    before = checkpoints(tmp_path)
    path = tmp_path / "out" / "journal.jsonl"
    content = path.read_bytes()
    if damage == "the file":
        path.unlink()
    else:
        first, rest = content.split(b"\n", 1)
        assert b'"search"' in first and b'"search"' not in rest
        path.write_bytes(b"\0" * 20 + b"\n" + (rest if damage == "the line" else b""))
    says = "no journal" if damage == "the file" else r"no longer says what is searched \(damaged lines: 1\)"
    with pytest.raises(SearchDiffers, match=says):
        search(tmp_path)
    assert checkpoints(tmp_path) == before
    path.write_bytes(content)
    assert "search_resumed" in search(tmp_path)["events"]


@pytest.mark.slow
def test_a_search_after_another_that_is_over_goes_on_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the journal says of the first does not count for the second, whose study has other trials."""
    search(tmp_path, n_trials=6)
    (tmp_path / "study.db").unlink()
    interrupted(tmp_path, monkeypatch)
    found = search(tmp_path)
    assert "search_resumed" in found["events"]
    assert len(found["optuna"]) == 6


@pytest.mark.slow
def test_a_search_with_more_trials_that_is_killed_goes_on_with_as_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search(tmp_path, n_trials=2)
    monkeypatch.setattr("rapidfire_automl.failpoints._passed", {})
    monkeypatch.setenv("RAPIDFIRE_FAILPOINTS", "round.judged=raise")
    with pytest.raises(FailpointError):
        search(tmp_path, n_trials=3, more=True)
    monkeypatch.delenv("RAPIDFIRE_FAILPOINTS")
    found = search(tmp_path, n_trials=3, more=True)
    assert "search_resumed" in found["events"]
    assert len(found["optuna"]) == 5


def test_a_folder_in_which_somebody_searches_is_refused(tmp_path: Path) -> None:
    first = Journal(tmp_path)
    with pytest.raises(FolderInUse, match="A search is under way in"):
        Journal(tmp_path)
    first.close()
    Journal(tmp_path).close()


def test_a_line_cut_short_is_dropped(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.write("search", facts={"study": "s"}, sampler_seed=1)
    journal.write("asked", trial=0)
    journal.write("round", verdicts=[[0, 1, "continue", "why not"]])
    journal.close()
    with (tmp_path / "journal.jsonl").open("a") as file:
        file.write('{"kind": "round", "verdicts": [[0, 2, "st')
    again = Journal(tmp_path)
    assert (again.past.judged, again.past.final(0)) == ({0: 1}, None)
    again.write("round", verdicts=[[0, 2, "stop", "enough"]])
    again.close()
    last = Journal(tmp_path)
    assert last.past.final(0) == Decision(Verdict.STOP, "enough")
    last.close()


def test_a_line_cut_short_never_stands_in_the_middle(tmp_path: Path) -> None:
    """Three processes, two of them killed while they wrote: nothing is damaged."""
    for seed in range(3):
        journal = Journal(tmp_path)
        journal.write("search", facts={"study": "s"}, sampler_seed=seed)
        journal.close()
        with (tmp_path / "journal.jsonl").open("a") as file:
            file.write('{"kind": "asked", "tri')
    past = read(tmp_path / "journal.jsonl")
    assert (past.sampler_seed, past.damaged) == (2, [])


@pytest.mark.parametrize("damage", [b"\0" * 20, b"[3]", b'{"kind": "ro'])
def test_a_damaged_line_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, damage: bytes
) -> None:
    """Here of a round: it is judged again."""
    interrupted(tmp_path, monkeypatch)
    path = tmp_path / "out" / "journal.jsonl"
    lines = path.read_bytes().split(b"\n")
    [*_, place] = [number for number, line in enumerate(lines) if b'"round"' in line]
    lines[place] = damage
    path.write_bytes(b"\n".join(lines) + b'{"kind": "rou')
    with caplog.at_level(logging.WARNING, "rapidfire_automl"):
        search(tmp_path)
    said = f"damaged and left out: {place + 1}. A trial that was begun there stays running"
    events = [line.event for line in read_events(tmp_path / "out").lines if line.event.kind == "warning"]
    assert [said in event.data["message"] for event in events] == [True]
    assert caplog.text.count(said) == 1


@pytest.mark.slow
def test_a_search_that_is_over_is_followed_by_another_or_found_again(tmp_path: Path) -> None:
    first = search(tmp_path, n_trials=2)
    again = search(tmp_path, n_trials=2)
    assert (again["trials"], again["trained"]) == (first["trials"], 0)
    second = search(tmp_path, n_trials=2, more=True)
    assert len(first["optuna"]) == 2
    assert len(second["optuna"]) == 4
    assert "search_resumed" not in second["events"]
