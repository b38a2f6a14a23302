"""Early-stopping policies: pure functions from the history of a search to one verdict per trial."""

from rapidfire_policies.asha import ASHA
from rapidfire_policies.base import Decision, History, Policy, TrialHistory, TrialState, Verdict
from rapidfire_policies.median import Median
from rapidfire_policies.nop import Nop

__all__ = ["ASHA", "Decision", "History", "Median", "Nop", "Policy", "TrialHistory", "TrialState", "Verdict"]
