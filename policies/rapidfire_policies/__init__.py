"""Early-stopping policies: pure functions from the history of a search to one verdict per trial."""

from rapidfire_policies.asha import ASHA
from rapidfire_policies.base import Decision, History, Policy, TrialHistory, TrialState, Verdict
from rapidfire_policies.cost_aware import CostAware
from rapidfire_policies.median import Median
from rapidfire_policies.nop import Nop
from rapidfire_policies.sequential_halving import SequentialHalving
from rapidfire_policies.top_two_thompson import TopTwoThompson

__all__ = [
    "ASHA",
    "CostAware",
    "Decision",
    "History",
    "Median",
    "Nop",
    "Policy",
    "SequentialHalving",
    "TopTwoThompson",
    "TrialHistory",
    "TrialState",
    "Verdict",
]
