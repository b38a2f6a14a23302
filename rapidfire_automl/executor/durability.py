"""What makes a search survive its process: checkpoints of its trials, a journal of its decisions, and how it goes on.

At a boundary a trial's whole state is handed to a writer, which works while others train; also at the end of another
step where somebody asks for that, or SIGTERM ends the search. Its verdict is in the journal before it takes effect.
After a kill each trial goes on from its newest checkpoint that is whole: what was judged later is not judged again,
only trained again; what was trained but not judged is judged first. A trial's checkpoint is on the disk before its next
chunk is done, so at most one chunk of each trial, and what had begun of the next, is done twice.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import TrialState as OptunaState

from rapidfire_automl import attempts, failpoints
from rapidfire_automl.attempts import VECTORS_ATTR
from rapidfire_automl.disk import make_folder, write_once
from rapidfire_automl.events import warn
from rapidfire_automl.executor.arm import Arm
from rapidfire_automl.executor.checkpoints import Snapshot, chunk_folder, disk_bytes, newest
from rapidfire_automl.executor.evaluation import Measured
from rapidfire_automl.executor.fingerprints import fingerprint_of_data
from rapidfire_automl.executor.journal import NAME, Journal, Past, differences
from rapidfire_automl.executor.ledger import Ledger
from rapidfire_automl.executor.rounds import Said
from rapidfire_automl.executor.writing import Trouble, Writer, Written
from rapidfire_automl.records import TrialRecord
from rapidfire_automl.refusals import SearchDiffers
from rapidfire_automl.seeding import reseed, seed_of
from rapidfire_policies.base import Decision, TrialState

logger = logging.getLogger("rapidfire_automl")

_KEEP = 2
"""Checkpoints of a trial that are kept: the newest, and the one to fall back to if it is damaged."""
_ENDED = "ended"
_CHECKPOINTS = "checkpoints"
_OWNER = "study.txt"


@dataclass(slots=True)
class Restored:
    """What a trial goes on from.

    Args:
        snapshot: Its checkpoint, or None where it had none: it begins anew.
        attempt: Which attempt this is, from 1.
    """

    snapshot: Snapshot | None
    attempt: int

    @property
    def trained(self) -> int:
        """Chunks that the checkpoint has behind it."""
        return 0 if self.snapshot is None else int(self.snapshot.tree["trained"])


@dataclass(slots=True)
class Unfinished:
    """A trial that goes on.

    Args:
        trial: Its new attempt.
        record: Its story so far.
        judged: Chunks on which there is a verdict.
        final: The last of them, if it is the trial's end.
        ruling: The last of them, if a person has paused the trial or wants it back.
        restored: What it goes on from.
        extensions: Steps at which people have extended it, and where its chunks end since.
    """

    trial: optuna.Trial
    record: TrialRecord
    judged: int
    final: Decision | None
    ruling: Decision | None
    restored: Restored
    extensions: list[tuple[int, list[int]]]

    def arm_of(self, make: Callable[..., Arm]) -> Arm:
        """An arm that stands where the trial does.

        Args:
            make: Makes an arm of a trial and its record.
        """
        arm = make(self.trial, self.record)
        arm.judged, arm.final, arm.restored = self.judged, self.final, self.restored
        arm.trained, arm.ruling, arm.extensions = self.restored.trained, self.ruling, self.extensions
        if self.restored.snapshot is not None:
            for name, value in self.restored.snapshot.tree["within"].items():
                setattr(arm, name, value)
        return arm


@dataclass(slots=True)
class Spent:
    """What checkpoints have cost.

    Args:
        checkpoints: Written.
        written_bytes: Of all of them.
        disk_bytes: Of those that are kept.
        packing_s: That training has waited while states were copied, and for the writer where it was behind.
        writing_s: That the writer has taken, beside training.
    """

    checkpoints: int = 0
    written_bytes: int = 0
    disk_bytes: int = 0
    packing_s: float = 0.0
    writing_s: float = 0.0


class Durability:
    """A search's folder.

    Args:
        folder: Where trials' files go.
        tell: Emits an event (kind, arm or None, data).
        journal: Where decisions go: a journal in the folder, which is this process's alone, or the ledger of a study
            that several workers share.
    """

    def __init__(self, folder: Path, tell: Callable[..., None], journal: Journal | Ledger) -> None:
        self._folder = folder
        self._tell = tell
        self._journal = journal
        self.past = journal.past if isinstance(journal, Journal) else Past()
        self._writer = Writer(keep=_KEEP, on_written=self._written, on_trouble=self._trouble)
        self._on = False
        self.sampler_seed = 0
        self._spent = Spent()
        self._sizes: dict[Path, int] = {}
        self._fingerprints: dict[int, dict[str, Any]] = {}
        self._over_there: dict[Path, Path] = {}
        self._late: dict[Path, TrialRecord] = {}
        self._journal_waits = False

    # -- beginning and ending ------------------------------------------------------------------------------------------

    def begin(self, study: optuna.Study, facts: Mapping[str, Any], *, more: bool = True) -> Past | None:
        """Begin a search, or find what is left of it.

        Args:
            study: Its study.
            facts: What is searched, to compare.
            more: Whether one that has come to its end is followed by a new one, not gone on with.

        Returns:
            What an earlier process has left, or None if there is nothing to go on with.

        Raises:
            SearchDiffers: There is a search to go on with, but of something else.
        """
        assert isinstance(self._journal, Journal)
        past = self.past = self._journal.past
        same = is_same(self._folder, past, study)
        self._say_damaged(past)
        mine = {**facts, "study": study.study_name}
        unfinished = same and not (past.over and more)
        if unfinished and (differ := differences(past.facts, mine)):
            raise SearchDiffers(
                f"The search in {self._folder} can't go on: {'; '.join(differ)}. Set it back, or take another folder."
            )
        self._on = True
        if not same:
            self._forget()
        if not unfinished:
            self.past = Past()
        self.sampler_seed = past.sampler_seed if unfinished else seed_of(study.sampler)
        self._write("search", facts=mine, sampler_seed=self.sampler_seed, anew=not unfinished)
        return past if unfinished else None

    def _say_damaged(self, past: Past) -> None:
        if past.damaged:
            message = (
                f"Lines of the journal in {self._folder} that are damaged and left out: "
                f"{', '.join(map(str, past.damaged))}. A trial that was begun there stays running in the study and is "
                "not gone on with; what was decided there is decided again."
            )
            warn(self._tell, message)

    def join(self, facts: Mapping[str, Any]) -> None:
        """Work on a search with others.

        Raises:
            SearchDiffers: They search something else, or the folder is another search's.
        """
        assert isinstance(self._journal, Ledger)
        search, self.sampler_seed = self._journal.agree(facts)
        owner = self._folder / _OWNER
        make_folder(owner.parent)
        if not owner.exists():
            write_once(owner, search)
        if (other := owner.read_text(encoding="utf-8")) != search:
            raise SearchDiffers(f"{self._folder} holds the search {other}, this is {search}. Take another folder.")
        self._on = True

    def _forget(self) -> None:
        """Remove what another search that is over has left."""
        for leftover in (self._folder / "trials").glob("*"):
            self._forget_trial(leftover)

    def _forget_trial(self, folder: Path) -> None:
        for leftover in [folder / _ENDED, *folder.glob(f"{_CHECKPOINTS}*")]:
            shutil.rmtree(leftover, ignore_errors=True)

    def over(self) -> None:
        """The search has come to its end: what waits for room on the disk is tried once more."""
        if not self._on:
            return
        if self._late:
            self._writer.settle()  # what ended trials leave behind is removed on the way, and makes room
            waiting = self._writer.settle()
            for folder in [folder for folder in self._late if folder in waiting]:
                record = self._late.pop(folder)
                record.adapter = None
                message = f"the adapter of trial {record.number} could not be written: the disk is full"
                logger.error(
                    "%s; what is left of it is in %s.", message[0].upper() + message[1:], self._of(record.number)
                )
                self._tell("warning", None, message=message)
        self._write("over")
        self._on = False

    def flush(self) -> None:
        """Wait until what is to be written is, so that others can go on from there."""
        self._writer.flush(timeout=60.0)

    def close(self, timeout_s: float | None = None) -> None:
        """Write what is left to write, for so long at most, and let others in."""
        self._writer.close(timeout_s)
        self._journal.close()

    # -- as it goes ----------------------------------------------------------------------------------------------------

    def asking(self) -> None:
        """Optuna is about to be asked for a trial; should the process be killed now, there may be one nobody knows."""
        if self._on:
            self._write("asking")

    def asked(self, number: int) -> None:
        """A trial is begun for the first time."""
        if self._on:
            failpoints.hit("trial.asking")
            self._forget_trial(self._of(number))
            self._write("asked", trial=number)
            failpoints.hit("trial.asked")

    def built(self, number: int) -> None:
        """A trial has all of its parameters; until then they are proposed anew where its process is killed."""
        if self._on:
            with suppress(OSError):  # on a full disk, who writes there makes it
                make_folder(self._of(number))  # before a trainer does, which would not have its name on the disk
            self._write("built", trial=number)

    def note(self, kind: str, **data: Any) -> frozenset[int]:
        """Put something into the journal; it takes effect after this.

        Returns:
            The numbers of the trials that others have taken over: what was decided of them is void.
        """
        return self._write(kind, **data) if self._on else frozenset()

    def judged(self, verdicts: list[tuple[int, int, str, str]], said: Sequence[Said] = ()) -> frozenset[int]:
        """A round is over; the verdicts take effect, and are told, after this.

        Returns:
            As `note`.
        """
        if not self._on:
            return frozenset()
        failpoints.hit("round.judging")
        lost = self._write("round", verdicts=verdicts, said=said)
        failpoints.hit("round.judged")
        return lost

    @property
    def folder(self) -> Path:
        """Where the search's files go."""
        return self._folder

    def _write(self, kind: str, **data: Any) -> frozenset[int]:
        """Write to the journal; that the disk is full is said once.

        Returns:
            The numbers of the trials that others have taken over.
        """
        kept = self._journal.write(kind, **data)
        if kept.waits and not self._journal_waits:
            logger.warning("The journal in %s can't be written (%s); it waits in memory.", self._folder, kept.waits)
            self._tell("writing_paused", None, folder=str(self._folder), reason=f"the journal waits ({kept.waits})")
        self._journal_waits = bool(kept.waits)
        return kept.lost

    @property
    def is_on(self) -> bool:
        """Whether a search is under way that is to survive."""
        return self._on

    def save(self, arm: Arm, trainer: Any, take: Callable[[], Snapshot]) -> None:
        """Hand a trial's state to the writer; it takes the place of an earlier one in the same chunk.

        Args:
            arm: At a boundary, its chunk recorded, or at the end of another step.
            trainer: Its trainer.
            take: Gives the trainer's state.
        """
        if not self._on:
            return
        begin = time.perf_counter()
        self._writer.catch_up(self._checkpoints(arm.number, arm.attempt))  # else a kill might cost two chunks
        snapshot = take()
        tree = {
            **snapshot.tree,
            "record": to_tree(arm.record),
            "data": self._data(arm.number, trainer),
            "trained": arm.trained,
            "within": arm.within_chunk(),
        }
        folder = chunk_folder(self._checkpoints(arm.number, arm.attempt), arm.trained)
        self._writer.submit(folder, replace(snapshot, tree=tree))
        self._spent.packing_s += time.perf_counter() - begin

    def _data(self, number: int, trainer: Any) -> dict[str, Any]:
        """The fingerprint of a trial's data sets, taken once."""
        if number not in self._fingerprints:
            self._fingerprints[number] = fingerprint_of_data(trainer)
        return self._fingerprints[number]

    def ended(self, arm: Arm, kind: str, vector: Sequence[float], reason: str) -> None:
        """A trial is through, whatever came of it: keep its story, drop its checkpoints."""
        if not self._on:
            return
        number = arm.number
        lost = self._write(
            "ended", trial=number, outcome=kind, vector=list(vector), reason=reason, adapter=arm.record.adapter
        )
        if lost:
            arm.lost = True
            return
        failpoints.hit("trial.ended")
        folder = chunk_folder(self._of(number) / _ENDED, len(arm.record.values))
        self._over_there[folder] = self._checkpoints(number, arm.attempt)
        self._writer.submit(folder, Snapshot({"record": to_tree(arm.record)}, {}, {}))

    def adapter(self, arm: Arm, folder: Path, snapshot: Snapshot) -> bool:
        """Keep a finished adapter for which the disk has no room yet; says whether that is done."""
        if self._on:
            self._writer.submit_adapter(folder, snapshot)
            self._late[folder] = arm.record
        return self._on

    def base(self, measured: Measured) -> None:
        """Keep what the untrained base is worth."""
        folder = chunk_folder(self._folder / "base", 0)
        if self._on and not (isinstance(self._journal, Ledger) and folder.exists()):
            tree = {"vector": list(measured.vector), "scores": measured.scores}
            self._writer.submit(folder, Snapshot(tree, {}, {}))

    def _written(self, written: Written) -> None:
        spent, parent = self._spent, written.folder.parent
        spent.checkpoints += 1
        spent.written_bytes += written.bytes
        spent.writing_s += written.seconds
        self._sizes[written.folder] = written.bytes
        for name in written.removed:
            self._sizes.pop(parent / name, None)
        if written.folder in self._over_there:  # the trial's story is safe, its weights nobody needs
            last = self._over_there.pop(written.folder)
            self._writer.drop(last)
            for weights in {last, *last.parent.glob(f"{_CHECKPOINTS}*")}:
                self._remove(weights)
        elif len(list(parent.glob("chunk-*"))) >= _KEEP:
            for number in range(1, _attempt_of(parent)):
                self._remove(parent.parent / _named(number))
        spent.disk_bytes = sum(self._sizes.values())
        self._tell(
            "checkpoint",
            None,
            folder=str(written.folder),
            bytes=written.bytes,
            seconds=written.seconds,
            disk_bytes=spent.disk_bytes,
        )

    def _remove(self, checkpoints: Path) -> None:
        shutil.rmtree(checkpoints, ignore_errors=True)
        self._sizes = {folder: size for folder, size in self._sizes.items() if folder.parent != checkpoints}

    def _trouble(self, trouble: Trouble) -> None:
        self._tell(f"writing_{trouble.kind}", None, folder=str(trouble.folder), reason=trouble.reason)

    @property
    def spent(self) -> Spent:
        """What checkpoints have cost so far."""
        return replace(self._spent)

    def _of(self, number: int) -> Path:
        return self._folder / "trials" / str(number)

    def _checkpoints(self, number: int, attempt: int) -> Path:
        """Each attempt has a folder of its own: a worker that was taken for dead may still be writing to its one."""
        return self._of(number) / _named(attempt)

    # -- going on ------------------------------------------------------------------------------------------------------

    def restore_base(self) -> Measured | None:
        """What the untrained base was worth, if it is known."""
        found = self._newest(self._folder / "base")
        if found is None:
            return None
        return Measured(tuple(found.tree["vector"]), np.asarray(found.tree["scores"]))

    def go_on(self, study: optuna.Study, past: Past) -> tuple[list[TrialRecord], list[Unfinished]]:
        """Take up a search: finish what was decided, and have new attempts made of what was not finished.

        Args:
            study: Its study.
            past: What the journal says.

        Returns:
            The records of trials that have ended, and the trials that go on, both in trial order.
        """
        over: list[TrialRecord] = []
        going: list[Unfinished] = []
        if past.asking:
            self._find_unknown(study, past)
        kept = self._folder.glob("trials/*/*/chunk-*")
        self._sizes = {folder: disk_bytes(folder) for folder in kept}
        last = attempts.last_attempts(study)
        for number in sorted(past.asked):
            trial = last[number]
            reseed(study.sampler, self.sampler_seed, past.asked.index(number))
            if number in past.ended:
                over.append(self._over(study, trial, past))
                continue
            if trial.state is OptunaState.RUNNING:
                waiting = attempts.retry(study, trial, inherit=number in past.built)
            elif trial.state is OptunaState.FAIL:
                waiting = attempts.again(study, trial, inherit=number in past.built)
            elif trial.state is OptunaState.WAITING:
                waiting = trial
            else:  # told, but its end not journaled: there is nothing left to do
                over.append(self._over(study, trial, past))
                continue
            begun = None if waiting is None else attempts.take(study, waiting)
            if begun is not None:
                going.append(self._unfinished(begun, number, past))
        return over, going

    def take_up(self, trial: optuna.Trial, number: int) -> TrialRecord | Unfinished | None:
        """Take up a trial that this worker has claimed.

        Args:
            trial: This worker's attempt.
            number: The trial's.

        Returns:
            None if it is new; its record if its end was decided before, of which Optuna is told here; else what it goes
            on from.
        """
        assert isinstance(self._journal, Ledger)
        past = self._journal.open(number, trial)
        if attempts.attempt_of(trial) == 1:
            return None
        if number in past.ended:
            return self._over(trial.study, trial.storage.get_trial(trial._trial_id), past)
        return self._unfinished(trial, number, past)

    def _find_unknown(self, study: optuna.Study, past: Past) -> None:
        """A trial that Optuna has handed out, and whose process was killed before that was in the journal."""
        for trial in study.get_trials(deepcopy=False, states=(OptunaState.RUNNING,)):
            unknown = attempts.number_of(trial) not in past.asked
            if unknown and not trial.params and not trial.intermediate_values:
                number = attempts.label(study, trial)
                past.asked.append(number)
                self.asked(number)
                return

    def _over(self, study: optuna.Study, trial: optuna.trial.FrozenTrial, past: Past) -> TrialRecord:
        """The record of a trial that has ended; Optuna is told if it has not been."""
        number = attempts.number_of(trial)
        ended = past.ended.get(number, {})
        found = self._newest(self._of(number) / _ENDED) or self._last(number, attempts.attempt_of(trial))
        record = TrialRecord(number) if found is None else from_tree(found.tree["record"])
        record.params = record.params or dict(trial.params)
        record.verdicts = list(past.verdicts.get(number, []))
        _fill(record, trial, past.judged.get(number, 0))
        kind = ended.get("outcome")
        if kind is not None:
            states = {"complete": TrialState.COMPLETE, "pruned": TrialState.STOPPED}
            record.state = states.get(kind, TrialState.FAILED)
            record.adapter = self._adapter(number, attempts.attempt_of(trial), ended.get("adapter"))
            record.error = record.error or (ended.get("reason") if kind == "failed" else None)
            if not trial.state.is_finished():
                vector = [float(value) for value in ended["vector"]]
                state = {"complete": OptunaState.COMPLETE, "pruned": OptunaState.PRUNED}.get(kind, OptunaState.FAIL)
                study.tell(trial.number, vector if state is OptunaState.COMPLETE else None, state=state)
        return record

    def _adapter(self, number: int, attempt: int, folder: str | None) -> str | None:
        """A finished adapter; the last checkpoint has it, too, if its process was killed while it waited for room."""
        if folder is None or Path(folder).is_dir():
            return folder
        found = self._last(number, attempt)
        if found is None or int(found.tree["trained"]) < len(found.tree["record"]["boundaries"]):
            logger.warning("Trial %d: its adapter was lost with the process; the disk was full.", number)
            return None
        self._writer.submit_adapter(Path(folder), found)
        self._writer.flush(60.0)
        return folder

    def _unfinished(self, trial: optuna.Trial, number: int, past: Past) -> Unfinished:
        found = self._last(number, attempts.attempt_of(trial))
        record = TrialRecord(number) if found is None else from_tree(found.tree["record"])
        record.params = record.params or dict(trial.params)
        record.verdicts = list(past.verdicts.get(number, []))
        record.state = TrialState.PAUSED if past.is_paused(number) else TrialState.RUNNING
        record.error = None
        judged = past.judged.get(number, 0)
        _fill(record, trial.study.get_trials(deepcopy=False)[trial.number], judged)
        return Unfinished(
            trial,
            record,
            judged,
            past.final(number),
            past.ruling(number),
            Restored(found, attempts.attempt_of(trial)),
            past.extended.get(number, []),
        )

    def _last(self, number: int, attempt: int) -> Snapshot | None:
        """A trial's newest checkpoint: of its last attempt that has left any."""
        alone = isinstance(self._journal, Journal)
        folders = [self._checkpoints(number, earlier) for earlier in range(attempt, 0, -1)]
        return next((found for folder in folders if (found := self._newest(folder, tidy=alone)) is not None), None)

    def _newest(self, folder: Path, *, tidy: bool = True) -> Snapshot | None:
        if not folder.is_dir():
            return None
        found = newest(folder, tidy=tidy)
        for path, why in found.damaged:
            self._tell("checkpoint_damaged", None, folder=str(path), reason=why)
        return found.snapshot


