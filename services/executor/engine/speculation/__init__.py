"""Exact speculation: tokens that are guessed, and accepted where they are drawn anyway."""

from scalellm.services.executor.engine.speculation.draft_budget import DraftBudget
from scalellm.services.executor.engine.speculation.drafter import Draft, Drafter, SuffixDrafter
from scalellm.services.executor.engine.speculation.speculator import Budget, Speculator

__all__ = ["Budget", "Draft", "DraftBudget", "Drafter", "Speculator", "SuffixDrafter", "suffix_speculator"]


def suffix_speculator(target_itl: float | None) -> Speculator:
    """Return what guesses from texts that are there anyway, as far as that pays by measured times of steps.

    Steps with guesses take `target_itl` seconds at most; None = as long as it pays.
    """
    return Speculator(SuffixDrafter(), DraftBudget(target_itl))
