"""Early-stopping policies: pure functions from the history of a search to one verdict per trial."""

from rapidfire_policies.asha import ASHA
from rapidfire_policies.auto import Auto
from rapidfire_policies.base import Decision, History, Policy, TrialHistory, TrialState, Verdict
from rapidfire_policies.betting_race import BettingRace
from rapidfire_policies.cost_aware import CostAware
from rapidfire_policies.curve_predict import CurvePredict
from rapidfire_policies.fixed_step import FixedStep
from rapidfire_policies.guard import Guard
from rapidfire_policies.hyperband import Hyperband
from rapidfire_policies.median import Median
from rapidfire_policies.non_inferior import NonInferior
from rapidfire_policies.nop import Nop
from rapidfire_policies.paired_race import PairedRace
from rapidfire_policies.pasha import PASHA
from rapidfire_policies.patience import Patience
from rapidfire_policies.rising_bound import RisingBound
from rapidfire_policies.sequential_halving import SequentialHalving
from rapidfire_policies.spare import Spare
from rapidfire_policies.successive_halving import SuccessiveHalving
from rapidfire_policies.top_two_thompson import TopTwoThompson
from rapidfire_policies.warm_up import WarmUp
from rapidfire_policies.wilcoxon import Wilcoxon

__all__ = [
    "ASHA",
    "PASHA",
    "Auto",
    "BettingRace",
    "CostAware",
    "CurvePredict",
    "Decision",
    "FixedStep",
    "Guard",
    "History",
    "Hyperband",
    "Median",
    "NonInferior",
    "Nop",
    "PairedRace",
    "Patience",
    "Policy",
    "RisingBound",
    "SequentialHalving",
    "Spare",
    "SuccessiveHalving",
    "TopTwoThompson",
    "TrialHistory",
    "TrialState",
    "Verdict",
    "WarmUp",
    "Wilcoxon",
]
