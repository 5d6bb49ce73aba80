"""Answers and exit depths of the vLLM engine. The only module of this package that uses vLLM."""

import os
from collections.abc import Sequence
from typing import Any

from vllm_loopus.architectures import LoopedConfig, record_of


def start(source: str, config: LoopedConfig, *, dtype: str, max_model_len: int) -> Any:
    """Starts vLLM's `LLM` for a checkpoint, with the loop fields of `config` and no tokenizer.

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
    overrides = {name: getattr(config, name) for name in record_of(config).served_fields}
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
    config: LoopedConfig,
    max_tokens: int,
    stops: Sequence[int],
) -> list[tuple[list[int], list[int]]]:
    """Greedy token ids and exit depths for prompts of token ids, all in one batch.

    The knobs of `config` that requests can set are given with each request.
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
            "max_loops": config.max_loops,
            "min_loops": config.min_loops,
            "exit_threshold": config.exit_threshold,
        },
    )
    outputs = llm.generate([{"prompt_token_ids": list(p)} for p in prompts], params, use_tqdm=False)
    return [(list(o.outputs[0].token_ids), exit_depths(o)) for o in outputs]


def shut_down(llm: Any) -> None:
    """Ends the engine's processes."""
    llm.llm_engine.engine_core.shutdown()
