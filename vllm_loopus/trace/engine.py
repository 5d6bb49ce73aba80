"""Answers and exit depths of the vLLM engine. The only module of this package that uses vLLM."""

import os
from collections.abc import Sequence
from typing import Any

from vllm_loopus.modeling.halting import HaltingRule


def start(source: str, rule: HaltingRule, *, dtype: str, max_model_len: int) -> Any:
    """Starts vLLM's `LLM` for a checkpoint, with the halting fields of `rule` and no tokenizer.

    Raises `ValueError` if vLLM is not installed or does not start.
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
    except RuntimeError as error:  # vLLM has logged the reason
        raise ValueError(f"vLLM does not start with {source}: {error}") from error


def answer(
    llm: Any,
    prompts: Sequence[Sequence[int]],
    rule: HaltingRule,
    max_tokens: int,
    stops: Sequence[int],
) -> list[tuple[list[int], list[int]]]:
    """Greedy token ids and exit depths for prompts of token ids, all in one batch.

    The knobs of `rule` that requests can set are given with each request.
    """
    from vllm import SamplingParams

    from vllm_loopus import exit_depths

    params = SamplingParams(
        temperature=0,
        max_tokens=max_tokens,
        ignore_eos=True,  # `stops` includes it
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
