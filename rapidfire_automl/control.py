"""Steering a search while it runs: one set of verbs, whoever speaks them. Torch-free.

A `Command` is data: a verb, a trial, arguments. It reaches the search through a mailbox (`mailboxes/`: memory, run
folder, Optuna study), is applied once, at the next safe step boundary of the trial it is about, and is answered with an
`Effect`. `Controls` are the verbs as methods: `RapidFireExecutor`, `Experiment`, `AutoML` and `Search` have them.

Each race has one answer:

| what meets | what happens |
|---|---|
| pause and stop of one trial before either has taken effect | the stop wins, in either order; the pause is refused |
| pause, then resume before the pause has taken effect | the trial trains on; both are applied |
| resume, then pause before it has a slot again | it stays paused; both are applied |
| two stops, or two pauses | the first is applied, the second is refused |
| resume of a trial that trains, or that was stopped | refused with its state |
| any verb but clone for a finished trial | refused with its state |
| a trial nobody knows, or one that has not begun | refused; the message says which there are |
| clone beside any other verb about its source | the clone takes the source as it is at that moment, without waiting |
| the same id twice, from one source or several | applied once, answered once |
| pause or stop as the trial finishes its last chunk | the trial is complete; the command is refused |
| the policy's verdict about a trial paused by hand | none is asked for: to the policy it has stopped, its values stay |
| the policy's verdict about a trial resumed by hand | none, until it has trained its next chunk |
| a command sent to an earlier attempt of the search (before a restart) | refused as stale, unless it was applied |
| the search is killed when a command has taken effect | it goes on with that; the command is not applied once more |
| the search is killed before a command has taken effect | nothing was promised: send it again, with its id if unsure |
| the search is killed before a cancel has ended it | run again, it goes on; the cancel is stale |
| checkpoint while a trial is paused | it stays on disk as of its last chunk, or where it was last put there |
| a trial that rolls out (GRPO, RLOO) | a stop takes it out after the next token, a pause waits for the rollout's end |
| a command that arrives after the end | refused: the search has ended |
| extend or a warm clone of a trial that goes on, before this process has loaded it | waits until it has |
| a command for a trial that trains in another process | left alone for that process |
| the same from that search's own process | a worker's goes through the study to whoever has it; else refused |
| a command for a silent worker's trial | done by who takes the trial over |
| a worker that had fallen silent comes back | what it had begun to do is void; what others have answered stays |
| a worker leaves, others go on | what waits is left to them |

Who may steer is who may write where commands are read (`mailboxes`): there is no other lock, and no other need of one,
since a command is data. It can't name code: a policy from outside is one of `rapidfire_policies`, or of a class the
search was started with; only the search's own process may set any.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rapidfire_automl.hints import nearest
from rapidfire_automl.limits import limit_of
from rapidfire_policies.wording import counted

VERBS = ("pause", "resume", "stop", "clone", "add", "extend", "set-policy", "checkpoint", "cancel")
OF_A_TRIAL = ("pause", "resume", "stop", "clone", "extend")
"""Verbs that name a trial; the others must not."""
OWN_SOURCE = "Python"
"""The source of commands from the search's own process that say no other."""
RULED = ("paused by ", "resumed by ", "stopped by ")
"""What the reason of a person's verdict begins with; who it was follows."""
LARGEST_BYTES = 64 * 1024
"""Of a command as JSON: enough for any configuration, too little to fill a disk with."""
MOST_CHUNKS = 10_000
"""By which one command extends a trial: more than anybody means, few enough to be written into the journal."""
DEEPEST = 16
"""Lists and tables within one another in an argument: enough for any policy that holds policies."""

_TAKES: dict[str, tuple[str, ...]] = {
    "clone": ("set", "warm_start"),
    "add": ("set",),
    "extend": ("chunks",),
    "set-policy": ("name", "arguments"),
}
_NAME = re.compile(r"[0-9A-Za-z][0-9A-Za-z_-]{0,79}")


