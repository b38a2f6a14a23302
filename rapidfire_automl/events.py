"""What the executor tells the outside while a search runs: one frozen record per happening."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

_log = logging.getLogger("rapidfire_automl")


@dataclass(frozen=True, slots=True)
class Event:
    """One happening of a search.

    Kinds and their `data`:

    - `search_started`: `study` (its name; another one means another search), `direction` ("minimize", "maximize"),
      `n_trials`, `chunks` (of a whole trial), `slots`.
    - `plan`: `budget_tokens`, `trials_per_pass`, `reason`. The planner has chosen (again).
    - `base_evaluated`: `value`. The untrained base's value on the shared evaluation set.
    - `trial_started`: `params`, `trainer` (class name), `max_steps`, `boundaries` (step of each chunk's end), `fused`;
      of a trial that a person has added also `added`, or `clone_of` (a trial) and `warm_start`.
    - `step`: `step`, `max_steps`. An optimizer step is done.
    - `chunk_done`: `value` (as the user's metric gives it, sign not flipped), `seconds`, `tokens`, `generated` (0 for
      trials that don't generate); with several objectives `vector`, and `value` is its first.
    - `verdict`: `verdict`, `reason`, `by` (the policy or pruner; "" for the executor itself) and `numbers`
      (`rapidfire_policies.Decision.numbers`, values in the user's sign). Also for paused trials that resume. `again`
      where a search that goes on tells what an earlier process may have been killed before telling.
    - `trial_ended`: `state` ("complete", "pruned", "failed"), `value`, `reason`, `adapter` (path or None); of one that
      has raised, `traceback`.
    - `command`: `id`, `verb`, `of` (the trial it is about, or None), `arguments`, `source`, `sent_s` (seconds since
      1970), `effect` ("applied" or "refused"), `text`. Somebody has stepped in; told when it has taken effect. `source`
      says what, user, process, terminal and host; "Python" and "notebook panel" are the search's own process.
    - `trial_resumed`: `attempt`. A trial goes on after its process ended, from `chunk`.
    - `search_resumed`: `ended`, `going_on` (trials). A search goes on after its process ended.
    - `checkpoint`: `folder`, `bytes`, `seconds` (of the writer), `disk_bytes` (of all that are kept). A trial is on the
      disk as of a chunk.
    - `checkpoint_damaged`: `folder`, `reason`. It goes on from an older one.
    - `writing_paused`, `writing_resumed`: `folder`, `reason`. The disk is full, or has room again; training goes on.
    - `writing_failed`, `writing_lost`: `folder`, `reason`. One is given up; one is lost, since the search ended.
    - `out_of_memory`: `budget_tokens` (the new one); with a trial, it alone did not fit, and the budget stays.
    - `elsewhere`: `of` (a trial), `worker` (who has it), `state`, `chunk`, `value`, `params`. How another worker's
      trial fares, as the study tells.
    - `trial_orphaned`: `of`, `worker`. A worker has gone, or been silent for too long; its trial is there to be taken.
    - `trial_given_up`: `of`, `reason`. Too many workers have died with a trial; it has failed.
    - `trial_lost`: `worker`. This worker was silent for too long; that one has the trial now, and what this one said
      of it since does not count.
    - `storage_away`: `seconds` so far, `reason`; `storage_back`: `seconds`. The study can't be reached, and can again.
    - `warning`: `message`.
    - `search_ended`: `status` ("complete", "failed", "cancelled", "interrupted", "crashed"); missing where the process
      was killed.

    Args:
        kind: One of the above.
        time_s: Seconds since the executor was entered.
        trial: Optuna's trial number, or None where no trial is meant.
        chunk: Chunks the trial has done, or None.
        data: The rest.
    """

    kind: str
    time_s: float
    trial: int | None = None
    chunk: int | None = None
    data: Mapping[str, Any] = field(default_factory=dict)


ENDED_WITH_SEARCH = "the search was ended"
"""The reason of a trial that failed only because somebody has ended the search."""

Listener = Callable[[Event], None]


def warn(tell: Callable[..., None], message: str) -> None:
    """Warn of something about the search: as an event, and in the log for those who don't look at events.

    Args:
        tell: Emits an event (kind, arm or None, data).
        message: A sentence or two.
    """
    _log.warning(message, extra={"is_event": True})
    tell("warning", None, message=message)


@contextmanager
def on_view() -> Iterator[None]:
    """Events are on view meanwhile: what is one stays out of the log."""

    def is_news(record: logging.LogRecord) -> bool:
        return not getattr(record, "is_event", False)

    _log.addFilter(is_news)
    try:
        yield
    finally:
        _log.removeFilter(is_news)
