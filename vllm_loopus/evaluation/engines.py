"""lm-evaluation-harness's own model types on LoopUS models: `vllm`, and `hf` for the reference.

A log-likelihood task gives context and continuation; the whole text is one sequence, and all its
positions stand at the depth at which its *last* token leaves, as in the released code's uncached
forward. In vLLM that is what a prompt with `prompt_logprobs` gets. lm-eval's `hf` type cuts the
last token off and pads without a mask, which changes nothing at a fixed depth but decides early
exit by other tokens: `TransformersModel` scores the whole text instead.
"""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from vllm_loopus.evaluation.models import Model, Setting

VLLM, TRANSFORMERS = "vllm", "hf"
ENGINES = (VLLM, TRANSFORMERS)
# vLLM keeps a token of the sequence for the one it generates, lm-eval another in rolling windows.
RESERVED = 2


@dataclass(frozen=True)
class EngineOptions:
    """What all models of a run share. `max_length`: tokens of a text at most, None: the model's.
    `batch_size`: of `hf`; vLLM makes its own batches."""

    engine: str = VLLM
    dtype: str = "auto"
    max_length: int | None = None
    batch_size: int = 16


@dataclass(frozen=True)
class Work:
    """What an engine has done so far, from its metrics.

    - `positions`: tokens that entered the loop; `rows`: positions times passes.
    - `exits`: tokens decoded, a scored text counting once; `depths`: the sum of their exit depths.
    """

    positions: float = 0
    rows: float = 0
    exits: float = 0
    depths: float = 0

    def __sub__(self, before: "Work") -> "Work":
        return Work(
            *(getattr(self, name) - getattr(before, name) for name in self.__dataclass_fields__)
        )

    @property
    def passes_per_token(self) -> float | None:
        """Passes of the reasoning block that a token took, catching up included."""
        return self.rows / self.positions if self.positions else None

    @property
    def mean_exit_depth(self) -> float | None:
        """A scored text counts once: it has one depth."""
        return self.depths / self.exits if self.exits else None


class TransformersModel(HFLM):
    """lm-eval's `hf` on the reference model: a text's depth is that of its last token."""

    overrides: dict[str, Any]  # of the model's config

    def apply(self, setting: Setting) -> None:
        """What follows is asked at this depth."""
        self.model.config.update(self.overrides | setting.knobs())

    def work(self) -> Work:
        """Nothing is counted here."""
        return Work()

    def close(self) -> None:
        """Nothing runs beside it."""

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """For each (key, context, continuation): log-likelihood, and whether it is the greedy one.

        Texts above `max_length + 1` tokens lose their beginning, as in lm-eval.
        """
        scores: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        size = override_bs or int(self.batch_size)
        order = sorted(
            range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2])
        )
        starts = range(0, len(order), size)
        for start in tqdm(starts, desc="Scoring texts", disable=disable_tqdm):
            chosen = order[start : start + size]
            rows = [[*requests[i][1], *requests[i][2]][-(self.max_length + 1) :] for i in chosen]
            for index, row, logits in zip(chosen, rows, self._logits(rows), strict=True):
                length = min(len(requests[index][2]), len(row) - 1)
                predicted = logits[len(row) - 1 - length : len(row) - 1].float().log_softmax(-1)
                wanted = torch.tensor(row[-length:], device=predicted.device)
                found = predicted.gather(-1, wanted[:, None]).sum().item()
                scores[index] = found, bool((predicted.argmax(-1) == wanted).all())
                key = requests[index][0]
                if key is not None:  # rolling windows have none
                    self.cache_hook.add_partial("loglikelihood", key, scores[index])
        return scores

    @torch.inference_mode()
    def _logits(self, rows: Sequence[list[int]]) -> torch.Tensor:
        """Logits [B, T, V] of token ids, padded on the right."""
        ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        mask = pad_sequence(
            [torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True
        )
        device = self.device
        return self.model(ids.to(device), attention_mask=mask.to(device)).logits


@contextmanager
def running_engine(model: Model, options: EngineOptions) -> Iterator[Any]:
    """An lm-eval model with `apply(setting)`, `work()` and `close()`, closed at the end."""
    started = _vllm_model(model, options) if options.engine == VLLM else _hf_model(model, options)
    try:
        yield started
    finally:
        started.close()
        del started
        gc.collect()


def _vllm_model(model: Model, options: EngineOptions) -> Any:
    # Imported where it is used: importing vLLM takes seconds, and `hf` does without.
    from vllm_loopus.evaluation.vllm_engine import VLLMModel, plain_memory

    memory = {} if model.is_looped else plain_memory()
    return VLLMModel(
        pretrained=str(model.folder),
        tokenizer=model.tokenizer,
        dtype=options.dtype,
        max_model_len=_max_length(model, options),
        batch_size="auto",
        disable_log_stats=False,
        hf_overrides=model.overrides(),
        **memory,
    )


def _hf_model(model: Model, options: EngineOptions) -> TransformersModel:
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
