"""Pause, clone with half the learning rate and a warm start, resume, all while the search runs: three ways to say it."""

from __future__ import annotations

import getpass
import json
import os
import re
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest

from rapidfire_automl import RapidFireExecutor, Search, SearchResult, in_background, run_search
from rapidfire_automl.control import ControlError
from rapidfire_automl.events import Event
from rapidfire_automl.plan import Plan
from tests.tiny.data import MODEL, sums

pytestmark = pytest.mark.slow
optuna.logging.set_verbosity(optuna.logging.ERROR)
RATE = 2e-3
PLAN = Plan(budget_tokens=4096, reason="fixed for the tests")
"""Calibration is left out: it measures the machine."""


def start(run_dir: Path, act: Callable[[RapidFireExecutor, Event], None]) -> tuple[RapidFireExecutor, Any]:
    """A search of one trial in a thread of its own; `act` is called at every event, in the search's threads."""
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    train, held_out = sums(16, seed=3), sums(8, seed=4)
    executor = RapidFireExecutor(str(MODEL), slots=2, chunks=4, plan=PLAN, output_dir=run_dir)

    def objective(trial: optuna.Trial) -> Any:
        return SFTTrainer(
            model=executor.model(trial),
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
            args=SFTConfig(
                learning_rate=trial.suggest_float("learning_rate", 1e-6, 1e-1, log=True),
                lr_scheduler_type="constant",
                per_device_train_batch_size=16,
                num_train_epochs=32,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                bf16=False,
                gradient_checkpointing=False,
                use_cpu=True,
                disable_tqdm=True,
                output_dir=str(run_dir / "trainer"),
            ),
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=executor.tokenizer,
        )

    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.enqueue_trial({"learning_rate": RATE})
    executor.add_listener(lambda event: act(executor, event))
    found = in_background(run_search, executor, objective, study=study, n_trials=1, run_dir=run_dir, own=True)
    return executor, found


def commands(run_dir: Path) -> list[dict[str, Any]]:
    told = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    return [event["data"] for event in told if event["kind"] == "command"]


def check(executor: RapidFireExecutor, result: SearchResult, run_dir: Path, source: str) -> None:
    """The sequence has happened, in this order, and the clone has gone on from where its source was."""
    # A clone is taken at once, a pause takes effect at the next step: sent together, they are logged in this order.
    told = sorted(commands(run_dir), key=lambda c: ("pause", "clone", "resume").index(c["verb"]))
    assert [(c["verb"], c["of"], c["effect"]) for c in told] == [
        ("pause", 0, "applied"), ("clone", 0, "applied"), ("resume", 0, "applied")
    ]  # fmt: skip
    assert told[0]["text"] == "paused, at step 13 of 32, in chunk 2 of 4"
    assert told[1]["arguments"] == {"set": {"learning_rate": RATE / 2}, "warm_start": True}
    assert all(source in c["source"] for c in told)
    records = executor.records
    assert [str(record.state) for record in records.values()] == ["complete", "complete"]
    assert result.summary["status"] == "complete"
    assert records[1].params == {"learning_rate": RATE / 2}
    source_losses, clone_losses = (
        [entry["loss"] for entry in records[number].log_history if "loss" in entry] for number in (0, 1)
    )
    assert len(source_losses) == len(clone_losses) == 32
    # Every step goes over all examples, so this is the source's 14th loss: it was paused after 13.
    assert clone_losses[0] == pytest.approx(source_losses[13], rel=1e-4)
    assert clone_losses[0] < 0.8 * source_losses[0]
    assert clone_losses[1] == pytest.approx(source_losses[14], rel=0.05)
    assert clone_losses[1] != pytest.approx(source_losses[14], rel=1e-6), "its learning rate is another"
    assert records[1].log_history[0]["learning_rate"] == RATE / 2
    paused_s, again_s = records[0].spans[0][1], records[0].spans[1][0]
    assert paused_s < records[1].spans[0][0] < again_s, "the clone began while its source was paused"


def test_from_python(tmp_path: Path) -> None:
    """The search gives the word at step 13; what comes then is a person's pace."""
    at_13, reached, go_on = threading.Event(), [], threading.Event()

    def act(executor: RapidFireExecutor, event: Event) -> None:
        if event.kind == "step" and event.trial == 0 and event.data["step"] == 13 and not reached:
            reached.append(executor.pause(0))
            at_13.set()
            assert go_on.wait(60)

    executor, found = start(tmp_path, act)
    assert at_13.wait(120)
    go_on.set()
    paused = reached[0].wait(30)
    assert paused is not None and paused.applied
    cloned = executor.clone(0, set={"learning_rate": RATE / 2}, warm_start=True).wait(30)
    assert cloned is not None
    assert cloned.text == "trial 1 is next in line for a slot"
    while 1 not in executor.records or (not executor.records[1].spans and not executor.records[1].values):
        time.sleep(0.01)
    resumed = executor.resume(0).wait(30)
    assert resumed is not None and resumed.applied
    check(executor, found.result(120), tmp_path, "Python")