def is_same(folder: Path, past: Past, study: optuna.Study) -> bool:
    """Whether what a folder's journal tells of is a study's search.

    Args:
        folder: The search's.
        past: What the journal says.
        study: The study.

    Raises:
        SearchDiffers: It is another one, or nobody knows any more which, and it has not come to its end.
    """
    before, known = past.facts.get("study"), attempts.last_attempts(study) if past.asked else {}
    missing = [number for number in past.asked if number not in known]
    if before == study.study_name and not missing:
        return True
    if past.over:
        return False
    fix = "Open its study in the storage where it was"
    if before is not None and before != study.study_name:
        why = f"its study is {before}, this one is {study.study_name}"
    elif before is not None:
        why = f"study {before} lacks trials that were begun there ({_list(missing)})"
    elif past.damaged or past.asked:
        lines = f" (damaged lines: {_list(past.damaged)})" if past.damaged else ""
        why, fix = f"its journal no longer says what is searched{lines}", f"Put {NAME} back"
    elif any(folder.glob(f"trials/*/{_CHECKPOINTS}*/chunk-*")):
        why, fix = "it has checkpoints and no journal", f"Put {NAME} back"
    else:
        return False
    raise SearchDiffers(
        f"The search in {folder} has not come to its end, and this can't go on with it: {why}. {fix}, take another "
        "folder, or delete this one yourself."
    )


