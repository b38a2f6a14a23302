"""What of a search outlives its process, as one thing: its folder, other workers, and what commands keep.

Where nothing is to survive, nothing here does anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
from transformers import PreTrainedModel

from rapidfire_automl.executor.arm import Arm
from rapidfire_automl.executor.checkpoints import Snapshot
from rapidfire_automl.executor.crew import Crew
from rapidfire_automl.executor.durability import Durability, Spent
from rapidfire_automl.executor.evaluation import Measured
from rapidfire_automl.executor.fingerprints import check_same_trial, distributions, fingerprint_of_base
from rapidfire_automl.executor.journal import Journal
from rapidfire_automl.executor.keeping import Keeping
from rapidfire_automl.executor.ledger import Ledger
from rapidfire_automl.executor.rounds import Said
from rapidfire_automl.records import TrialRecord


class Survival:
    """One search after another.

    Args:
        tell: Emits an event (kind, arm or None, data).
        arms: That live.
    """

    def __init__(self, tell: Callable[..., None], arms: Callable[[], Sequence[Arm]]) -> None:
        self._tell = tell
        self._arms = arms
        self._opened: Durability | None = None
        self.durability: Durability | None = None
        self.crew: Crew | None = None
        self.keeping = Keeping(None)

    # -- beginning and ending ------------------------------------------------------------------------------------------

    def alone(self, folder: Path | None) -> None:
        """The next search is this process's alone: it survives in a folder, if one is given."""
        if folder is not None and self._opened is None:
            self._opened = Durability(folder, self._tell, Journal(folder))
        self._use(self._opened if folder is not None else None)

    def together(self, study: optuna.Study, folder: Path, crew: Crew) -> None:
        """The next search is shared with other processes, all of which see the folder."""
        self.crew = crew
        self._opened = Durability(folder, self._tell, Ledger(study))
        self._use(self._opened)

    def _use(self, durability: Durability | None) -> None:
        self.durability, self.keeping = durability, Keeping(durability)

    def over(self) -> None:
        """The search has come to its end."""
        if self.durability is not None:
            self.durability.over()
            self.keeping.over()

    def close(self, timeout_s: float | None = None) -> None:
        """Write what is left to write, for so long at most, and let others in."""
        if self.crew is not None:
            self.crew.stop()
        if self._opened is not None:
            self._opened.close(timeout_s)
        self._opened = self.durability = self.crew = None

    # -- as it goes ----------------------------------------------------------------------------------------------------

    @property
    def is_on(self) -> bool:
        """Whether the search is to survive."""
        return self.durability is not None and self.durability.is_on

    @property
    def spent(self) -> Spent | None:
        """What checkpoints have cost so far; None where there are none."""
        return None if self._opened is None else self._opened.spent

    def keep_verdicts(self, verdicts: list[tuple[int, int, str, str]], said: Sequence[Said] = ()) -> None:
        """Verdicts are on disk before they take effect; arms are lost whose trials others have taken over."""
        lost = self.durability.judged(verdicts, said) if self.durability is not None else frozenset()
        for arm in self._arms() if lost else ():
            arm.lost = arm.lost or arm.number in lost

    def built(self, number: int) -> None:
        """A trial has all of its parameters."""
        if self.durability is not None:
            self.durability.built(number)

    def check_same(self, arm: Arm, trainer: Any) -> None:
        """Compare a trial that goes on with what it was begun as.

        Raises:
            SearchDiffers: It is another one.
        """
        if self.durability is not None:
            others = [t for t in arm.trial.study.get_trials(deepcopy=False) if t.number != arm.trial.number]
            check_same_trial(arm, trainer, distributions(others))

    def save(self, arm: Arm, trainer: Any, take: Callable[[], Snapshot]) -> None:
        """Put an arm's state on disk; see `Durability.save`."""
        if self.durability is not None:
            self.durability.save(arm, trainer, take)

    def save_later(self, arm: Arm, folder: Path, snapshot: Snapshot) -> bool:
        """Keep an adapter for which the disk has no room yet; says whether that is done."""
        return self.durability is not None and self.durability.adapter(arm, folder, snapshot)

    def keep_base(self, measured: Measured) -> None:
        """Keep what the untrained base is worth."""
        if self.durability is not None:
            self.durability.base(measured)

    def base(self) -> Measured | None:
        """What an earlier process has found the untrained base to be worth."""
        return None if self.durability is None else self.durability.restore_base()

    def look_at_peers(self) -> None:
        """Bring the records of other workers' trials up to date."""
        if self.crew is not None:
            self.crew.refresh()

    def share(self, record: TrialRecord) -> None:
        """Let other workers see a chunk that was recorded."""
        if self.crew is not None:
            self.crew.share(record)


def facts(study: optuna.Study, base: PreTrainedModel, chunks: int) -> dict[str, Any]:
    """What is searched, to tell this search from another one."""
    return {
        "base": fingerprint_of_base(base),
        "chunks": chunks,
        "directions": [direction.name for direction in study.directions],
    }
