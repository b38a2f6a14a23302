"""Commands that come while the search is busy for long: in the middle of a joint rollout, while a reward is awaited."""

from __future__ import annotations

import asyncio
import copy
import threading
from pathlib import Path
from typing import Any

import optuna
import pytest

from rapidfire_automl import RapidFireExecutor, Sampling
from rapidfire_automl.control import Command, Effect
from rapidfire_automl.executor.requests import Away, Generate
from rapidfire_automl.plan import Plan
from tests.executor.helpers import tiny_tokenizer
from tests.executor.rollouts import RolloutSpec, rollout_base

pytestmark = pytest.mark.slow


class Sender:
    """A mailbox from which commands come once trials are at something for the n-th time that the search looks."""

    foreign, attempt = False, 0

    def __init__(self, executor: RapidFireExecutor, request: type, looks: int, commands: list[Command]) -> None:
        self._executor, self._request, self._left, self._commands = executor, request, looks, commands
        self.effects: dict[str, Effect] = {}
        self.answered = threading.Event()

    def open(self) -> None:
        pass

    def take(self) -> list[Command]:
        assert self._executor._conductor is not None
        arms = [arm for arm in self._executor._conductor.arms if not arm.done]
        if arms and all(isinstance(arm.request, self._request) for arm in arms):
            self._left -= 1
        return self._commands if self._left == 0 else []

    def answer(self, command: Command, effect: Effect) -> None:
        self.effects[command.verb] = effect
        self.answered.set()

    def close(self, reason: str) -> None:
        pass


def run(
    folder: Path,
    specs: list[RolloutSpec],
    sender: tuple[type, int, list[Command]] | None = None,
    answered: threading.Event | None = None,
) -> Any:
    """Rollout trials in one process; their records, what each sampled, and what came of the commands."""
    executor = RapidFireExecutor(
        copy.deepcopy(rollout_base()),
        slots=len(specs),
        chunks=2,
        plan=Plan(budget_tokens=4096, reason="a test"),
        tokenizer=tiny_tokenizer(),
        output_dir=folder / "out",
        eval_sampling=Sampling(num_generations=2, temperature=0.8, max_completion_length=5),
    )
    seen: dict[int, Any] = {}

    def objective(trial: optuna.Trial) -> Any:
        trainer = specs[trial.number].build(executor.model(trial), executor.tokenizer, folder / f"trial-{trial.number}")
        seen[trial.number] = trainer.seen
        return trainer

    box = None if sender is None else Sender(executor, *sender)
    if box is not None:
        box.answered = answered or box.answered
        executor.add_mailbox(box)
    with executor:
        executor.optimize(optuna.create_study(pruner=optuna.pruners.NopPruner()), objective, n_trials=len(specs))
    return executor.records, seen, {} if box is None else box.effects


def test_a_trial_that_is_stopped_in_its_rollout_leaves_and_its_neighbours_do_not_notice(tmp_path: Path) -> None:
    length = {"max_completion_length": 9}
    specs = [RolloutSpec(args=length), RolloutSpec(args={**length, "num_generations": 4}), RolloutSpec(args=length)]
    _, alone, _ = run(tmp_path / "whole", specs)
    # The third token of the second rollout that all three share.
    commands = [Command("stop", 1), Command("set-policy", None, {"name": "nop"})]
    records, seen, effects = run(tmp_path / "stopped", specs, (Generate, 13, commands))
    assert [str(record.state) for record in records.values()] == ["complete", "stopped", "complete"]
    assert effects["stop"].applied and effects["set-policy"].applied
    assert 0 < len(seen[1]) < len(alone[1]), "its rollout was not waited for"
    assert seen[1] == alone[1][: len(seen[1])]
    assert seen[0] == alone[0] and seen[2] == alone[2]
    assert len(seen[0]) > len(seen[1])


class Judged(RolloutSpec):
    """Its only reward is asynchronous, so that it waits without the baton."""

    def build(self, *args: Any, **kwargs: Any) -> Any:
        trainer = super().build(*args, **kwargs)
        for name in ("reward_funcs", "reward_func_names", "reward_processing_classes"):
            del getattr(trainer, name)[1:]
        trainer.reward_weights = trainer.reward_weights[:1]
        return trainer


def test_a_search_that_waits_for_a_reward_listens(tmp_path: Path) -> None:
    answered = threading.Event()

    async def slow(completions: list[str], **columns: Any) -> list[float]:
        assert await asyncio.to_thread(answered.wait, 30), "nobody has listened"
        return [0.0] * len(completions)

    spec = Judged(args={"max_steps": 2}, rewards=(slow,))
    records, _, effects = run(tmp_path, [spec], (Away, 3, [Command("pause", 7)]), answered)
    assert records[0].error is None
    assert effects["pause"].text == "trial 7 is unknown: there are 0 to 0"
