"""Trials that train longer than they were meant to, and how that is done again after a kill.

An extension changes the learning rates from the step on at which it is made, so a trial that goes on from an older
checkpoint is extended at that very step again.
"""

from __future__ import annotations

from collections.abc import Sequence

from rapidfire_automl.control import Command
from rapidfire_automl.executor import seams
from rapidfire_automl.executor.arm import Arm
from rapidfire_automl.executor.keeping import Keeping
from rapidfire_automl.executor.standing import Elsewhere, NotYet, Refused
from rapidfire_policies.wording import counted


def extend(arm: Arm, command: Command, keeping: Keeping) -> str:
    """Give a trial that trains more chunks, as long as its last; what came of it.

    Args:
        arm: Whose; it does not run meanwhile.
        command: Says how many.
        keeping: Has it on disk before it takes effect.

    Raises:
        Refused: It can't train longer.
        NotYet: It is not loaded, or is yet to be extended as it was before.
        Elsewhere: Others have taken it over.
    """
    more, ends, trainer = int(command.arguments["chunks"]), arm.record.boundaries, arm.trainer
    if not arm.begun or arm.extensions:
        raise NotYet
    before, step = trainer.state.max_steps, trainer.state.global_step
    if step >= before:
        raise Refused(f"trial {arm.number} has trained to its end")
    length = ends[-1] - (ends[-2] if len(ends) > 1 else 0)
    if why := seams.why_no_longer(trainer, length * more):
        raise Refused(f"trial {arm.number} can't train longer: {why}")
    longer = [*ends, *(ends[-1] + length * k for k in range(1, more + 1))]
    text = (
        f"{counted(len(longer), 'chunk')}, {counted(before + length * more, 'step')} instead of {before}; "
        "its learning rate follows a schedule of that length"
    )
    if keeping.extended(arm.number, step, longer, command, text):
        arm.lost = True
        raise Elsewhere
    was = trainer.lr_scheduler.get_last_lr()[0]
    _lengthen(arm, longer)
    now = trainer.lr_scheduler.get_last_lr()[0]
    return f"{text} (now {was:.3g} -> {now:.3g})"


def again(arm: Arm, before: Sequence[int], step: int) -> None:
    """Extend a trial that goes on as it was extended before; later extensions are left for `at_step`.

    Args:
        arm: Its trainer is about to begin; its chunks end where they do without extensions.
        before: Where its chunks ended when its checkpoint was written; empty without one.
        step: Optimizer steps it has behind it.

    Raises:
        ValueError: It can't be done again.
    """
    if not arm.extensions and len(before) > len(arm.record.boundaries):
        arm.extensions = [(step, list(before))]  # only its checkpoint knows of it
    at_step(arm, step)


def at_step(arm: Arm, step: int) -> None:
    """Extend it as it was before at this step.

    Raises:
        ValueError: It can't be done again.
    """
    while arm.extensions and arm.extensions[0][0] <= step:
        _again(arm, arm.extensions.pop(0)[1])


def _again(arm: Arm, longer: Sequence[int]) -> None:
    ends = arm.record.boundaries
    if list(longer[: len(ends)]) != ends:
        raise ValueError(f"its chunks ended at steps {list(longer)}, now they would at {ends}")
    if why := seams.why_no_longer(arm.trainer, longer[-1] - ends[-1]):
        raise ValueError(f"it was extended to {counted(longer[-1], 'step')}, which can't be done again: {why}")
    _lengthen(arm, longer)


def _lengthen(arm: Arm, longer: Sequence[int]) -> None:
    seams.lengthen(arm.trainer, longer[-1] - arm.record.boundaries[-1])
    arm.record.boundaries = list(longer)
