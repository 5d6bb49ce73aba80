"""The reference model with the K/V that a setting says: what a position sees, in plain tensors.

- `kv_dtype`: keys and values are rounded as they would be in the K/V memory.
- `last`: passes deeper than that, and the decoder after them, read the keys and values of depth
  `last` at all positions, their own included.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from vllm_loopus import LoopUSForCausalLM
from vllm_loopus.modeling.layers import Positions
from vllm_loopus.modeling.model import Pass

FP8 = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


def rounded(numbers: torch.Tensor, kv_dtype: str) -> torch.Tensor:
    """Numbers as they are read from K/V memory of this dtype, with a scale of 1."""
    if kv_dtype == "auto":
        return numbers
    most = torch.finfo(FP8[kv_dtype]).max
    return numbers.clamp(-most, most).to(FP8[kv_dtype]).to(numbers.dtype)


class Memory:
    """The keys and values of each layer, where they are read again."""

    def __init__(self, kv_dtype: str) -> None:
        self.kv_dtype = kv_dtype
        self.rereads = False
        self._of: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}

    def of(self, layer: Any, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What a layer attends to that has computed `key` and `value`."""
        if not self.rereads:
            self._of[layer] = rounded(key, self.kv_dtype), rounded(value, self.kv_dtype)
        return self._of[layer]


MEMORIES: dict[Any, Memory] = {}  # by layer


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of whole sequences, over what the memory of the layer holds."""
    key, value = MEMORIES[module].of(module, key, value)
    out = scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2), None


AttentionInterface.register("loopus_kv_reference", attend)


class KVReference(LoopUSForCausalLM):
    """The reference model of one sequence; see the module."""

    memory: Memory
    last: int

    @classmethod
    def of(
        cls, checkpoint: Any, kv_dtype: str = "auto", last: int | None = None, **config: Any
    ) -> Any:
        """`config`: values for the checkpoint's config."""
        model = cls.from_pretrained(checkpoint, dtype=torch.float32).eval()
        for name, value in config.items():
            setattr(model.config, name, value)
        model.config.base._attn_implementation = "loopus_kv_reference"
        model.memory = Memory(kv_dtype)
        model.last = model.config.max_loops if last is None else last
        for part in (model.encoder, model.reasoning, model.decoder):
            for layer in part.layers:
                MEMORIES[layer.self_attn] = model.memory
        return model

    def passes(self, state: torch.Tensor, positions: Positions) -> Iterator[Pass]:
        for loop_pass in super().passes(state, positions):
            if loop_pass.depth == self.last:
                self._at_last = loop_pass.state
                self.memory.rereads = True
            self._exit_depth = loop_pass.depth
            yield loop_pass

    def decode(self, state: torch.Tensor, positions: Positions, *args: Any) -> torch.Tensor:
        self.memory.rereads = False
        if self._exit_depth > self.last:
            super().decode(self._at_last, positions)
            self.memory.rereads = True
        logits = super().decode(state, positions, *args)
        self.memory.rereads = False
        return logits

    @torch.inference_mode()
    def continued(self, prompt: list[int], tokens: int) -> tuple[list[int], list[int], list[float]]:
        """The next `tokens` greedy tokens, their exit depths, and the gap between the best two
        logits of each."""
        ids, depths, gaps = list(prompt), [], []
        for _ in range(tokens):
            output = self(torch.tensor([ids]), logits_to_keep=1)
            best = output.logits[0, -1].topk(2)
            ids.append(int(best.indices[0]))
            gaps.append(float(best.values[0] - best.values[1]))
            depths.append(int(output.exit_depths[0]))
        return ids[len(prompt) :], depths, gaps
