"""The end of a sample by its tokens."""

from scalellm.services.executor.engine.request import FinishReason
from scalellm.services.executor.engine.sequence import Sequence


def stop_reason(seq: Sequence) -> tuple[FinishReason, int | None] | None:
    """Return the reason why the sample ends with its last token, and that token if it is a stop token; None if it goes
    on.

    The result depends on the tokens alone, so the end of a resumed sample that was moved right after its last token is
    found too.
    """
    group = seq.group
    num_output = seq.num_output_tokens
    if num_output == 0:
        return None
    last = seq.token_ids[-1]
    # A text that is complete by its grammar ends, even if it is shorter than min_tokens.
    is_complete = bool(group.request.grammar) and last in group.eos_ids
    if is_complete or (last in group.stop_ids and num_output > group.request.sampling.min_tokens):
        return FinishReason.STOP, last
    if num_output >= group.max_tokens:
        return FinishReason.LENGTH, None
    return None
