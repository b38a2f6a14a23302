"""A search in miniature: known curves, slots, newcomers and paused trials, in the rounds of the executor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from rapidfire_policies.base import History, Policy, TrialHistory, TrialState, Verdict

_SILENT = {TrialState.RUNNING: Verdict.CONTINUE, TrialState.PAUSED: Verdict.PAUSE}
_ENDED = {Verdict.STOP: TrialState.STOPPED, Verdict.COMPLETE: TrialState.COMPLETE}


def verdicts(policy: Policy, history: History) -> dict[int, Verdict]:
    """The verdict on each live trial, what is left out filled in."""
    decisions = policy.decide(history)
    return {
        trial.number: decisions[trial.number].verdict if trial.number in decisions else _SILENT[trial.state]
        for trial in history.trials
        if trial.is_live
    }


def search(policy: Policy, whole: History) -> Iterator[tuple[History, dict[int, Verdict], bool]]:
    """Run a search through; yield each history the policy is asked about, its verdicts, and if it is the last call.

    In a round every trial with a slot trains one chunk, then the policy is asked once. Free slots go to paused trials
    that were told to CONTINUE, then to newcomers, by number; at most `2 * slots` trials live at a time. When all are
    paused and no newcomer may come the policy is asked once more, the last call: all end unless some trial goes on.

    Args:
        policy: Who judges.
        whole: The search as it would be if every trial trained to its end; its `slots` are the slots.
    """
    curves = {trial.number: trial for trial in sorted(whole.trials, key=lambda trial: trial.number)}
    now: dict[int, TrialHistory] = {}
    wanted: list[int] = []
    while True:
        living = [trial for trial in now.values() if trial.is_live]
        running = [trial.number for trial in living if trial.state is TrialState.RUNNING]
        resumed = sorted(wanted)[: whole.slots - len(running)]
        room = min(whole.slots - len(running) - len(resumed), 2 * whole.slots - len(living))
        came = list(curves)[len(now) : len(now) + max(0, room)]
        trained = [*running, *resumed, *came]
        for number in trained:
            resource = now[number].resource + 1 if number in now else 1
            state = TrialState.COMPLETE if resource == whole.chunks else TrialState.RUNNING
            now[number] = after(curves[number], resource, state)
        history = replace(whole, trials=tuple(now.values()))
        answer = verdicts(policy, history) if history.live else {}
        if history.live:
            yield history, answer, not trained
        elif len(now) == len(curves):
            return
        if not trained and Verdict.CONTINUE not in answer.values():
            answer = {number: v if v is Verdict.COMPLETE else Verdict.STOP for number, v in answer.items()}
        now |= _carried_out(now, answer)
        wanted = [n for n, v in answer.items() if v is Verdict.CONTINUE and now[n].state is TrialState.PAUSED]


def after(trial: TrialHistory, resource: int, state: TrialState) -> TrialHistory:
    """The trial as it was after so many chunks."""
    return replace(
        trial,
        values=trial.values[:resource],
        state=state,
        scores=trial.scores[:resource],
        costs=trial.costs[:resource],
        metrics={name: numbers[:resource] for name, numbers in trial.metrics.items()},
    )


def _carried_out(now: Mapping[int, TrialHistory], answer: Mapping[int, Verdict]) -> dict[int, TrialHistory]:
    states = {
        number: TrialState.PAUSED if verdict is Verdict.PAUSE else _ENDED.get(verdict, now[number].state)
        for number, verdict in answer.items()
    }
    return {number: replace(now[number], state=state) for number, state in states.items()}
