"""Why a trial stopped, and what it would have taken to go on: a sentence or two from the events of its search.

The sentences are made from the numbers of verdicts by name (`rapidfire_policies.Decision` lists the names), so a policy
that uses the same names is explained like those that come with the package; of any other its reason is told.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rapidfire_automl.control import RULED
from rapidfire_automl.event_log import Line, Log, read_events
from rapidfire_automl.events import ENDED_WITH_SEARCH, Event
from rapidfire_policies.wording import counted

_BECAUSE = (
    (("not_finite",), "its value was {not_finite}"),
    (("rank", "of", "keep"), "{its} was {rank_th} of {of}{at_rung}, and {go_on}{too}"),
    (
        ("cap", "rung"),
        "while the rungs rank trials alike only the best goes on from rung {rung}, at the end, and {its} waited there",
    ),
    (("bound", "lead", "rival"), "{its} could reach {bound} at best at its recent pace, and trial {rival} has {lead}"),
    (
        ("forecast", "chance", "lead", "rival"),
        "{its} was forecast to end at {forecast}, with a chance of {chance} against the {lead} of trial {rival}",
    ),
    (
        ("forecast", "deviation", "chance", "rival"),
        "it was believed to end at {forecast} ± {deviation}, with a chance of {chance} to beat trial {rival}",
    ),
    (
        ("forecast", "spent", "budget", "rival"),
        "{spent} of {budget_chunks} were spent, and it was believed to end at {forecast}, behind trial {rival}",
    ),
    (("forecast", "deviation"), "it was believed to end at {forecast} ± {deviation}, and others had their turn"),
    (
        ("rival", "rival_cost", "cost", "margin"),
        "a chunk of trial {rival} costs {rival_cost} instead of {cost}, and it is no worse beyond a margin of {margin}",
    ),
    (
        ("rival", "worse_by", "worse_by_at_least", "examples"),
        "on {on_examples} it was worse than trial {rival} by {worse_by}, beyond doubt by {worse_by_at_least}",
    ),
    (
        ("rival", "worse_by", "capital", "examples"),
        "on {on_examples} it was worse than trial {rival} by {worse_by}, and bets on that won {capital} times "
        "the stake",
    ),
    (
        ("rival", "worse_by", "p", "examples"),
        "on {on_examples} it was worse than trial {rival} by {worse_by} (p = {p})",
    ),
    (("kl",), "its KL divergence from the reference was {kl}"),
    (("flat",), "its rewards had no variance for {flat_chunks}"),
    (
        ("spent", "to_come", "budget", "peers"),
        "{spent_chunks} spent and {to_come} to come, more than the budget of {budget}, and {its} was behind {others}",
    ),
    (("best", "threshold"), "{its} and those before it were {worse} than its best, {best}"),
    (("first", "threshold"), "{its} had gone far from its first, {first}"),
    (("peers", "threshold"), "{its} was {worse} than the {threshold} that {others} had come to"),
    (("threshold",), "{its} was not {better} than {threshold}"),
)
"""What a verdict rests on: the first line whose numbers are all there."""

_NEEDED = (
    (("not_finite",), "any finite value"),
    (("threshold",), "{better} than {threshold}{whose}"),
    (("short_by",), "scores that are better by more than {short_by} on average"),
    (("least_chance",), "a chance of {least_chance}"),
    (("most_capital",), "them to win less than {most_capital} times"),
    (("p", "alpha"), "p = {alpha} or more"),
    (("max_kl",), "{max_kl} or less"),
    (("flat",), "answers to one prompt that earn different rewards"),
)
"""What it would have taken."""

_PLACE = re.compile(r"(chunk|rung) \d+: ")
"""What a reason starts with; the sentence says it already."""


def why(trial: int, run_dir: str | os.PathLike[str]) -> str:
    """Why a trial stopped, or how it stands, and what it would have taken to go on.

    Args:
        trial: Its number.
        run_dir: The run folder; its search may still be running.

    Returns:
        A sentence or two.

    Raises:
        ValueError: There is no such folder, it has no events, or they know no such trial.
    """
    return explain(read_events(run_dir), trial)


def explain(log: Log, trial: int) -> str:
    """`why`, of events that have been read.

    Raises:
        ValueError: They know no such trial.
    """
    search = Search()
    for line in log.lines:
        search.take(line)
    if trial not in search.stories:
        known = _ranges(search.stories)
        raise ValueError(f"`trial` must be one that has started ({known or 'none has yet'}), got {trial}.")
    return search.stories[trial].tell(search)


class Search:
    """What the events say of the latest search in a run folder."""

    def __init__(self) -> None:
        self.stories: dict[int, Story] = {}
        self.chunks: int | None = None
        self.maximize = False
        self.cancel: Event | None = None
        self._commands: set[object] = set()
        self._study: object = None
        self._status: str | None = None
        self._time = ""
        self._workers: set[str] = set()

    def take(self, line: Line) -> None:
        """Take a line in; they come in the order of the file."""
        event, self._time = line.event, line.time or self._time
        if event.kind == "command" and (name := event.data.get("id")) is not None:
            if name in self._commands:  # told again after a kill
                return
            self._commands.add(name)
        if event.kind == "search_started":
            self._start(event.data)
            self._workers.add(line.worker)
        elif event.kind == "search_ended":
            self._workers.discard(line.worker)
            self._status = None if self._workers else str(event.data.get("status"))
        elif event.kind == "command" and event.trial is None and event.data.get("verb") == "cancel":
            self.cancel = event
        elif event.kind == "trial_given_up" and (number := event.data.get("of")) in self.stories:
            self.stories[number].end({**event.data, "state": "failed"})
        elif event.trial is not None:
            self.stories.setdefault(event.trial, Story(event.trial)).take(event, line.worker)

    def _start(self, about: Mapping[str, Any]) -> None:
        if about.get("study") != self._study:  # the same one goes on
            self.stories = {}
        chunks = about.get("chunks")
        self.chunks = chunks if isinstance(chunks, int) else None
        self._study, self.maximize = about.get("study"), about.get("direction") == "maximize"
        self._status = self.cancel = None

    def when(self) -> str:
        """The moment at which the events end."""
        if self._status is not None:
            return f"when the search ended ({self._status})"
        return f"at the last event, {self._time}" if self._time else "at the last event"


@dataclass
class Story:
    """What the events say of one trial."""

    number: int
    state: str = "running"
    chunk: int = 0
    values: dict[int, Any] = field(default_factory=dict)
    attempt: int = 1
    worker: str = ""
    verdict: Event | None = None
    command: Event | None = None
    ruling: str = ""
    reason: str = ""
    origin: str = ""
    chunks: int = 0
    extended: int = 0
    adapter: str = ""

    def take(self, event: Event, worker: str = "") -> None:
        """Take an event of this trial in; one from a worker whose trial others have taken over does not count."""
        data = event.data
        if event.kind not in ("trial_started", "trial_resumed") and worker != self.worker:
            return
        if event.kind in ("trial_started", "trial_resumed"):
            self.worker = worker
            self.state, self.reason = "running", ""
            self.chunks = max(self.chunks, len(data.get("boundaries") or ()))
            self.origin = _origin(data) or self.origin
            self.attempt = data["attempt"] if isinstance(data.get("attempt"), int) else self.attempt
        elif event.kind == "chunk_done":
            self.state = "running"
            self.chunk = self.chunk + 1 if event.chunk is None else event.chunk
            self.values[self.chunk] = data.get("value")
        elif event.kind == "verdict":
            reason = str(data.get("reason") or "")
            by_hand = not data.get("by") and reason.startswith(RULED)
            self.command, self.ruling = None, reason if by_hand else ""
            self.verdict = self.verdict if by_hand else event
            self.state = "paused" if data.get("verdict") == "pause" else "running"
        elif event.kind == "command" and data.get("effect") == "applied" and data.get("verb") == "extend":
            more = (data.get("arguments") or {}).get("chunks")
            if isinstance(more, int):
                self.extended, self.chunks = self.extended + more, self.chunks + more
        elif (
            event.kind == "command"
            and data.get("effect") != "refused"
            and data.get("verb") in _STATES_AFTER
            and self.state in ("running", "paused")
        ):
            self.command, self.state = event, _STATES_AFTER[data["verb"]] or self.state
        elif event.kind == "trial_ended":
            self.end(data)

    def end(self, data: Mapping[str, Any]) -> None:
        """It has ended."""
        self.state, self.adapter = str(data.get("state")), str(data.get("adapter") or "")
        lines = str(data.get("reason") or "").strip().splitlines()
        self.reason = lines[-1].rstrip(".") if lines else ""

    def tell(self, search: Search) -> str:
        """The sentences."""
        tellers = {"pruned": self._pruned, "complete": self._complete, "failed": self._failed}
        told = tellers.get(self.state, self._alive)(search)
        return told if self.attempt < 2 else f"{told} This is its attempt {self.attempt}: it has been resumed."

    def _pruned(self, search: Search) -> str:
        head, said = f"{self._name} was stopped", self._said
        if self.command is not None:
            return f"{head} by {_command(self.command)} {self._standing(search)}.{self._last_verdict()}"
        if self.ruling:
            return f"{self._name} was {self.ruling} {self._standing(search)}.{self._last_verdict()}"
        if said.get("verdict") != "stop":
            return f"{self._name} was pruned by its own code {self._standing(search)}: {self.reason}."
        return self._judged(head, search, "it needed")

    def _complete(self, search: Search) -> str:
        if self._said.get("by"):
            return self._judged(f"{self._name} was ended as complete", search, "to train on it needed")
        ends = [(_float(s.values.get(s.chunk)), s.number) for s in search.stories.values() if s.state == "complete"]
        order = sorted((-end if search.maximize else end, number) for end, number in ends if math.isfinite(end))
        places = {number: place for place, (_, number) in enumerate(order, start=1)}
        place = (
            f", {_ordinal(places[self.number])} of {counted(len(places), 'complete trial')}"
            if self.number in places
            else ""
        )
        return f"{self._name} is complete {self._standing(search)}{place}."

    def _failed(self, search: Search) -> str:
        if self.reason == ENDED_WITH_SEARCH:
            by = f" by {_command(search.cancel)}" if search.cancel is not None else ""
            kept = f"; its adapter is in {self.adapter}" if self.adapter else ""
            head = f"{self._name} was ended with the search{by} {self._standing(search)}{kept}."
            return head + self._last_verdict()
        memory = "it did not fit into memory, even alone: " if "OutOfMemory" in self.reason else ""
        return f"{self._name} failed {self._standing(search)}: {memory}{self.reason or 'no reason recorded'}."

    def _alive(self, search: Search) -> str:
        head = f"{self._name} was {self.state} {search.when()}"
        if self.command is not None:
            return f"{head}, {self._standing(search)}; {_command(self.command)} did that."
        if self.ruling:
            return f"{head}, {self._standing(search)}; it was {self.ruling}."
        if self.state == "paused":
            return self._judged(head, search, "to go on it needs")
        return f"{head}, {self._standing(search)}.{self._last_verdict()}"

    @property
    def _name(self) -> str:
        return f"Trial {self.number}" + (f", {self.origin}," if self.origin else "")

    def _judged(self, head: str, search: Search, needs: str) -> str:
        by, reason = self._said.get("by"), str(self._said.get("reason") or "no reason recorded")
        reason = _PLACE.sub("", reason, count=1)
        head += f" by {by}" if by else ""
        if by and reason == f"{by} says so":
            return f"{head} {self._standing(search)}; it does not say what it would have taken."
        words = self._words(search)
        because, needed = _first(_BECAUSE, words), _first(_NEEDED, words)
        where = f"after chunk {self.chunk}{self._of(search)}" if because else self._standing(search)
        return f"{head} {where}: {because or reason}" + (f"; {needs} {needed}." if needed else ".")

    def _words(self, search: Search) -> dict[str, str]:
        """The numbers of the last verdict as words, and what follows from them."""
        numbers = self._said.get("numbers")
        if not isinstance(numbers, Mapping):
            return {}
        words = {str(name): _text(number) for name, number in numbers.items()}
        value, rung = numbers.get("value"), numbers.get("rung", self.chunk)
        if value is not None and not math.isfinite(_float(value)):
            return {"not_finite": f"{words['value']}"}
        if not math.isfinite(_float(numbers.get("threshold", 0.0))):
            del words["threshold"]
        own = [chunk for chunk, seen in self.values.items() if seen == value]
        since = "" if self.chunk in own or not own else f" at chunk {own[-1]}"
        at = f" at rung {words.get('rung')}" if rung != self.chunk else " at that rung"
        if "unit" in words:
            at = f" at rung {words.get('rung')}, in units of {words['unit']} ({words.get('paid')} spent)"
        keep = numbers.get("keep")
        best = {0: "nobody goes on while so few have been there", 1: "only the best goes on"}
        whose = "rival" in words and "lead" not in words
        return words | {
            "its": f"its value {words.get('value')}{since}",
            "rank_th": _ordinal(numbers.get("rank")),
            "at_rung": at if "rung" in words else "",
            "go_on": best.get(keep, f"the best {words.get('keep')} go on") if isinstance(keep, int) else "",
            "too": f", and {_counted(numbers, 'waiting', 'better one waits', 'better ones wait')} already"
            if "waiting" in words
            else "",
            "better": "more" if search.maximize else "less",
            "worse": "lower" if search.maximize else "higher",
            "whose": f" (trial {words['rival']}'s)" if whose else "",
            "others": _counted(numbers, "peers", "other", "others"),
            "on_examples": _counted(numbers, "examples", "example", "examples"),
            "flat_chunks": _counted(numbers, "flat", "chunk", "chunks"),
            "budget_chunks": _counted(numbers, "budget", "chunk", "chunks"),
            "spent_chunks": _counted(numbers, "spent", "chunk was", "chunks were"),
        }

    @property
    def _said(self) -> Mapping[str, Any]:
        return self.verdict.data if self.verdict is not None else {}

    def _standing(self, search: Search) -> str:
        value = self.values.get(self.chunk)
        if not self.chunk:
            return "before its first chunk was done"
        return f"after chunk {self.chunk}{self._of(search)}" + (f" at {_text(value)}" if value is not None else "")

    def _of(self, search: Search) -> str:
        if self.extended:
            return f" of {self.chunks} (extended by {self.extended})"
        return f" of {search.chunks}" if search.chunks else ""

    def _last_verdict(self) -> str:
        """What was last said of a trial that no verdict ended."""
        if self.verdict is None:
            return ""
        by, verdict, reason = (self._said.get(name) for name in ("by", "verdict", "reason"))
        return f" {by or 'The executor'} had said {verdict}{f' ({reason})' if reason else ''}."


_STATES_AFTER = {"stop": "", "cancel": "", "pause": "paused", "resume": "running"}
"""The state that a command's verb leads to; the end of a trial is an event of its own."""


