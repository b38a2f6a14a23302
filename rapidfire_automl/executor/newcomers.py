"""Trials that people add: a configuration of their own, or another trial's with changes, warm or cold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna

from rapidfire_automl.attempts import COMMAND_ATTR
from rapidfire_automl.control import Command
from rapidfire_automl.executor import enqueueing, warmstart
from rapidfire_automl.executor.arm import Arm
from rapidfire_automl.executor.keeping import Keeping
from rapidfire_automl.executor.sources import Asking, Claims
from rapidfire_automl.executor.standing import Elsewhere, NotYet, Refused, Standing


class Newcomers:
    """Queues what people add, and holds what warm clones begin with until they begin.

    Args:
        standing: Of the trials.
    """

    def __init__(self, standing: Standing) -> None:
        self._standing = standing
        self._warm: dict[str, warmstart.WarmStart] = {}
        self.keeping = Keeping(None)

    def add(self, command: Command) -> str:
        """Queue a configuration; what came of it."""
        trials = self._standing.trials().values()
        known = {name: d for trial in trials for name, d in trial.distributions.items()}
        params, notes = enqueueing.fit(command.arguments["set"], known, "the search", strict=bool(known))
        return self._enqueue(params, notes, {enqueueing.ADD_ATTR: True}, command)

    def clone(self, command: Command) -> str:
        """Queue a trial's configuration, some of it changed; what came of it."""
        assert command.trial is not None
        trials = self._standing.trials()
        if command.trial not in trials:
            raise Refused(f"trial {command.trial} {self._standing.why_not_live(command.trial)}")
        source = trials[command.trial]
        if not source.params:
            raise Refused(f"trial {command.trial} has not begun: it has no configuration yet")
        who = f"trial {command.trial}"
        given, known = command.arguments["set"], source.distributions
        changes, notes = enqueueing.fit(given, known, who, strict=True, source=source.params)
        warm = self._inheritance(command.trial, source, changes) if command.arguments["warm_start"] else None
        attributes = {enqueueing.CLONE_ATTR: command.trial, enqueueing.WARM_ATTR: warm is not None}
        if warm is not None and warm.optimizer is None:
            notes.append(f"trial {command.trial} has no optimizer state any more, the clone's begins empty")
        return self._enqueue({**source.params, **changes}, notes, attributes, command, warm)

    def warm_start(self, arm: Arm) -> warmstart.WarmStart | None:
        """What a clone begins with; called in its thread.

        Raises:
            ValueError: It is no longer there.
        """
        attributes = arm.trial.user_attrs
        if not attributes.get(enqueueing.WARM_ATTR):
            return None
        command = attributes[COMMAND_ATTR]
        warm = self._warm.pop(command, None) or self.keeping.inherited(command)
        if warm is None:
            source = attributes.get(enqueueing.CLONE_ATTR)
            raise ValueError(
                f"What trial {source} left to its clone is gone with the process that kept it. Clone again."
            )
        return warm

    def end(self) -> None:
        """Nobody will begin any more."""
        self._warm.clear()

    def _inheritance(
        self, number: int, source: optuna.trial.FrozenTrial, changes: Mapping[str, Any]
    ) -> warmstart.WarmStart:
        enqueueing.check_warm(number, source.params, changes)
        arm = self._standing.live(number)
        if arm is not None:
            if arm.lost:
                raise Elsewhere
            if not arm.begun:
                raise NotYet
            return warmstart.take(number, arm.trainer)
        folder = source.user_attrs.get("rapidfire:adapter")
        if folder is None or not (Path(folder) / "adapter_model.safetensors").is_file():
            why = self._standing.why_not_live(number)
            raise Refused(f"trial {number} {why} and its adapter was not saved. Clone it without warm start.")
        return warmstart.read(number, Path(folder))

    def _enqueue(
        self,
        params: Mapping[str, Any],
        notes: list[str],
        attributes: Mapping[str, Any],
        command: Command,
        warm: warmstart.WarmStart | None = None,
    ) -> str:
        study, source = self._standing.study, self._standing.source
        assert study is not None and source is not None
        if why := source.over:
            raise Refused(f"no trial is started any more: {why}")
        if warm is not None:
            self.keeping.inherit(command.id, warm)
            self._warm[command.id] = warm
        trial, number = enqueueing.enqueue(study, params, attributes, command.id)
        self.keeping.enqueued()
        notes = [f"trial {number} is next in line for a slot", *notes]
        if isinstance(source, (Asking, Claims)):
            source.ask_for(trial)
        else:
            notes.append("it is one of `n_trials`, which study.optimize counts by itself")
        return "; ".join(notes)