SEARCH = """
base = "{model}"
trainer = "sft"
[data]
train = "train.jsonl"
eval = "eval.jsonl"
[args]
per_device_train_batch_size = 8
num_train_epochs = 200
lr_scheduler_type = "constant"
logging_steps = 1
bf16 = false
[lora]
r = 8
lora_alpha = 16
target_modules = "all-linear"
[space]
learning_rate = {{ low = 1.9e-3, high = 2e-3, log = true }}
[search]
n_trials = 1
slots = 3
chunks = 1024
policy = "nop"
storage = "study.db"
study = "steered"
"""
ROOT = Path(__file__).parent.parent
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "policies")]),
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


def say(folder: Path, *words: str) -> tuple[int, str]:
    """What another terminal says, and what it is answered."""
    command = [sys.executable, "-m", "rapidfire_automl.cli", *words]
    done = subprocess.run(
        command, capture_output=True, text=True, env=ENVIRONMENT, cwd=folder, timeout=120, check=False
    )
    return done.returncode, done.stdout + done.stderr


FOLDER, STUDY = ("--wait", "60"), ("--study", "steered", "--storage", "sqlite:///study.db", "--wait", "60")


def test_from_other_terminals(tmp_path: Path) -> None:
    """Pause, clone, halve the learning rate, warm-start, resume a trial that would train for long; races between."""
    sums(16, seed=3).repeat(64).to_json(tmp_path / "train.jsonl")
    sums(16, seed=3).to_json(tmp_path / "eval.jsonl")
    (tmp_path / "search.toml").write_text(SEARCH.format(model=MODEL))
    run_dir = tmp_path / "runs" / "search"
    search = subprocess.Popen(
        [sys.executable, "-m", "rapidfire_automl.cli", "run", "search.toml", "--out", str(run_dir), "--quiet"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT, cwd=tmp_path,
    )  # fmt: skip
    try:
        wait_for(search, run_dir, lambda told: any(e["kind"] == "chunk_done" and e["chunk"] == 3 for e in told))
        paused_and_cloned(search, tmp_path, run_dir)
        raced(tmp_path, run_dir)
        refusals(tmp_path, run_dir)  # what is left is paused by hand: the search idles
        code, words = say(tmp_path, "resume", "0", *STUDY)
        assert code == 0, words
        assert "applied: goes on, at step" in words
        assert say(tmp_path, "cancel", *FOLDER)[1].endswith(CANCELLED)
        assert search.wait(60) == 0
    finally:
        search.kill()
    told = commands(run_dir)
    user, host = getpass.getuser(), socket.gethostname()
    assert all(re.fullmatch(rf"(command line|Python), {user}, process \d+.* of {host}", c["source"]) for c in told)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "cancelled"
    source, clone = summary["trials"]
    assert clone["params"]["learning_rate"] == source["params"]["learning_rate"] / 2
    assert Path(source["adapter"], "adapter_model.safetensors").is_file(), "cancelled, but what it has learnt is kept"
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    cloned = next(i for i, e in enumerate(events) if e["kind"] == "command" and e["data"]["verb"] == "clone")
    done = sum(e["kind"] == "chunk_done" for e in events[:cloned])
    before, after, untrained = source["values"][done - 1], clone["values"][0], summary["base_value"]
    assert abs(after - before) < 0.5 * abs(untrained - before), "it begins where its source is"
    with pytest.raises(ControlError, match="runs no more: the search was cancelled"):
        Search(run_dir).pause(0)
    assert stat.S_IMODE((run_dir / "commands").stat().st_mode) == 0o700


CANCELLED = (
    "sent: cancel\napplied: the search ends now; what has finished stays, and so do the adapters of trials under way\n"
)


def paused_and_cloned(search: subprocess.Popen[str], folder: Path, run_dir: Path) -> None:
    """Pause, clone, halve the learning rate, warm-start; through the run folder and through the study."""
    code, words = say(folder, "pause", "0", *FOLDER)
    assert code == 0, words
    assert "run folder: runs/search\nsent: pause 0\napplied: paused, at " in words
    code, words = say(folder, "clone", "0", "--set", "learning_rate=/2", "--warm-start", *STUDY)
    assert code == 0, words
    assert "applied: trial 1 is next in line for a slot" in words
    wait_for(search, run_dir, lambda told: any(e["kind"] == "chunk_done" and e["trial"] == 1 for e in told))


def refusals(folder: Path, run_dir: Path) -> None:
    """What can't be is said, and the exit code says so."""
    code, words = say(folder, "set-policy", "os:system", *FOLDER)
    assert code == 1
    assert "refused: `policy` 'os:system' would import code that the search has not been started with" in words
    for sent, why in (
        (Search(run_dir).resume(1), "trial 1 was stopped"),
        (Search(run_dir).pause(0), "trial 0 is paused by hand already"),
        (Search(run_dir).stop(7), "trial 7 is unknown: there are 0 to 1"),
    ):
        effect = sent.wait(60)
        assert effect is not None
        assert (effect.state, effect.text) == ("refused", why)


RACER = """
import json, random, sys
from rapidfire_automl import Search
from rapidfire_automl.control import Command
how, seed = sys.argv[1:]
search = Search("runs/search") if how == "folder" else Search(study="steered", storage="sqlite:///study.db")
draw, sent = random.Random(seed), []
print("ready", flush=True)
sys.stdin.readline()
for k in range(5):
    for verb in draw.sample(["pause", "resume", "pause", "resume"], 4):
        sent.append(search._send(Command(verb, 1)))
    verb = draw.choice(["pause", "resume"])
    sent.append(search._send(Command(verb, 1, id=f"both-{k}")))
sent.append(search.stop(1))
sent.append(search._send(Command("stop", 1, id="both-stop")))
sent.append(search.resume(1))
effects = [one.wait(60) for one in sent]
print(json.dumps([[one.command.id, effect.state, effect.text] for one, effect in zip(sent, effects)]))
"""


def raced(folder: Path, run_dir: Path) -> None:
    """Two terminals want different things of trial 1 at once, some by the same ids, one through the run folder and one
    through the study: each command is applied once or refused with its reason, as if they had come one after another."""
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, how, seed],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=folder,
        )
        for how, seed in (("folder", "a"), ("study", "b"))
    ]  # fmt: skip
    for racer in racers:
        assert racer.stdout is not None and racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    heard = [json.loads(racer.communicate(timeout=120)[0]) for racer in racers]
    answers = [{name: effect for name, *effect in one} for one in heard]
    told = [c for c in commands(run_dir) if c["id"] in answers[0].keys() | answers[1].keys()]
    assert len(told) == len({c["id"] for c in told}) == 2 * 28 - 6, "each once, doubled ids too"
    for name in answers[0].keys() & answers[1].keys():
        assert answers[0][name] == answers[1][name], "one effect, and both hear of it"
    logged = {c["id"]: [c["effect"], c["text"]] for c in told}
    assert all(logged[name] == effect for answer in answers for name, effect in answer.items())
    check_race(told)


