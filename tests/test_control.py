"""Commands as data, and the mailboxes they travel through; no torch, no search."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st

from rapidfire_automl.control import LARGEST_BYTES, VERBS, Command, ControlError, Controls, Effect
from rapidfire_automl.mailboxes import FolderMailbox, MemoryMailbox, StudyMailbox
from rapidfire_automl.mailboxes.study import ATTEMPT_ATTR, COMMAND_ATTR
from rapidfire_automl.pruners import policy_from_outside
from rapidfire_automl.steering import Search
from rapidfire_policies import ASHA, CostAware

optuna.logging.set_verbosity(optuna.logging.ERROR)

GOOD: dict[str, dict[str, Any]] = {
    "pause": {"trial": 3},
    "resume": {"trial": 3},
    "stop": {"trial": 0},
    "clone": {"trial": 3, "arguments": {"set": {"lr": 1e-4}, "warm_start": True}},
    "add": {"arguments": {"set": {"lr": 1e-4}}},
    "extend": {"trial": 3, "arguments": {"chunks": 2}},
    "set-policy": {"arguments": {"name": "asha", "arguments": {"reduction_factor": 3}}},
    "checkpoint": {},
    "cancel": {},
}
HUGE = "1" + 400 * "0"
DEEP = 900 * "[" + 900 * "]"


@pytest.mark.parametrize("verb", VERBS)
def test_a_command_survives_the_way_to_another_process(verb: str) -> None:
    command = Command(verb, **GOOD[verb])
    assert Command.from_json(command.to_json()) == command


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"verb": "puase", "trial": 3}, "Did you mean `pause`"),
        ({"verb": "pause"}, "`trial of pause` must be a whole number >= 0, got None."),
        ({"verb": "pause", "trial": True}, "whole number"),
        ({"verb": "pause", "trial": -1}, "whole number"),
        ({"verb": "cancel", "trial": 3}, "Leave the trial out"),
        (
            {"verb": "pause", "trial": 3, "arguments": {"chunks": 1}},
            "`chunks` is no argument of pause. It takes: none.",
        ),
        ({"verb": "extend", "trial": 3, "arguments": {"chunks": 0}}, "`chunks` must be a whole number >= 1, got 0."),
        (
            {"verb": "extend", "trial": 3, "arguments": {"chunks": 20_000_000}},
            "`chunks` must be at most 10000 in one command, got 20000000.",
        ),
        ({"verb": "extend", "trial": 3}, "got None"),
        ({"verb": "clone", "trial": 3, "arguments": {"warm_start": "yes"}}, "true or false"),
        ({"verb": "clone", "trial": 3, "arguments": {"set": {"x": float("nan")}}}, "`x` must be finite, got nan."),
        ({"verb": "add", "arguments": {"set": {"lr": float("nan")}}}, "`lr` must be a number >= 0, got nan."),
        ({"verb": "add", "arguments": {"set": [1]}}, "must be a table"),
        (
            {"verb": "set-policy", "arguments": {"name": None, "arguments": {"x": 1, "y": 2}}},
            "A policy that is switched off takes no arguments, got `x`, `y`.",
        ),
        ({"verb": "pause", "trial": 3, "id": "../../x"}, "`id` must be up to 80 letters"),
        ({"verb": "pause", "trial": 3, "id": "a/b"}, "`id` must be"),
        ({"verb": "pause", "trial": 3, "id": ".hidden"}, "`id` must be"),
        ({"verb": "pause", "trial": 3, "id": "x\n"}, "`id` must be"),
        ({"verb": "pause", "trial": 3, "source": "two\nlines"}, "`source` must be a line"),
    ],
)
def test_what_is_no_command(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ControlError) as caught:
        Command(**given)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "pause 3",
        "[]",
        "null",
        '{"verb": "pause", "trial": 3}',
        '{"id": "x", "verb": "pause", "trial": 3, "shell": "rm"}',
        '{"id": "x", "verb": "pause", "trial": "3"}',
        '{"id": "x", "verb": ["pause"], "trial": 3}',
        '{"id": "x", "verb": "set-policy", "arguments": {"name": {"os": "system"}}}',
        '{"id": "x", "verb": "set-policy", "arguments": 3}',
        '{"id": 5, "verb": "pause", "trial": 3}',
        "[" * 5000,
        " " * (LARGEST_BYTES + 1),
        f'{{"id": "x", "verb": "pause", "trial": 3, "when_s": {HUGE}}}',
        f'{{"id": "x", "verb": "pause", "trial": 3, "when_s": {HUGE * 20}}}',
        f'{{"id": "x", "verb": "pause", "trial": {HUGE}}}',
        f'{{"id": "x", "verb": "pause", "trial": 3, "attempt": {HUGE}}}',
        f'{{"id": "x", "verb": "add", "arguments": {{"set": {{"lr": {HUGE}}}}}}}',
        f'{{"id": "x", "verb": "add", "arguments": {{"set": {{"lr": {DEEP}}}}}}}',
        '{"id": "x", "verb": "add", "arguments": {"set": {"lr": [{"a": NaN}]}}}',
        f'{{"id": "x", "verb": "pause", "trial": 3, "arguments": {DEEP}}}',
        f'{{"id": "x", "verb": {DEEP}}}',
    ],
    ids=lambda text: text[:60],
)
def test_whatever_another_process_writes_is_checked(text: str) -> None:
    with pytest.raises(ControlError):
        Command.from_json(text)


NUMBERS = st.sampled_from([10**400, -(10**400), 10**20, float("nan"), float("inf"), 1e300, -1, 0, True])
ODD_VALUES = NUMBERS | st.recursive(
    st.none() | NUMBERS | st.text(st.characters(exclude_categories=())),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
ARGUMENTS = {
    "clone": ("set", "warm_start"),
    "add": ("set",),
    "extend": ("chunks",),
    "set-policy": ("name", "arguments"),
}


@st.composite
def odd_commands(draw: st.DrawFn) -> dict[str, Any]:
    """Commands with something odd in one place."""
    verb = draw(st.sampled_from(VERBS))
    told = {"id": "x", "verb": verb, "source": "a test", "when_s": 1e9, "attempt": 1, **GOOD[verb]}
    place, value = draw(st.sampled_from([*told, *ARGUMENTS.get(verb, ())])), draw(ODD_VALUES)
    if place in told:
        return {**told, place: value}
    is_table = place in ("set", "arguments") and draw(st.booleans())
    return {**told, "arguments": {**told["arguments"], place: {"lr": value} if is_table else value}}


@settings(deadline=None, max_examples=400)
@drawn(odd_commands())
def test_any_json_is_a_command_or_is_refused(told: Any) -> None:
    try:
        command = Command.from_json(json.dumps(told))
    except ControlError:
        return
    assert Command.from_json(command.to_json()) == command
    assert command.describe()


def test_one_chunk_is_not_several() -> None:
    assert Command("extend", 0, {"chunks": 1}).describe() == "extend 0 by 1 chunk"
    assert Command("extend", 0, {"chunks": 2}).describe() == "extend 0 by 2 chunks"


def test_an_object_does_not_leave_the_process() -> None:
    with pytest.raises(ControlError, match="Name the policy"):
        Command("set-policy", None, {"name": ASHA()}).to_json()


def test_nobody_names_code_from_outside() -> None:
    assert policy_from_outside("asha", (), {"reduction_factor": 3}) == ASHA(reduction_factor=3)
    assert policy_from_outside("cost_aware", (), {"policy": {"name": "asha"}}) == CostAware(ASHA())
    for name, arguments in (
        ("os:system", {}),
        ("cost_aware", {"policy": "os:system"}),
        ("cost_aware", {"policy": {"name": "this_is_not_imported:X"}}),
        ("cost_aware", {"policy": {"name": "cost_aware", "policy": "os:system"}}),
        ("rapidfire_policies:ASHA", {}),
    ):
        with pytest.raises(ValueError, match="would import code that the search has not been started with"):
            policy_from_outside(name, (), arguments)
    assert policy_from_outside("rapidfire_policies:ASHA", (ASHA,), {}) == ASHA()


# -- mailboxes ---------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        self.now_s += 1.0
        return self.now_s


def folder_boxes(tmp_path: Path) -> tuple[FolderMailbox, FolderMailbox]:
    """The two ends; the search's looks whenever it is asked."""
    return FolderMailbox(tmp_path), FolderMailbox(tmp_path, clock=Clock())


