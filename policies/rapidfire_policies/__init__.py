"""Early-stopping policies: pure functions from the history of a search to one verdict per trial."""

from rapidfire_policies.asha import ASHA
from rapidfire_policies.base import Decision, History, Policy, TrialHistory, TrialState, Verdict
from rapidfire_policies.betting_race import BettingRace
from rapidfire_policies.median import Median
from rapidfire_policies.non_inferior import NonInferior
from rapidfire_policies.nop import Nop
from rapidfire_policies.paired_race import PairedRace
from rapidfire_policies.wilcoxon import Wilcoxon

__all__ = [
    "ASHA",
    "BettingRace",
    "Decision",
    "History",
    "Median",
    "NonInferior",
    "Nop",
    "PairedRace",
    "Policy",
    "TrialHistory",
    "TrialState",
    "Verdict",
    "Wilcoxon",
]
