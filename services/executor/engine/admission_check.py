"""Checks of a request before the engine accepts it."""

from scalellm.services.executor.engine.config import EngineConfig
from scalellm.services.executor.engine.request import EngineRequest
from scalellm.services.executor.engine.sampling_params import InvalidRequestError


def check_request(request: EngineRequest, config: EngineConfig) -> None:
    """Raise InvalidRequestError, naming the field and the limit, for a request that can never be served."""
    sampling = request.sampling
    sampling.validate(config.vocab_size, config.max_logprobs)
    if sampling.n > config.max_num_seqs:
        raise InvalidRequestError("n", f"must be at most max_num_seqs ({config.max_num_seqs}), got {sampling.n}")
    num_prompt_tokens = len(request.prompt_token_ids)
    if num_prompt_tokens == 0:
        raise InvalidRequestError("prompt", "must have at least one token")
    if num_prompt_tokens >= config.max_model_len:
        raise InvalidRequestError(
            "prompt",
            f"{num_prompt_tokens} tokens leave no room for output: max_model_len is {config.max_model_len} tokens, "
            f"so a prompt may have at most {config.max_model_len - 1}",
        )
    _check_token_ids("prompt", request.prompt_token_ids, config.vocab_size)
    # A draft of such a token would make the step of all requests fail.
    _check_token_ids("prediction_token_ids", request.prediction_token_ids, config.vocab_size)
    longest = config.max_model_len - num_prompt_tokens
    if sampling.max_tokens is not None:
        longest = min(longest, sampling.max_tokens)
    seen: set[int] = set()
    for sample in request.resumed:
        if not 0 <= sample.index < sampling.n or sample.index in seen:
            raise InvalidRequestError("resumed", f"sample {sample.index} is not one of 0..{sampling.n - 1}, each once")
        seen.add(sample.index)
        if len(sample.token_ids) > longest:
            raise InvalidRequestError(
                "resumed", f"sample {sample.index} has {len(sample.token_ids)} tokens, it may have at most {longest}"
            )
        _check_token_ids("resumed", sample.token_ids, config.vocab_size)


def _check_token_ids(field: str, token_ids: tuple[int, ...], vocab_size: int) -> None:
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        raise InvalidRequestError(field, f"token ids must be between 0 and {vocab_size - 1}")