def study_boxes(tmp_path: Path) -> tuple[StudyMailbox, StudyMailbox]:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    study = optuna.create_study(study_name="s", storage=storage, load_if_exists=True)
    return StudyMailbox(optuna.load_study(study_name="s", storage=storage)), StudyMailbox(study, every_s=0)


@pytest.fixture(params=[folder_boxes, study_boxes])
def boxes(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Any, Any]:
    sender, search = request.param(tmp_path)
    return sender, search, lambda: request.param(tmp_path)[1]


def test_there_and_back(boxes: Any) -> None:
    sender, search, _ = boxes
    search.open()
    assert search.take() == []
    sent = sender.send(Command("pause", 3, source="a test"))
    assert sent.effect is None
    (command,) = search.take()
    assert command == sent.command
    assert command.attempt == 1
    assert search.take() == [], "taken once"
    search.answer(command, Effect("applied", "paused"))
    effect = sent.wait(5)
    assert effect is not None
    assert (effect.applied, effect.text) == (True, "paused")


def test_commands_come_in_the_order_they_were_made(boxes: Any) -> None:
    sender, search, _ = boxes
    search.open()
    for trial in range(12):
        sender.send(Command("pause", trial))
    assert [command.trial for command in search.take()] == list(range(12))


def test_a_doubled_id_is_one_command(boxes: Any) -> None:
    sender, search, _ = boxes
    search.open()
    command = Command("pause", 3, id="mine")
    sender.send(command)
    sender.send(Command("stop", 5, id="mine"))
    assert [(c.verb, c.trial) for c in search.take()] == [("pause", 3)]
    search.answer(command, Effect("applied", "paused"))
    sender.send(command)
    assert search.take() == []