def _origin(about: Mapping[str, Any]) -> str:
    """How a trial that a person has added came about; "" of others."""
    if "clone_of" not in about:
        return "added by hand" if about.get("added") else ""
    return f"a {'warm ' if about.get('warm_start') else ''}clone of trial {about['clone_of']}"


def _first(lines: Iterable[tuple[tuple[str, ...], str]], words: Mapping[str, str]) -> str:
    """The first line that has all its words, filled in; "" without any."""
    return next((line.format_map(words) for names, line in lines if all(name in words for name in names)), "")


def _command(event: Event) -> str:
    source, verb = event.data.get("source"), event.data.get("verb")
    return f"the command `{verb}`" + (f" from {source}" if source else "")


def _text(value: object) -> str:
    """A number as read back from JSON, in four digits."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(_text, value)) if isinstance(value, list) else str(value)


def _float(value: object) -> float:
    """The number that a value read back from JSON means; NaN for what is none."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan


def _counted(numbers: Mapping[str, Any], name: str, one: str, many: str) -> str:
    """One of a verdict's numbers with its noun, whatever the log has there."""
    value = numbers.get(name)
    return f"{_text(value)} {one if value == 1 else many}"


def _ordinal(number: object) -> str:
    if not isinstance(number, int):
        return str(number)
    ends = {1: "st", 2: "nd", 3: "rd"}
    return f"{number}{'th' if number % 100 in (11, 12, 13) else ends.get(number % 10, 'th')}"


def _ranges(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 5] -> "0 to 2, 5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return ", ".join(" to ".join(map(str, run)) for run in runs)
