"""Faults tried, survived, and the work that was lost by them: each kind several times, on a small real model.

    python experiments/durability/faults.py            # minutes on a CPU; writes faults.json and prints README's table
    python experiments/durability/faults.py --times 20

A search of a few trials runs in a process of its own; something happens to it at a moment that a seed draws, and where
its process is gone the same call goes on with it. It has *survived* if all trials end as in a search that nobody
disturbed: the same verdicts for the same reasons, and, one trial a pass, the same adapters to the last bit; where the
fault is one trial's own, all the others do. Work is lost where optimizer steps are done again: `again_chunks` is the
most that one trial has done again, in chunks, and `again_s` the seconds of all of them at the pace of the undisturbed
search; means and largest over the times a fault was tried.
"""

from __future__ import annotations

import argparse
import random
import signal
import statistics
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[1] / "policies")]

from experiments import provenance  # noqa: E402
from rapidfire_automl.event_log import read_events  # noqa: E402
from tests.executor import resumable  # noqa: E402
from tests.executor.forking import Forked  # noqa: E402

Fault = Callable[["Case"], dict[str, Any]]


class Case:
    """One search and what is done to it.

    Args:
        folder: Of its own.
        draw: Of its own.
        whole: The undisturbed search.
        options: Of `resumable.run`.
    """

    def __init__(self, folder: Path, draw: random.Random, whole: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        self.folder, self.draw, self.whole, self.options = folder, draw, whole, dict(options)
        folder.mkdir(parents=True)

    def start(self, failpoints: str = "", **more: Any) -> Forked:
        """Begin, or go on."""
        storage = f"sqlite:///{self.folder / 'study.db'}"
        given = {**self.options, **more}
        return Forked(resumable.run, self.folder / "out", storage, failpoints=failpoints, **given)

    @property
    def steps(self) -> int:
        """Of the undisturbed search."""
        return sum(self.whole["steps"].values())

    def some_step(self) -> int:
        """Any but the last."""
        return self.draw.randint(1, self.steps - 1)

    def some_step_amid_a_chunk(self) -> int:
        """Of the first two trials, in turns, at which both have a checkpoint and end no chunk with their next step."""
        length = self.steps // (self.options["n_trials"] * self.options["chunks"])
        chunk = self.draw.randint(1, self.options["chunks"] - 1)
        return 2 * length * chunk + self.draw.randint(1, 2 * length - 4)


def kill(case: Case) -> dict[str, Any]:
    """Between the first step and the last, by the clock."""
    process = case.start()
    process.until(lambda: (case.folder / "out" / "events.jsonl").exists() and bool(steps_of(case.folder)))
    if not process.ends_within(case.draw.uniform(0.0, case.whole["training_s"])):
        process.send(signal.SIGKILL)
    process.wait()
    return dict(case.start().result())


def kill_at_a_step(case: Case) -> dict[str, Any]:
    case.start(f"step=kill@{case.some_step()}").killed()
    return dict(case.start().result())


def kill_while_writing(case: Case) -> dict[str, Any]:
    places = ["checkpoint.writing", "checkpoint.renaming", "checkpoint.replacing", "checkpoint.renamed"]
    place = case.draw.choice(places)
    if place == "checkpoint.replacing":  # which only a trial comes to that is put on disk amid a chunk, as by SIGTERM
        case.start(f"{place}=kill@{case.draw.randint(1, 2)}", term_at=case.some_step_amid_a_chunk()).killed()
    else:
        case.start(f"{place}=kill@{case.draw.randint(2, 6)}").killed()
    return dict(case.start().result())


def kill_around_a_verdict(case: Case) -> dict[str, Any]:
    place = case.draw.choice(["round.reported", "round.judging", "round.judged", "trial.ended"])
    case.start(f"{place}=kill@{case.draw.randint(1, 2)}").killed()
    return dict(case.start().result())


def terminate(case: Case) -> dict[str, Any]:
    process = case.start(term_at=case.some_step())
    assert process.wait() == 128 + signal.SIGTERM, process.err
    return dict(case.start().result())


def damage(case: Case) -> dict[str, Any]:
    """Killed while trials have checkpoints; the newest is truncated, a bit of it flipped, or a pickle planted in it."""
    case.start(f"step=kill@{case.draw.randint(case.steps // 3, case.steps // 2)}").killed()
    newest = max(case.folder.glob("out/trials/*/checkpoints/chunk-*"), key=lambda path: path.name)
    file = newest / "tensors.safetensors"
    content = bytearray(file.read_bytes())
    how = case.draw.choice(["truncated", "flipped", "planted"])
    if how == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif how == "flipped":
        content[case.draw.randrange(len(content))] ^= 1 << case.draw.randrange(8)
        file.write_bytes(content)
    else:
        (newest / "optimizer.pt").write_bytes(b"\x80\x04K\x01.")
    return dict(case.start().result())


def full_disk(case: Case) -> dict[str, Any]:
    """Files may not grow as large as a checkpoint, until a step."""
    return dict(case.start(file_limit_bytes=400_000, lifted_at=case.some_step()).result())


def out_of_memory(case: Case) -> dict[str, Any]:
    return dict(
        case.start(f"pass.forward=oom@{case.draw.randint(1, 9)},pass.backward=oom@{case.draw.randint(1, 9)}").result()
    )


def not_a_number(case: Case) -> dict[str, Any]:
    return dict(case.start(poisoned=case.draw.randrange(case.options["n_trials"])).result())


def error(case: Case) -> dict[str, Any]:
    return dict(case.start(raising=case.draw.randrange(case.options["n_trials"])).result())


KINDS: dict[str, tuple[Fault, str]] = {
    "kill -9 at any moment": (kill, ""),
    "kill -9 between two steps": (kill_at_a_step, ""),
    "kill -9 while a checkpoint is written": (kill_while_writing, ""),
    "kill -9 around a verdict": (kill_around_a_verdict, ""),
    "SIGTERM": (terminate, ""),
    "kill -9 and a damaged checkpoint": (damage, ""),
    "no room for checkpoints for a while": (full_disk, "wide"),
    "out of memory": (out_of_memory, ""),
    "NaN in one trial": (not_a_number, "one"),
    "an exception in one trial": (error, "one"),
}
"""What happens, and whether checkpoints are to be large ("wide") or the fault is one trial's own ("one")."""


def steps_of(folder: Path) -> Counter[int]:
    """Optimizer steps done, by trial, over all processes."""
    events = (line.event for line in read_events(folder / "out").lines)
    return Counter(event.trial for event in events if event.kind == "step" and event.trial is not None)


def survived(found: Mapping[str, Any], whole: Mapping[str, Any], *, one: bool) -> bool:
    """Whether all trials have ended as in the undisturbed search; all but one, where the fault is that one's own."""
    differ = [number for number, trial in whole["trials"].items() if found["trials"].get(number) != trial]
    if one:
        return len(differ) == 1 and found["trials"][differ[0]]["state"] == "FAILED"
    return not differ and found["log"] == whole["log"]


def main() -> None:
    """Try all kinds, and write `faults.json`."""
    config = tomllib.loads((HERE / "config.toml").read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=config["faults"]["times"])
    parser.add_argument("--out", type=Path, default=HERE / "faults.json")
    given = parser.parse_args()
    options = {"policy": "nop", "n_trials": config["faults"]["trials"], "chunks": config["faults"]["chunks"]}
    results: dict[str, Any] = {**provenance.provenance(), "config": config, "times": given.times, "status": "running"}
    results["kinds"] = {}
    with tempfile.TemporaryDirectory(prefix="faults-") as scratch:
        wholes = {}
        for name in ("", "wide"):
            case = Case(
                Path(scratch, f"whole-{name}"), random.Random(0), {}, options | ({"wide": True} if name else {})
            )
            wholes[name] = dict(case.start().result())
            wholes[name]["steps"] = steps_of(case.folder)
            times = [line.event.time_s for line in read_events(case.folder / "out").lines if line.event.kind == "step"]
            wholes[name]["training_s"] = times[-1] - times[0]
        steps_a_chunk = max(wholes[""]["steps"].values()) / options["chunks"]
        for place, (kind, (fault, how)) in enumerate(KINDS.items()):
            whole = wholes["wide" if how == "wide" else ""]
            step_s = whole["training_s"] / sum(whole["steps"].values())
            tries: list[dict[str, Any]] = []
            for time in range(given.times):
                draw = random.Random(f"{config['seed']} {place} {time}")
                more = {"wide": True} if how == "wide" else {}
                case = Case(Path(scratch, f"{place}-{time}"), draw, whole, {**options, **more})
                entry: dict[str, Any] = {"survived": False, "again_chunks": None, "again_s": None, "why": None}
                try:
                    entry["survived"] = survived(fault(case), whole, one=how == "one")
                except (AssertionError, TimeoutError) as failure:
                    entry["why"] = str(failure)[-500:]
                again = [max(0, steps - whole["steps"][trial]) for trial, steps in steps_of(case.folder).items()]
                entry |= {"again_chunks": max(again) / steps_a_chunk, "again_s": sum(again) * step_s}
                tries.append(entry)
            results["kinds"][kind] = {"tries": tries, **summary(tries)}
            provenance.write(given.out, results)
    results["status"] = "complete"
    provenance.write(given.out, results)
    print(table(results))


def summary(tries: list[dict[str, Any]]) -> dict[str, Any]:
    """A kind's numbers."""
    return {
        "tried": len(tries),
        "survived": sum(entry["survived"] for entry in tries),
        "again_chunks_mean": statistics.mean(entry["again_chunks"] for entry in tries),
        "again_chunks_most": max(entry["again_chunks"] for entry in tries),
        "again_s_mean": statistics.mean(entry["again_s"] for entry in tries),
    }


def table(results: Mapping[str, Any]) -> str:
    """README's table."""
    lines = ["| what happens | tried | survived | done again, chunks a trial (most) |", "|---|---|---|---|"]
    for kind, found in results["kinds"].items():
        again = f"{found['again_chunks_mean']:.2f} ({found['again_chunks_most']:.2f})"
        lines.append(f"| {kind} | {found['tried']} | {found['survived']} | {again} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
