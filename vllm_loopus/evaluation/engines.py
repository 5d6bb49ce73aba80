"""Runs models with the model types of lm-evaluation-harness: `vllm`, and `hf` for the reference.

A log-likelihood request has a context and a continuation. The whole text is one sequence, and all
its positions are at the exit depth of its *last* token, as in the uncached forward of the released
code. In vLLM this is a prompt with `prompt_logprobs`.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from vllm_loopus.evaluation.models import Model

VLLM, TRANSFORMERS = "vllm", "hf"
EXACT = "exact"
ENGINES = (VLLM, TRANSFORMERS)
# Positions not available for the text: vLLM generates one token, and lm-eval's rolling windows
# need another one.
RESERVED = 2


@dataclass(frozen=True)
class EngineOptions:
    """Options that all models of a run share.

    `max_length`: maximum tokens of a text; None: the model's. `batch_size`: only for `hf`.
    `kv_policy`: of looped models, only for vLLM.
    """

    engine: str = VLLM
    dtype: str = "auto"
    max_length: int | None = None
    batch_size: int = 16
    kv_policy: str = EXACT


@contextmanager
def running_engine(model: Model, options: EngineOptions) -> Iterator[Any]:
    """An lm-eval model with `apply(setting)`, `work()` and `close()`; closed at the end."""
    started = _vllm_model(model, options) if options.engine == VLLM else _hf_model(model, options)
    try:
        yield started
    finally:
        started.close()
        del started
        gc.collect()


def _vllm_model(model: Model, options: EngineOptions) -> Any:
    # Imported here because importing vLLM is slow and `hf` does not need it.
    from vllm_loopus.evaluation.vllm_engine import VLLMModel, plain_options

    if model.is_looped:
        chosen: dict[str, Any] = {"additional_config": {"loopus": {"kv_policy": options.kv_policy}}}
    else:
        chosen = plain_options()
    return VLLMModel(
        pretrained=str(model.folder),
        tokenizer=model.tokenizer,
        dtype=options.dtype,
        max_model_len=_max_length(model, options),
        batch_size="auto",
        disable_log_stats=False,
        hf_overrides=model.overrides(),
        **chosen,
    )


def _hf_model(model: Model, options: EngineOptions) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    from vllm_loopus.evaluation.hf_engine import TransformersModel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = AutoModelForCausalLM.from_pretrained(model.folder, dtype=options.dtype)
    engine = TransformersModel(
        pretrained=loaded.eval().to(device),
        tokenizer=model.tokenizer,
        batch_size=options.batch_size,
        max_length=_max_length(model, options) - RESERVED,
    )
    engine.overrides = model.overrides()
    return engine


def _max_length(model: Model, options: EngineOptions) -> int:
    return min(options.max_length or model.max_length, model.max_length)
