"""Which requests get the most likely token each time, whatever came before: vLLM's sampler adds
nothing for them, so several of their tokens can be taken in one step."""

from typing import Any

from vllm import SamplingParams
from vllm.sampling_params import SamplingType

# What changes no token. Stop strings are found in the text, a step's tokens at a time.
_NO_MATTER = frozenset({
    *("n", "temperature", "top_p", "top_k", "min_p", "seed", "stop_token_ids", "ignore_eos"),
    *("max_tokens", "detokenize", "skip_special_tokens", "spaces_between_special_tokens"),
    *("include_stop_str_in_output", "output_kind", "stream_interval", "skip_clone"),
    *("output_text_buffer_length", "extra_args", "skip_reading_prefix_cache", "flat_logprobs"),
})  # fmt: skip


def is_greedy(params: SamplingParams | None) -> bool:
    """Whether the tokens of a request are the most likely ones and nothing else is wanted of
    them. Anything that is not known here makes it False."""
    if params is None or params.sampling_type is not SamplingType.GREEDY:
        return False
    names = [name for name in params.__struct_fields__ if not name.startswith("_")]
    default = SamplingParams()
    return all(
        getattr(params, name) == getattr(default, name) or _nothing(getattr(params, name))
        for name in names
        if name not in _NO_MATTER
    )


def _nothing(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, list | dict) and not value)
