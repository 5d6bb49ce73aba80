"""Where K/V and states of each recursion depth live in vLLM's paged memory.

A *plane* is what one position needs at one depth: K/V of the reasoning and decoder layers and the
state `h^r`. Every plane is a KV cache group of vLLM with a block table of its own, so planes can
hold different numbers of blocks. vLLM lays all groups over the same tensors and draws block ids
from one pool; layers stand at the same index in every group, so layer `l` is the same tensor at
every depth, and a row's depth is nothing but the block table and slot mapping it is given. One
`Attention` a layer therefore serves all depths, and rows at different depths can share a pass.

The encoder rides in the plane of depth 1, which every position has.

Layers that attend inside a window keep their K/V as the others do: the window is a mask alone.
Planes must look alike, and a deeper token may ask for any position again.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context, override_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.core.kv_cache_utils import create_kv_cache_group_specs
from vllm.v1.kv_cache_interface import KVCacheGroupSpec, KVCacheSpec

from vllm_loopus.serving.kv_layout import KVLayout


def layer_name_at(layer_name: str, depth: int) -> str:
    """The KV cache name of a layer at a depth; `layer_name` is its name at depth 1."""
    return layer_name if depth == 1 else f"{layer_name}.depth{depth}"


def depth_of(layer_name: str) -> int:
    """The recursion depth that a KV cache name belongs to."""
    suffix = layer_name.rpartition(".")[2]
    return int(suffix.removeprefix("depth")) if suffix.startswith("depth") else 1


def group_by_depth(kv_cache_spec: dict[str, KVCacheSpec]) -> list[KVCacheGroupSpec]:
    """One KV cache group a depth, layers in the order that `Planes` reserved them in."""
    by_depth: dict[int, list[str]] = {}
    for name in kv_cache_spec:
        by_depth.setdefault(depth_of(name), []).append(name)
    return create_kv_cache_group_specs(kv_cache_spec, [by_depth[d] for d in sorted(by_depth)])


class PagedRows(AttentionLayerBase):
    """Rows in the paged cache of the size and layout of `like`'s K/V, without any computation.

    Reserves K/V of a layer at a depth above 1, or a piece of the states of one depth. `kv_cache`
    is bound by vLLM: [num_blocks, kv_heads, block_size, 2 * head_size].
    """

    def __init__(self, name: str, like: Attention, vllm_config: VllmConfig) -> None:
        self.layer_name = name
        self.num_heads = like.num_heads  # same attention group as `like`: no second builder
        self.impl = like.impl
        self._like = like
        context = vllm_config.compilation_config.static_forward_context
        if name in context:
            raise ValueError(f"duplicate KV cache layer {name}")
        context[name] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        return self._like.get_attn_backend()

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        spec = self._like.get_kv_cache_spec(vllm_config)
        # Proposed to vLLM (`patches/kv-cache-groups-by-name.diff`); without it, `group_by_depth`.
        if (depth := depth_of(self.layer_name)) > 1 and hasattr(spec, "group_name"):
            spec = replace(spec, group_name=f"depth {depth}")
        return spec


class KeptRows:
    """K/V of some rows of a pass, layer by layer: memory for as many as there are sequences, or, to
    spare the copies, for all rows where that is at most `AT_ONCE` times as many."""

    AT_ONCE = 2

    def __init__(self, rows: torch.Tensor) -> None:
        """`rows` [M]: in order."""
        self._rows = rows
        self._all = False
        self._layers: list[tuple[Any, ...]] = []

    def add(
        self, update: Any, layer: Any, key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor
    ) -> None:
        """What a layer is about to write to its `cache`, by the backend's `update`."""
        self._all = len(key) <= self.AT_ONCE * len(self._rows)
        if not self._all:
            key, value = key.index_select(0, self._rows), value.index_select(0, self._rows)
        self._layers.append((update, layer, key, value, cache))

    def write(self, rows: torch.Tensor, slots: torch.Tensor) -> None:
        """K/V of `rows` [K], some of those to be kept, to `slots` [K] of every layer."""
        if not self._all:
            rows = torch.searchsorted(self._rows, rows)
        for update, layer, key, value, cache in self._layers:
            update(layer, key.index_select(0, rows), value.index_select(0, rows), cache, slots)


