"""Which requests may get several tokens in one step."""

from typing import Any

import pytest
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from vllm_loopus.serving.runners.greedy import is_greedy


@pytest.mark.parametrize(
    "options",
    [{}, {"max_tokens": 5, "stop_token_ids": [3]}, {"extra_args": {"max_loops": 2}}],
)
def test_tokens_that_depend_on_nothing_but_the_model(options: dict[str, Any]) -> None:
    assert is_greedy(SamplingParams(temperature=0, **options))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 1.0, "seed": 3},
        {"presence_penalty": 0.5},
        {"repetition_penalty": 1.2},
        {"min_tokens": 2},
        {"logprobs": 0},
        {"prompt_logprobs": 1},
        {"logit_bias": {3: 1.0}},
        {"allowed_token_ids": [1, 2]},
        {"bad_words": ["a"]},
        {"stop": ["a"]},
        {"structured_outputs": StructuredOutputsParams(regex="a+")},
    ],
)
def test_others_get_one_at_a_time(options: dict[str, Any]) -> None:
    assert not is_greedy(SamplingParams(**{"temperature": 0, **options}))
