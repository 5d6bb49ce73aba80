"""The reference model with the K/V that a setting says: what a position sees, in plain tensors.

- `kv_dtype`: keys and values are rounded as they would be in K/V memory of this dtype. The numbers
  of `int8_per_token_head` are those of a scale for each token and head.
- `last`: passes deeper than that, and the decoder after them, read the keys and values of depth
  `last` at all positions, their own included (`kv_planes` `last:m`).
- `residual_bits`: from depth 2 on, keys and values are those of the depth before, as they are
  stored, plus a difference with so many bits a number, with a range for each token and head.

`tests/serving/test_kv_dtype.py` and `test_kv_planes.py` compare the engine with it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from vllm_loopus.modeling.layers import Positions
from vllm_loopus.modeling.model import LoopUSForCausalLM, LoopUSPass

NAME = "loopus_kv_reference"
FP8 = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
INT8 = "int8_per_token_head"


@dataclass(frozen=True)
class KVSetting:
    """What K/V memory holds; see the module."""

    kv_dtype: str = "auto"
    last: int | None = None
    residual_bits: int | None = None

    def __str__(self) -> str:
        planes = "all" if self.last is None else f"last:{self.last}"
        if self.residual_bits is not None:
            planes = f"residual, {self.residual_bits} bits"
        return planes if self.kv_dtype == "auto" else f"{planes}, {self.kv_dtype}"


def rounded(numbers: torch.Tensor, kv_dtype: str) -> torch.Tensor:
    """Numbers [..., head size] as they are read from K/V memory of this dtype, with a scale of 1
    for fp8. Raises `ValueError` for a dtype that it does not know."""
    if kv_dtype == "auto":
        return numbers
    if kv_dtype == INT8:
        scale = numbers.abs().amax(-1, keepdim=True).clamp(min=1e-6) / 127
        return (numbers / scale).round() * scale
    if kv_dtype not in FP8:
        raise ValueError(
            f"kv_dtype={kv_dtype!r} is unknown; choose auto, {INT8} or {', '.join(FP8)}"
        )
    most = torch.finfo(FP8[kv_dtype]).max
    return numbers.clamp(-most, most).to(FP8[kv_dtype]).to(numbers.dtype)


def coarse(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Numbers [..., head size] with `2 ** bits` steps from the least to the greatest of a row."""
    least, most = numbers.amin(-1, keepdim=True), numbers.amax(-1, keepdim=True)
    step = ((most - least) / (2**bits - 1)).clamp(min=1e-9)
    return ((numbers - least) / step).round() * step + least


class Memory:
    """The keys and values of each layer, where they are read again."""

    def __init__(self, setting: KVSetting) -> None:
        self.setting = setting
        self.depth = 0
        self.rereads = False  # nothing is written
        self._of: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}

    def begin(self) -> None:
        """Of another sequence."""
        self.depth, self.rereads = 0, False
        self._of.clear()

    def of(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What a layer attends to that has computed `key` and `value`."""
        if not self.rereads:
            bits, before = self.setting.residual_bits, self._of.get(layer)
            if bits is not None and before is not None:
                key = before[0] + coarse(key - before[0], bits)
                value = before[1] + coarse(value - before[1], bits)
            dtype = self.setting.kv_dtype
            self._of[layer] = rounded(key, dtype), rounded(value, dtype)
        return self._of[layer]


_memories: dict[Any, Memory] = {}  # by attention layer


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of one whole sequence, over what the memory of the layer holds."""
    key, value = _memories[module].of(module, key, value)
    out = scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2), None


AttentionInterface.register(NAME, _attend)


class KVReference(LoopUSForCausalLM):
    """The reference model of one sequence with other K/V; see the module."""

    memory: Memory

    @classmethod
    def of(cls, checkpoint: Any, setting: KVSetting, **config: Any) -> "KVReference":
        """`config`: values for the checkpoint's config."""
        model: KVReference = cls.from_pretrained(checkpoint, dtype=torch.float32).eval()
        for name, value in config.items():
            setattr(model.config, name, value)
        model.config.base._attn_implementation = NAME
        model.use(setting)
        return model

    def use(self, setting: KVSetting) -> None:
        """From now on with this K/V."""
        self.memory = Memory(setting)
        for name, layer in self.named_modules():
            if name.endswith(".self_attn"):
                _memories[layer] = self.memory

    @property
    def last(self) -> int:
        """The deepest depth with K/V of its own."""
        return self.memory.setting.last or self.config.max_loops

    def loop(self, embedded: torch.Tensor, positions: Positions) -> Iterator[LoopUSPass]:
        self.memory.begin()
        for loop_pass in super().loop(embedded, positions):
            self.memory.depth = loop_pass.depth
            if loop_pass.depth == self.last:
                self._at_last = loop_pass.state
            yield loop_pass
            self.memory.rereads = loop_pass.depth >= self.last

    def decode_hidden(self, state: torch.Tensor, positions: Positions) -> torch.Tensor:
        """As in the reference model, at the depth of the last pass."""
        self.memory.rereads = False
        if self.memory.depth > self.last:
            super().decode_hidden(self._at_last, positions)
            self.memory.rereads = True
        return super().decode_hidden(state, positions)

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
