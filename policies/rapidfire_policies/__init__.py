"""Early-stopping policies: pure functions from the history of a search to one verdict per trial."""

from rapidfire_policies.asha import ASHA
from rapidfire_policies.auto import Auto
from rapidfire_policies.base import Decision, History, Policy, TrialHistory, TrialState, Verdict
from rapidfire_policies.curve_predict import CurvePredict
from rapidfire_policies.median import Median
from rapidfire_policies.nop import Nop
from rapidfire_policies.rising_bound import RisingBound

__all__ = [
    "ASHA",
    "Auto",
    "CurvePredict",
    "Decision",
    "History",
    "Median",
    "Nop",
    "Policy",
    "RisingBound",
    "TrialHistory",
    "TrialState",
    "Verdict",
]