class ControlError(ValueError):
    """A command that is malformed, or that cannot be sent: nobody listens there."""


@dataclass(frozen=True, slots=True)
class Command:
    """One thing somebody wants of a running search; checked when it is made.

    Args:
        verb: One of `VERBS`.
        trial: Optuna's number of the trial it is about; None for verbs about the search.
        arguments: clone: `set`, `warm_start`; add: `set`; extend: `chunks`; set-policy: `name` (None switches off) and
            `arguments`. JSON values; only within one process `name` may be a policy.
        source: Who sent it, in words.
        id: Its own, so that it is applied once; letters, digits, `-` and `_`.
        when_s: When it was made, in seconds since 1970.
        attempt: The attempt of the search it was sent to, None if that was not known.

    Raises:
        ControlError: Anything else.

    >>> Command("clone", 3, {"set": {"learning_rate": 1e-4}, "warm_start": True}).describe()
    'clone 3 with learning_rate=0.0001, warm'
    >>> Command("puase", 3)
    Traceback (most recent call last):
        ...
    rapidfire_automl.control.ControlError: `puase` is no command. Did you mean `pause`?
    """

    verb: str
    trial: int | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    source: str = OWN_SOURCE
    id: str = field(default_factory=lambda: new_id())
    when_s: float = field(default_factory=time.time)
    attempt: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.verb, str) or self.verb not in VERBS:
            said = self.verb if isinstance(self.verb, str) else reprlib.repr(self.verb)
            near = nearest(said, VERBS)
            hint = f"Did you mean `{near}`?" if near else f"Known are {', '.join(VERBS)}."
            raise ControlError(f"`{said}` is no command. {hint}")
        if self.verb in OF_A_TRIAL:
            _whole(f"trial of {self.verb}", self.trial, least=0)
        elif self.trial is not None:
            got = reprlib.repr(self.trial)
            raise ControlError(f"`{self.verb}` is about the whole search, got trial {got}. Leave the trial out.")
        if not isinstance(self.id, str) or not _NAME.fullmatch(self.id):
            raise ControlError(f"`id` must be up to 80 letters, digits, `-` and `_`, got {reprlib.repr(self.id)}.")
        if not isinstance(self.source, str) or not self.source.isprintable() or len(self.source) > 200:
            raise ControlError(f"`source` must be a line of up to 200 characters, got {reprlib.repr(self.source)}.")
        if isinstance(self.when_s, bool) or not isinstance(self.when_s, (int, float)) or not _fits(self.when_s):
            raise ControlError(f"`when_s` must be a finite number, got {reprlib.repr(self.when_s)}.")
        if self.attempt is not None:
            _whole("attempt", self.attempt, least=1)
        object.__setattr__(self, "arguments", _checked(self.verb, self.arguments))

    def describe(self) -> str:
        """In one line."""
        words = [self.verb, *([] if self.trial is None else [str(self.trial)])]
        changes = self.arguments.get("set")
        if changes:
            words.append(("with " if self.verb == "clone" else "") + ", ".join(f"{k}={v}" for k, v in changes.items()))
        if self.verb == "extend":
            words.append(f"by {counted(self.arguments['chunks'], 'chunk')}")
        if self.verb == "set-policy":
            words.append(str(self.arguments["name"] or "off"))
        return " ".join(words) + (", warm" if self.arguments.get("warm_start") else "")

    def to_json(self) -> str:
        """For another process.

        Raises:
            ControlError: It holds something only this process has.
        """
        told = {name: getattr(self, name) for name in ("id", "verb", "trial", "arguments", "source", "when_s")}
        try:
            text = json.dumps({**told, "arguments": dict(self.arguments), "attempt": self.attempt}, allow_nan=False)
        except (TypeError, ValueError):
            raise ControlError(
                'A command to another process must be plain data. Name the policy, like "asha", or set it from the '
                "search's own process."
            ) from None
        if len(text.encode()) > LARGEST_BYTES:
            raise ControlError(f"A command must be at most {LARGEST_BYTES} bytes of JSON, got {len(text.encode())}.")
        return text

    @classmethod
    def from_json(cls, text: str | bytes) -> Command:
        """What `to_json` wrote, checked again: whoever can write there may have written anything.

        Raises:
            ControlError: It is no command.
        """
        if len(text) > LARGEST_BYTES:
            raise ControlError(f"A command must be at most {LARGEST_BYTES} bytes of JSON, got {len(text)}.")
        try:
            told = json.loads(text)
        except (ValueError, RecursionError):
            raise ControlError("A command must be JSON.") from None
        known = {"id", "verb", "trial", "arguments", "source", "when_s", "attempt"}
        if not isinstance(told, dict) or not {"id", "verb"} <= told.keys() <= known:
            raise ControlError(f"A command must be a JSON object with `id`, `verb` and of the rest {sorted(known)}.")
        command = cls(**told)
        if not isinstance(command.arguments.get("name"), (str, type(None))):
            raise ControlError("`name` of a policy must be a string or null.")
        return command