def check_race(told: list[dict[str, Any]]) -> None:
    """The log of commands to one trial, in its order, is one that `control.py` allows."""
    paused = stopping = False
    assert [c["effect"] for c in told if c["verb"] == "stop"].count("applied") == 1
    for command in told:
        verb, applied, text = command["verb"], command["effect"] == "applied", command["text"]
        stop_waits = text in ("trial 1 is being stopped", "a stop came before it took effect")
        stopping = stopping or stop_waits or verb == "stop"
        if stopping:  # the stop itself is logged when it takes effect
            assert applied == text.startswith("stopped, ")
            assert applied or stop_waits or text == "trial 1 was stopped"
        elif text == "withdrawn by a resume before it took effect":
            assert verb == "pause" and applied and not paused
        elif verb == "pause":
            assert applied or text == "trial 1 is paused by hand already"
            assert not (applied and paused)
            paused = paused or applied
        else:
            assert text.startswith(("goes on", "trains on") if applied else ("trial 1 is training", "trial 1 has been"))
            paused = paused and not applied
    assert stopping


def wait_for(search: subprocess.Popen[str], run_dir: Path, seen: Callable[[list[dict[str, Any]]], bool]) -> None:
    """Wait until the search has told something."""
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        assert search.poll() is None, search.stdout and search.stdout.read()
        path = run_dir / "events.jsonl"
        if path.exists():
            lines = path.read_text().split("\n")[:-1]
            if seen([json.loads(line) for line in lines]):
                return
        time.sleep(0.1)
    raise TimeoutError("nothing happened")


def test_an_experiment_is_steered_by_its_own_verbs(tmp_path: Path) -> None:
    from rapidfire_automl import AutoML, Range

    search = AutoML(
        str(MODEL),
        space={"learning_rate": Range(1e-4, 1e-2, log=True), "r": 4, "max_steps": 8, "bf16": False, "use_cpu": True},
        sampler="random",
        policy=None,
        slots=2,
        chunks=2,
        n_trials=2,
        experiments_path=tmp_path,
        executor_options={"plan": PLAN},
    )
    with pytest.raises(ControlError, match="steers a search that runs: none does"):
        search.pause(0)
    sent: list[Any] = []

    def act(event: Event) -> None:
        if event.kind == "step" and event.trial == 0 and event.data["step"] == 2:
            sent.append(search.stop(0))

    search.add_listener(act)
    fit = search.fit(sums(16), sums(8, seed=1))
    assert sent[0].effect.text.startswith("stopped, at step 2 of 8, in chunk 1 of 2")
    assert [trial["state"] for trial in fit.searches[0].result.summary["trials"]] == ["stopped", "complete"]
