"""Exact speculative decoding: drafted tokens are accepted only where they equal the drawn tokens."""

from scalellm.services.executor.engine.speculation.draft_budget import DraftBudget
from scalellm.services.executor.engine.speculation.drafter import Draft, Drafter, SuffixDrafter
from scalellm.services.executor.engine.speculation.speculator import Budget, Speculator

__all__ = ["Budget", "Draft", "DraftBudget", "Drafter", "Speculator", "SuffixDrafter", "suffix_speculator"]


def suffix_speculator(target_itl: float | None) -> Speculator:
    """Make a speculator that drafts from existing texts, as many tokens as pay off by measured step times.

    Args:
        target_itl: Most seconds of a step with drafts; None = no limit.
    """
    return Speculator(SuffixDrafter(), DraftBudget(target_itl))