@dataclass(frozen=True, slots=True)
class Effect:
    """What came of a command.

    Args:
        state: Whether it took effect.
        text: In words.
        when_s: When, in seconds since 1970.
    """

    state: Literal["applied", "refused"]
    text: str
    when_s: float = field(default_factory=time.time)

    @property
    def applied(self) -> bool:
        """Whether it took effect."""
        return self.state == "applied"


@dataclass(frozen=True, slots=True)
class Sent:
    """A command on its way.

    Args:
        command: The command.
        look: Waits at most so many seconds for its effect.
    """

    command: Command
    look: Callable[[float], Effect | None] = field(repr=False)

    def wait(self, timeout_s: float = 5.0) -> Effect | None:
        """Its effect, or None if there is none yet.

        Not from a listener or a trainer's callback: the search waits for these to return.
        """
        return self.look(timeout_s)

    @property
    def effect(self) -> Effect | None:
        """Its effect if there is one by now."""
        return self.look(0.0)


class Controls:
    """The verbs. Each sends a command and returns at once; `.wait()` on what it returns waits for the effect."""

    def _send(self, command: Command) -> Sent:
        raise NotImplementedError

    def pause(self, trial: int) -> Sent:
        """Have a trial give up its slot at its next step and keep everything; no policy resumes it, only `resume`."""
        return self._send(Command("pause", trial))

    def resume(self, trial: int) -> Sent:
        """Have a paused trial go on where it is, before newcomers; also one that the policy has paused."""
        return self._send(Command("resume", trial))

    def stop(self, trial: int) -> Sent:
        """Prune a trial at its next step; its value is what it reported last."""
        return self._send(Command("stop", trial))

    def clone(self, trial: int, *, warm_start: bool = False, set: Mapping[str, Any] | None = None) -> Sent:  # noqa: A002
        """Start a new trial with a trial's configuration, some of it changed.

        Args:
            trial: The source; it may have ended.
            warm_start: Begin with the source's adapter and optimizer state as they are now, or with its saved adapter
                if it has ended. Schedule, data order and chunks begin anew, and every setting is the new trial's own.
            set: Parameter -> value; "/2" halves the source's, "*1.5" is half as much again.
        """
        return self._send(Command("clone", trial, {"set": dict(set or {}), "warm_start": warm_start}))

    def add(self, params: Mapping[str, Any]) -> Sent:
        """Start one more trial with these parameters; the sampler draws those left out."""
        return self._send(Command("add", None, {"set": dict(params)}))

    def extend(self, trial: int, chunks: int) -> Sent:
        """Train a trial that has not ended for some more chunks, as long as its last.

        From its next step on, its learning rate follows the schedule a trial of the new length has. The policy judges
        it no more once it has done as many chunks as the others.

        Args:
            trial: Which.
            chunks: How many more, at most `MOST_CHUNKS`.
        """
        return self._send(Command("extend", trial, {"chunks": chunks}))

    def set_policy(self, policy: Any = None, **arguments: Any) -> Sent:
        """Judge the rounds to come by another policy.

        Args:
            policy: A name ("asha"), from within the process of the search also a policy, an Optuna pruner or
                "package.module:Class"; None stops nobody any more.
            arguments: The policy's.
        """
        return self._send(Command("set-policy", None, {"name": policy, "arguments": arguments}))

    def checkpoint(self) -> Sent:
        """Have every trial that trains put on disk at the end of its step, besides the end of each chunk."""
        return self._send(Command("checkpoint"))

    def cancel(self) -> Sent:
        """End the search at once; what has finished stays, and the adapters of trials under way are saved as they are.

        The search is over by that: to leave off for a while, interrupt it, and run it again later.
        """
        return self._send(Command("cancel"))


