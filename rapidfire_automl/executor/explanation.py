"""What the planner chose and why, in words."""

from __future__ import annotations

from collections.abc import Iterable

from rapidfire_automl.executor.base import Base
from rapidfire_automl.executor.rollouts import Counts
from rapidfire_automl.plan import Plan
from rapidfire_automl.records import TrialRecord


def explain(plan: Plan, base: Base, rollouts: Counts, records: Iterable[TrialRecord]) -> str:
    """Lines for people.

    Args:
        plan: The plan in force.
        base: The base, with what its joint passes did.
        rollouts: What joint rollouts did.
        records: The trials so far.
    """
    limit = "any number of" if plan.trials_per_pass is None else str(plan.trials_per_pass)
    lines = [f"Plan: {plan.budget_tokens} tokens and {limit} trials a pass; {plan.reason}."]
    lines += [f"  {tokens:>6} tokens a pass: {rate:8.0f} tokens/s" for tokens, rate in plan.tokens_per_s]
    lines += [f"Seam: {note}." for note in base.notes]
    timing = base.multiplexer.timing
    if timing.passes:
        lines.append(
            f"Joint passes: {timing.passes}, {timing.trials / timing.passes:.1f} trials each; "
            f"decoder forward {timing.forward_s:.1f} s, head {timing.head_s:.1f} s, "
            f"backward {timing.backward_s:.1f} s."
        )
    if rollouts.steps:
        seconds = rollouts.prefill_s + rollouts.decode_s + rollouts.choose_s
        lines.append(
            f"Joint rollouts: {rollouts.tokens} tokens, {rollouts.tokens / seconds:.0f} tokens/s, "
            f"{rollouts.row_steps / rollouts.steps:.1f} rows a step; prompts {rollouts.prefill_s:.1f} s, "
            f"decoder {rollouts.decode_s:.1f} s, choice of tokens {rollouts.choose_s:.1f} s."
        )
    lines += [f"Trial {r.number} trains unfused: {r.why_unfused}." for r in records if r.why_unfused]
    return "\n".join(lines)