def test_a_restart_takes_what_has_no_answer(boxes: Any) -> None:
    sender, search, again = boxes
    early = sender.send(Command("add", None, {"set": {"lr": 1.0}}))
    search.open()
    applied, lost = sender.send(Command("pause", 1)), sender.send(Command("pause", 2))
    taken = search.take()
    assert [command.id for command in taken] == [early.command.id, applied.command.id, lost.command.id]
    search.answer(taken[1], Effect("applied", "paused"))
    # The search is killed here.
    second = again()
    second.open()
    left = second.take()
    assert [(command.id, command.attempt) for command in left] == [(early.command.id, None), (lost.command.id, 1)]
    assert second.attempt == 2, "so the search can tell which are stale"
    assert applied.effect is not None
    assert applied.effect.text == "paused"


def test_after_the_end_nobody_listens(boxes: Any) -> None:
    sender, search, _ = boxes
    search.open()
    late = sender.send(Command("pause", 3))
    search.close("the search has ended")
    assert late.effect is not None
    assert (late.effect.state, late.effect.text) == ("refused", "the search has ended")
    with pytest.raises(ControlError, match="runs no more: the search has ended"):
        sender.send(Command("pause", 3))


def test_a_killed_search_is_noticed(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    box = FolderMailbox(tmp_path)
    box.open()
    attempt = tmp_path / "commands" / "attempt.json"
    attempt.write_text(json.dumps({**json.loads(attempt.read_text()), "pid": dead.pid}))
    with pytest.raises(ControlError, match=f"its process {dead.pid} is gone. Resume it first."):
        box.send(Command("pause", 3))
    attempt.write_text(json.dumps({**json.loads(attempt.read_text()), "pid": 2**70}))
    assert box.send(Command("pause", 3)).effect is None, "no process can have that number: nothing is known of it"


def test_what_others_put_into_the_folder_does_no_harm(tmp_path: Path) -> None:
    sender, search = folder_boxes(tmp_path)
    search.open()
    folder = tmp_path / "commands"
    command = Command("pause", 3, id="good")
    (folder / "no-json.json").write_text("pause 3")
    (folder / "other-id.json").write_text(command.to_json())
    (folder / "huge.json").write_text(" " * (LARGEST_BYTES + 1))
    (folder / "pickle.json").write_bytes(b"\x80\x04cos\nsystem\n")
    (folder / "half.json.partial").write_text(command.to_json())
    outside = tmp_path / "outside"
    outside.write_text(Command("pause", 4, id="link").to_json())
    (folder / "link.json").symlink_to(outside)
    (folder / "folder.json").mkdir()
    sent = sender.send(command)
    assert search.take() == [sent.command]


@pytest.mark.parametrize("text", ["pause 3", f'{{"id": "bad", "verb": "pause", "trial": 3, "when_s": {HUGE}}}'])
def test_what_is_no_command_is_answered_and_not_looked_at_again(boxes: Any, text: str) -> None:
    sender, search, again = boxes
    search.open()
    if isinstance(search, FolderMailbox):
        (search.run_dir / "commands" / "bad.json").write_text(text)
    else:
        search._study.set_user_attr(COMMAND_ATTR + "bad", text)
    good = sender.send(Command("pause", 3))
    assert search.take() == [good.command]
    effect = sender._look("bad", 5)
    assert effect is not None
    assert (effect.state, effect.text.split(":")[0]) == ("refused", "it is no command")
    second = again()
    second.open()
    assert second.take() == [good.command]


def test_files_appear_whole(tmp_path: Path) -> None:
    """Many senders at once, and one that reads as fast as it can: every command comes once, none half written."""
    _, search = folder_boxes(tmp_path)
    search.open()
    box = FolderMailbox(tmp_path)
    threads = [
        threading.Thread(target=lambda at=at: [box.send(Command("pause", at * 10 + i)) for i in range(10)])
        for at in range(4)
    ]
    for thread in threads:
        thread.start()
    taken: list[int | None] = []
    while any(thread.is_alive() for thread in threads) or len(taken) < 40:
        taken += [command.trial for command in search.take()]
    assert sorted(taken) == list(range(40))  # type: ignore[type-var]
    assert not list((tmp_path / "commands").glob(".*"))


def test_a_look_is_at_most_one_stat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    box = FolderMailbox(tmp_path, every_s=0.2, clock=lambda: now[0])
    box.open()
    os.utime(tmp_path / "commands", (1e9, 1e9))
    stats = []
    own = Path.stat
    monkeypatch.setattr(Path, "stat", lambda self, **kwargs: (stats.append(self.name), own(self, **kwargs))[1])
    monkeypatch.setattr(FolderMailbox, "_list", lambda self: stats.append("list") or [])
    for step in range(1000):
        now[0] = step * 0.001
        box.take()
    assert stats == ["commands", "list"] + ["commands"] * 4


def test_a_storage_that_is_away_costs_no_search(tmp_path: Path) -> None:
    class Away:
        study_name = "s"

        @property
        def user_attrs(self) -> dict[str, Any]:
            raise ConnectionError("gone")

        def set_user_attr(self, key: str, value: Any) -> None:
            raise ConnectionError("gone")

    box = StudyMailbox(Away(), every_s=0)  # type: ignore[arg-type]
    assert box.take() == []
    box.answer(Command("pause", 3), Effect("applied", ""))
    box.close("the end")


def test_attributes_that_are_no_commands_are_ignored(tmp_path: Path) -> None:
    sender, search = study_boxes(tmp_path)
    search.open()
    study = search._study
    study.set_user_attr(COMMAND_ATTR + "x", {"verb": "pause"})
    study.set_user_attr(COMMAND_ATTR + "../../x", Command("pause", 3, id="y").to_json())
    good = sender.send(Command("pause", 3))
    assert search.take() == [good.command]
    assert study.user_attrs[ATTEMPT_ATTR] == {"attempt": 1, "ended": None}


def crew_of(tmp_path: Path) -> tuple[StudyMailbox, StudyMailbox]:
    """Two workers' ends of one study."""
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    study_boxes(tmp_path)
    study = optuna.load_study(study_name="s", storage=storage)
    study.add_trial(optuna.create_trial(state=optuna.trial.TrialState.RUNNING))
    boxes = [
        StudyMailbox(optuna.load_study(study_name="s", storage=storage), every_s=0.0, shared=True) for _ in range(2)
    ]
    for box in boxes:
        box.open()
    return boxes[0], boxes[1]


def test_a_command_that_is_left_to_others_is_taken_again_until_one_has_answered(tmp_path: Path) -> None:
    sender, _ = study_boxes(tmp_path)
    mine, others = crew_of(tmp_path)
    sent = sender.send(Command("pause", 3))
    heard: list[Effect] = []
    for _ in range(3):
        (command,) = mine.take()
        mine.leave(command, lambda _, effect: heard.append(effect))
    assert others.take() == mine.take() == [sent.command]
    mine.leave(sent.command, lambda _, effect: heard.append(effect))
    others.answer(sent.command, Effect("applied", "paused"))
    assert mine.take() == [] == mine.take()
    assert [effect.text for effect in heard] == ["paused"]


def test_a_command_from_elsewhere_that_is_left_to_others_reaches_them(tmp_path: Path) -> None:
    mine, others = crew_of(tmp_path)
    heard: list[Effect] = []
    command = Command("pause", 3)
    mine.leave(command, lambda _, effect: heard.append(effect))
    (taken,) = others.take()
    assert (taken.id, taken.verb, taken.trial) == (command.id, "pause", 3)
    assert mine.take() == [taken], "whoever takes the trial over does it"
    mine.answer(taken, Effect("applied", "paused"))
    assert [effect.text for effect in heard] == ["paused"]
    late = Command("pause", 4)
    mine.leave(late, lambda _, effect: heard.append(effect))
    others.answer(late, Effect("refused", "no"))
    mine.close("the worker leaves")
    assert [effect.text for effect in heard] == ["paused", "no"], "it has a last look"


def test_of_several_workers_answers_the_first_stays(tmp_path: Path) -> None:
    sender, _ = study_boxes(tmp_path)
    mine, others = crew_of(tmp_path)
    sent = sender.send(Command("pause", 3))
    for box, text in ((others, "first"), (mine, "second")):
        box.answer(sent.command, Effect("applied", text))
    assert sent.effect is not None and sent.effect.text == "first"


def test_what_is_left_to_others_costs_no_more_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    study = optuna.create_study(study_name="s", storage=f"sqlite:///{tmp_path / 'study.db'}")
    box = StudyMailbox(study, every_s=1.0, clock=lambda: now[0], shared=True)
    box.open()
    for trial in range(5):
        box.send(Command("pause", trial))
    looks = []
    own = type(study._storage).get_study_user_attrs
    monkeypatch.setattr(type(study._storage), "get_study_user_attrs", lambda *a: looks.append(now[0]) or own(*a))
    for tick in range(4000):
        now[0] = tick / 1000
        for command in box.take():
            box.leave(command, lambda _, effect: None)
    assert len(looks) == 4


def test_memory_refuses_what_waits_at_the_end() -> None:
    box = MemoryMailbox()
    with pytest.raises(ControlError, match="no search runs"):
        box.send(Command("cancel"))
    box.open()
    sent = box.send(Command("cancel"))
    box.close("the search has ended")
    assert sent.effect is not None
    assert sent.effect.text == "the search has ended"


# -- handles -----------------------------------------------------------------------------------------------------------


def test_the_verbs_are_one_set(tmp_path: Path) -> None:
    sent: list[Command] = []

    class Recorder(Controls):
        def _send(self, command: Command) -> Any:
            sent.append(command)

    controls = Recorder()
    controls.pause(1)
    controls.resume(1)
    controls.stop(1)
    controls.clone(1, set={"lr": 1.0})
    controls.add({"lr": 1.0})
    controls.extend(1, 2)
    controls.set_policy("asha")
    controls.checkpoint()
    controls.cancel()
    assert tuple(command.verb for command in sent) == VERBS


def test_search_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ControlError, match="not both"):
        Search()
    with pytest.raises(ControlError, match="There is no run folder"):
        Search(tmp_path / "nowhere")
    with pytest.raises(ControlError, match=r"is no run folder: it has no events.jsonl"):
        Search(tmp_path)
    with pytest.raises(ControlError, match="`storage` must be given"):
        Search(study="s")
    with pytest.raises(ControlError, match=r"^`storage`: there is no file .*study\.db\.$"):
        Search(study="s", storage=f"sqlite:///{tmp_path / 'study.db'}")
    with pytest.raises(ControlError, match="has no study s; it has none"):
        Search(study="s", storage=optuna.storages.InMemoryStorage())
    with pytest.raises(ControlError) as caught:
        Search(study="s", storage="postgresql://me:s3cret@127.0.0.1:1/db")
    assert str(caught.value).count("127.0.0.1:1/db") == 1
    assert "s3cret" not in str(caught.value)


def test_events_of_another_process_are_read_as_they_come(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text('{"kind": "plan"}\n{"kind": "st')
    search = Search(tmp_path)
    assert [event.kind for event in search.events()] == ["plan"]
    assert search.events() == []
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('ep"}\n')
    assert [event.kind for event in search.events()] == ["step"]