def _list(numbers: Sequence[int], most: int = 10) -> str:
    return ", ".join(map(str, numbers[:most])) + (", ..." if len(numbers) > most else "")


def _named(attempt: int) -> str:
    return _CHECKPOINTS if attempt == 1 else f"{_CHECKPOINTS}-{attempt}"


def _attempt_of(folder: Path) -> int:
    last = folder.name.rpartition("-")[2]
    return int(last) if last.isdecimal() else 1


def _fill(record: TrialRecord, trial: optuna.trial.FrozenTrial, chunks: int) -> None:
    """Values of chunks that were reported and judged, but whose checkpoint is lost: policies go by them."""
    reported = trial.intermediate_values
    vectors = trial.user_attrs.get(VECTORS_ATTR, [])
    for chunk in range(len(record.values) + 1, chunks + 1):
        if chunk in reported:
            record.add_chunk((reported[chunk],), np.empty(0), {}, 0.0, 0)
        elif chunk <= len(vectors):
            record.add_chunk(tuple(vectors[chunk - 1]), np.empty(0), {}, 0.0, 0)


def to_tree(record: TrialRecord) -> dict[str, Any]:
    """A record as a tree of arrays and JSON values."""
    tree = {field.name: getattr(record, field.name) for field in fields(record)}
    tree["state"] = record.state.name
    return tree


def from_tree(tree: Mapping[str, Any]) -> TrialRecord:
    """The inverse of `to_tree`."""
    known = {field.name for field in fields(TrialRecord)}
    given = {name: value for name, value in tree.items() if name in known}
    given["state"] = TrialState[tree["state"]]
    for name in ("vectors", "verdicts", "spans"):
        given[name] = [tuple(item) for item in given.get(name, ())]
    given["scores"] = [np.asarray(scores) for scores in given.get("scores", ())]
    return TrialRecord(**given)
