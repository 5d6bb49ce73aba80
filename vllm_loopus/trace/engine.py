"""The served engine's answers: tokens and exit depths. The one module here that imports vLLM."""

import os
from collections.abc import Sequence
from typing import Any

from vllm_loopus.modeling.halting import HaltingRule


def start(source: str, rule: HaltingRule, *, dtype: str, max_model_len: int) -> Any:
    """vLLM's `LLM` for a checkpoint whose halting fields are those of `rule`; it takes token ids.

    Raises `ValueError` when vLLM is not there or refuses it.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    try:
        from vllm import LLM
    except ImportError as error:
        raise ValueError(
            f"vLLM cannot be imported ({error}); pip install 'vllm-loopus[cpu]' or [cuda]"
        ) from error
    overrides = {
        "max_loops": rule.max_loops,
        "min_loops": rule.min_loops,
        "exit_threshold": rule.exit_threshold,
        "halting_strategy": rule.strategy,
        "exit_interval": rule.exit_interval,
        "convergence_epsilon": rule.convergence_epsilon,
    }
    try:
        return LLM(
            source,
            skip_tokenizer_init=True,
            hf_overrides=overrides,
            dtype=dtype,
            max_model_len=max_model_len,
        )
    except RuntimeError as error:  # its reason is in the log above
        raise ValueError(f"vLLM does not start with {source}: {error}") from error


def answer(
    llm: Any,
    prompts: Sequence[Sequence[int]],
    rule: HaltingRule,
    max_tokens: int,
    stops: Sequence[int],
) -> list[tuple[list[int], list[int]]]:
    """Greedy token ids and exit depths for prompts of token ids, all in one batch.

    The knobs of `rule` that a request may set are set by the request.
    """
    from vllm import SamplingParams

    from vllm_loopus import exit_depths

    params = SamplingParams(
        temperature=0,
        max_tokens=max_tokens,
        ignore_eos=True,  # `stops` has it: the same tokens end an answer on both sides
        stop_token_ids=list(stops),
        detokenize=False,
        extra_args={
            "max_loops": rule.max_loops,
            "min_loops": rule.min_loops,
            "exit_threshold": rule.exit_threshold,
        },
    )
    outputs = llm.generate([{"prompt_token_ids": list(p)} for p in prompts], params, use_tqdm=False)
    return [(list(o.outputs[0].token_ids), exit_depths(o)) for o in outputs]


def shut_down(llm: Any) -> None:
    """Ends the engine's processes."""
    llm.llm_engine.engine_core.shutdown()