def new_id() -> str:
    """An id nobody else has; ids sort by time."""
    return f"{time.time_ns():020d}-{secrets.token_hex(4)}"


def _checked(verb: str, arguments: Any) -> dict[str, Any]:
    """The arguments with what was left out."""
    if not isinstance(arguments, Mapping) or not all(isinstance(name, str) for name in arguments):
        raise ControlError(f"`arguments` must be a table, got {reprlib.repr(arguments)}.")
    for name in arguments:
        if name not in _TAKES.get(verb, ()):
            takes = ", ".join(_TAKES.get(verb, ())) or "none"
            raise ControlError(f"`{name}` is no argument of {verb}. It takes: {takes}.")
    given = dict(arguments)
    if verb in ("clone", "add"):
        given["set"] = _changes(given.get("set", {}))
    if verb == "clone":
        given.setdefault("warm_start", False)
        if not isinstance(given["warm_start"], bool):
            raise ControlError(f"`warm_start` must be true or false, got {reprlib.repr(given['warm_start'])}.")
    if verb == "extend":
        _whole("chunks", given.get("chunks"), least=1)
        if given["chunks"] > MOST_CHUNKS:
            raise ControlError(f"`chunks` must be at most {MOST_CHUNKS} in one command, got {given['chunks']}.")
    if verb == "set-policy":
        given.setdefault("name", None)
        given["arguments"] = _changes(given.get("arguments", {}))
        if given["name"] is None and given["arguments"]:
            named = ", ".join(f"`{name}`" for name in given["arguments"])
            raise ControlError(f"A policy that is switched off takes no arguments, got {named}.")
    return given


def _changes(changes: Any) -> dict[str, Any]:
    if not isinstance(changes, Mapping):
        raise ControlError(f"`set` must be a table of names and values, got {reprlib.repr(changes)}.")
    for name, value in changes.items():
        if not isinstance(name, str) or not name.isprintable() or not name:
            raise ControlError(f"A parameter's name must be a word, got {reprlib.repr(name)}.")
        _check_value(name, value)
    return dict(changes)


def _check_value(name: str, value: Any, depth: int = 0) -> None:
    if isinstance(value, (int, float)) and not _fits(value):
        wanted = "fit into 64 bits" if isinstance(value, int) else f"be {limit_of(name) or 'finite'}"
        raise ControlError(f"`{name}` must {wanted}, got {reprlib.repr(value)}.")
    if isinstance(value, (list, tuple, Mapping)):
        if depth == DEEPEST:
            raise ControlError(f"`{name}` must have at most {DEEPEST} lists and tables within one another.")
        for inner in value.values() if isinstance(value, Mapping) else value:
            _check_value(name, inner, depth + 1)


def _fits(value: float) -> bool:
    return abs(value) < 2**63 if isinstance(value, int) else math.isfinite(value)


def _whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least or not _fits(value):
        raise ControlError(f"`{name}` must be a whole number >= {least}, got {reprlib.repr(value)}.")