class Planes:
    """The planes of one model: reserves them, and selects one for a pass."""

    def __init__(
        self,
        encoder: nn.Module,
        reasoning: nn.Module,
        decoder: nn.Module,
        state_bytes: int,
        vllm_config: VllmConfig,
    ) -> None:
        """The three blocks, built; `state_bytes` is a state's size."""
        self.slot_rows: torch.Tensor | None = None
        self._kept: KeptRows | None = None
        self._context = vllm_config.compilation_config.static_forward_context
        layers = attention_layers(reasoning) + attention_layers(decoder)
        like = layers[0]
        for layer in attention_layers(encoder) + layers:
            # Read by `get_kv_cache_spec` alone; the mask is the implementation's own.
            layer.sliding_window = None
        self.encoder_names = [layer.layer_name for layer in attention_layers(encoder)]
        self.reasoning_names = [layer.layer_name for layer in attention_layers(reasoning)]
        self.decoder_names = [layer.layer_name for layer in attention_layers(decoder)]
        self.layer_names = self.reasoning_names + self.decoder_names
        self.layout = KVLayout.of(
            vllm_config.model_config.hf_config, kv_bytes_per_token(like, vllm_config), state_bytes
        )
        self.state_names = [f"state.{piece}" for piece in range(self.layout.state_rows)]
        for depth in range(1, self.layout.max_loops + 1):
            for layer in layers if depth > 1 else []:
                PagedRows(layer_name_at(layer.layer_name, depth), layer, vllm_config)
            for name in self.state_names:
                PagedRows(layer_name_at(name, depth), like, vllm_config)
        # Last in its group, so that the planes of deeper depths, which have no encoder, hold all
        # their layers at the same indices.
        for name in self.encoder_names:
            self._context[name] = self._context.pop(name)

    def state_pages(self) -> list[torch.Tensor]:
        """The pages that hold the states, once vLLM has bound the K/V memory."""
        return [self._context[name].kv_cache for name in self.state_names]

    def caches(self) -> list[torch.Tensor]:
        """The memory of all planes, [num_blocks, ...] each, once vLLM has bound it."""
        names = self.encoder_names + self.layer_names + self.state_names
        return [self._context[name].kv_cache for name in names]

    def write_through(self) -> None:
        """Lets K/V of a row go to more slots than one (policy `last_exited`): `slot_rows` names
        the row of each slot in the slot mapping."""
        for name in self.layer_names:
            self._context[name].impl.do_kv_cache_update = self._repeating(self._context[name].impl)

    def _repeating(self, impl: Any) -> Callable[..., None]:
        update = impl.do_kv_cache_update

        def do_kv_cache_update(
            layer: Any, key: torch.Tensor, value: torch.Tensor, *rest: Any
        ) -> None:
            if self._kept is not None:
                self._kept.add(update, layer, key, value, rest[0])
            if (rows := self.slot_rows) is not None:
                key, value = key.index_select(0, rows), value.index_select(0, rows)
            update(layer, key, value, *rest)

        return do_kv_cache_update

    @contextmanager
    def keeping(self, rows: torch.Tensor | None) -> Iterator["KeptRows | None"]:
        """Inside, K/V of `rows` [M] is kept for slots that are known later; None for none."""
        self._kept = None if rows is None else KeptRows(rows)
        try:
            yield self._kept
        finally:
            self._kept = None

    @contextmanager
    def at_depth(self, depth: int) -> Iterator[None]:
        """Inside, attention of the looped layers reads and writes the plane of `depth`.

        Expects that the surrounding forward context holds metadata for every plane, as vLLM's
        runners build it for every KV cache group. A profiling run has none.
        """
        context = get_forward_context()
        if depth == 1 or context.attn_metadata is None:
            yield
            return
        if not isinstance(context.attn_metadata, dict) or not isinstance(
            context.slot_mapping, dict
        ):
            raise NotImplementedError("LoopUS models do not run with micro-batches (enable_dbo)")
        metadata, slots = dict(context.attn_metadata), dict(context.slot_mapping)
        for name in self.layer_names:
            source = layer_name_at(name, depth)
            metadata[name] = metadata[source]
            if source in slots:
                slots[name] = slots[source]
        with override_forward_context(replace(context, attn_metadata=metadata, slot_mapping=slots)):
            yield


def attention_layers(block: nn.Module) -> list[Attention]:
    """The attention layers of a block, in order."""
    return [module for module in block.modules() if isinstance(module, Attention)]


def kv_bytes_per_token(layer: Attention, vllm_config: VllmConfig) -> int:
    """Bytes of K and V of one token in one layer, on this rank."""
    spec = layer.get_kv_cache_spec(vllm_config)
    assert spec is not None
    return spec.page_size_bytes // spec.block_size
