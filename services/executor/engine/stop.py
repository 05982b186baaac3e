"""The end of a sample by its tokens."""

from scalellm.services.executor.engine.request import FinishReason
from scalellm.services.executor.engine.sequence import Sequence


def stop_reason(seq: Sequence) -> tuple[FinishReason, int | None] | None:
    """Return why the sample ends with its last token, and that token if it is the cause; None to go on.

    Depends on the tokens only, so a resumed sample that had reached its end just before it was moved is seen to.
    """
    group = seq.group
    num_output = seq.num_output_tokens
    if num_output == 0:
        return None
    last = seq.token_ids[-1]
    # A text that is complete by its grammar ends, however short it is.
    is_complete = bool(group.request.grammar) and last in group.eos_ids
    if is_complete or (last in group.stop_ids and num_output > group.request.sampling.min_tokens):
        return FinishReason.STOP, last
    if num_output >= group.max_tokens:
        return FinishReason.LENGTH, None
    return None
