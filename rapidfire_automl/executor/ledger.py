"""The journal of a search that several workers share: what was decided of a trial, as an attribute of the trial.

It stands beside what is reported, a new attempt inherits it, and the storage refuses a line from a worker whose trial
others have taken over: nobody can decide about a trial who does not have it.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

import optuna

from rapidfire_automl.executor.journal import Kept, Past, differences
from rapidfire_automl.patience import PatientStorage
from rapidfire_automl.refusals import SearchDiffers
from rapidfire_automl.seeding import seed_of
from rapidfire_automl.workers import LEDGER_ATTR
from rapidfire_policies.base import Verdict

FACTS_ATTR = "rapidfire:facts"
"""The study attribute that holds what is searched, and what proposals are drawn from."""


class Ledger:
    """Writes down what is decided of a worker's trials.

    Args:
        study: Shared with others.
    """

    def __init__(self, study: optuna.Study) -> None:
        self._study = study
        self._trials: dict[int, optuna.Trial] = {}
        self._pages: dict[int, dict[str, Any]] = {}

    def agree(self, facts: Mapping[str, Any]) -> tuple[str, int]:
        """Compare what is searched with what others search; the first says it.

        Returns:
            A name that no other search has, and what proposals are drawn from.

        Raises:
            SearchDiffers: This worker was started with something else.
        """
        told = self._study.user_attrs.get(FACTS_ATTR)
        if not isinstance(told, Mapping):
            name = f"{self._study.study_name} {secrets.token_hex(8)}"
            mine = {"facts": dict(facts), "sampler_seed": seed_of(self._study.sampler), "search": name}
            storage = self._study._storage
            assert isinstance(storage, PatientStorage)
            told = storage.settle_study_user_attr(self._study._study_id, FACTS_ATTR, mine)
        if differ := differences(told["facts"], facts):
            raise SearchDiffers(
                f"This worker can't join study {self._study.study_name}: {'; '.join(differ)}. Start it with the same "
                "base, data and settings."
            )
        return str(told["search"]), int(told["sampler_seed"])

    def open(self, number: int, trial: optuna.Trial) -> Past:
        """Take a trial's page.

        Args:
            number: The trial's.
            trial: This worker's attempt at it.

        Returns:
            What was decided of it so far.
        """
        self._trials[number] = trial
        self._pages[number] = dict(trial.user_attrs.get(LEDGER_ATTR) or {})
        return past_of(number, self._pages[number])

    def write(self, kind: str, **data: Any) -> Kept:
        """Add an entry, as to a journal.

        Args:
            kind: Of the entry; what is not of one trial alone (asked, built, over) the study knows.
            data: The entry.
        """
        lost = set()
        if kind in ("round", "ruled"):
            for number, chunk, verdict, reason in data["verdicts"]:
                page = self._pages[number]
                changed = {"judged": max(chunk, page.get("judged", 0))}
                if verdict:
                    changed["verdicts"] = [*page.get("verdicts", ()), [chunk, verdict, reason]]
                    changed["by_hand"] = kind == "ruled"
                changed |= _noted(page, data)
                if {**page, **changed} != page and not self._put(number, changed):
                    lost.add(number)
        elif kind == "ended" and not self._put(data["trial"], {"ended": dict(data)}):
            lost.add(data["trial"])
        elif kind == "extended":
            number = data["trial"]
            page = self._pages[number]
            more = [*page.get("extended", ()), [data["step"], data["boundaries"]]]
            if not self._put(number, {"extended": more, **_noted(page, data)}):
                lost.add(number)
        return Kept(frozenset(lost))

    def _put(self, number: int, changed: Mapping[str, Any]) -> bool:
        page = {**self._pages[number], **changed}
        try:
            self._trials[number].set_user_attr(LEDGER_ATTR, page)
        except optuna.exceptions.UpdateFinishedTrialError:
            return False
        self._pages[number] = page
        return True

    def close(self) -> None:
        """As of a journal; there is nothing to close."""


def _noted(page: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """Which command it comes of, so that whoever takes the trial over does it no second time."""
    return {"commands": {**page.get("commands", {}), data["command"]: data["text"]}} if "command" in data else {}


def commands_of(trial: optuna.trial.FrozenTrial) -> Mapping[str, str]:
    """What commands to a trial have come to, by id."""
    page = trial.user_attrs.get(LEDGER_ATTR)
    return page.get("commands", {}) if isinstance(page, Mapping) else {}


def past_of(number: int, page: Mapping[str, Any]) -> Past:
    """A trial's page as what a journal says of it."""
    past = Past(asked=[number])
    verdicts = [(int(chunk), str(verdict), str(reason)) for chunk, verdict, reason in page.get("verdicts", ())]
    if verdicts:
        past.verdicts[number] = verdicts
    if "judged" in page:
        past.judged[number] = int(page["judged"])
    if page.get("extended"):
        past.extended[number] = [(int(step), list(boundaries)) for step, boundaries in page["extended"]]
    if page.get("by_hand"):
        past.by_hand.add(number)
    if page.get("ended"):
        past.ended[number] = dict(page["ended"])
    return past


def waits(past: Past, number: int) -> bool:
    """Whether a trial is paused, and nobody has wanted it back."""
    verdicts = past.verdicts.get(number, [])
    return past.is_paused(number) and verdicts[-1][1] == Verdict.PAUSE
