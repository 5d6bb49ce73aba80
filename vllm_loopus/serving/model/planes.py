"""Where the K/V and states of each recursion depth live in vLLM's paged memory.

A *plane* is what one position needs at one depth: the K/V of reasoning and decoder layers, and the
state `h^r`. Every plane is a KV cache group of vLLM with its own block table, so planes can have
different numbers of blocks. In vLLM all groups share the same tensors and take block ids from one
pool. Layers have the same index in every group, so layer `l` is the same tensor at every depth, and
the depth of a row is determined by its block table and slot mapping. Therefore one `Attention` per
layer serves all depths, and rows at different depths can share a pass.

The plane of depth 1, which every position has, also holds the K/V of the encoder and, for a model
that injects it in every pass, the constant input.

Layers with a sliding window store all their K/V like the others; the window is only a mask. All
planes must have the same layout, and a deeper token may need any position again. A quantised cache
(`--kv-cache-dtype`) holds the K/V of all planes; states keep the model's dtype, in as many rows as
they need.

With `kv_planes` `last:m` there are planes up to depth m: passes deeper than that read the plane of
depth m and write nothing. Their states only matter while their position is in flight, and are kept
elsewhere (`worker/flight_states.py`).
"""

from collections.abc import Iterator
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

from vllm_loopus.serving.knobs.engine import EngineOptions
from vllm_loopus.serving.model.cpu_kernels import round_fp8
from vllm_loopus.serving.model.deferred_writes import DeferredWrites
from vllm_loopus.serving.model.kv_dtype import floats_in
from vllm_loopus.serving.model.kv_layout import KVLayout


def layer_name_at(layer_name: str, depth: int) -> str:
    """The KV cache name of a layer at a depth; `layer_name` is its name at depth 1."""
    return layer_name if depth == 1 else f"{layer_name}.depth{depth}"


def depth_of(layer_name: str) -> int:
    """The recursion depth that a KV cache name belongs to."""
    suffix = layer_name.rpartition(".")[2]
    return int(suffix.removeprefix("depth")) if suffix.startswith("depth") else 1


def group_by_depth(kv_cache_spec: dict[str, KVCacheSpec]) -> list[KVCacheGroupSpec]:
    """One KV cache group for each depth, with layers in the order in which `Planes` reserved
    them."""
    by_depth: dict[int, list[str]] = {}
    for name in kv_cache_spec:
        by_depth.setdefault(depth_of(name), []).append(name)
    return create_kv_cache_group_specs(kv_cache_spec, [by_depth[d] for d in sorted(by_depth)])


class PagedRows(AttentionLayerBase):
    """Rows in the paged cache of the size and layout of `like`'s K/V, without any computation.

    Reserves the K/V of a layer at a depth from 2 on, or a piece of the states of one depth.
    `kv_cache` is bound by vLLM: [num_blocks, kv_heads, block_size, 2 * head_size].
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


def with_extra_slots(kind: type[Any], planes: "Planes") -> type[Any]:
    """A subclass of an attention backend's implementation: the K/V of a row may go to more than one
    slot, and more slots may be known later."""

    class ExtraSlots(kind):
        def do_kv_cache_update(
            self, layer: Any, key: torch.Tensor, value: torch.Tensor, *rest: Any
        ) -> None:
            update = super().do_kv_cache_update
            if planes.deferred is not None:
                planes.deferred.add(update, layer, key, value, rest[0])
            if (rows := planes.slot_rows) is not None:
                key, value = key.index_select(0, rows), value.index_select(0, rows)
            update(layer, key, value, *rest)

    return ExtraSlots


class Planes:
    """The planes of one model: reserves them, and selects one for a pass."""

    def __init__(
        self,
        encoder: nn.Module,
        reasoning: nn.Module,
        decoder: nn.Module,
        vllm_config: VllmConfig,
        state_size: int,
        injected_size: int = 0,
        decodes_in_passes: bool = False,
    ) -> None:
        """
        - `encoder`, `reasoning`, `decoder`: what runs before, in and after the loop, built; encoder
          and decoder may have no attention layer.
        - `state_size`: numbers in a state. `injected_size`: numbers in the constant input of a
          position, 0 for a model without one. Both have the model's dtype, the default one here.
        - `decodes_in_passes`: a pass also runs the decoder's attention layers.
        """
        self.slot_rows: torch.Tensor | None = None
        self.deferred: DeferredWrites | None = None
        self._context = vllm_config.compilation_config.static_forward_context
        looped, decoding = attention_layers(reasoning), attention_layers(decoder)
        like = looped[0]
        for layer in [*attention_layers(encoder), *looped, *decoding]:
            # Only `get_kv_cache_spec` reads it; the mask is the implementation's own.
            layer.sliding_window = None
            round_fp8(layer)
        self.encoder_names = [layer.layer_name for layer in attention_layers(encoder)]
        self.reasoning_names = [layer.layer_name for layer in looped]
        self.decoder_names = [layer.layer_name for layer in decoding]
        self.layer_names = self.reasoning_names + self.decoder_names
        self.decodes_in_passes = decodes_in_passes
        self.pass_names = self.layer_names if decodes_in_passes else self.reasoning_names
        self.state_size, self.injected_size = state_size, injected_size
        self.kv_dtype = like.kv_cache_dtype
        self.state_dtype = torch.get_default_dtype()
        number = self.state_dtype.itemsize
        options = EngineOptions.of(vllm_config.additional_config)
        self.layout = KVLayout.of(
            max_loops=vllm_config.model_config.hf_config.max_loops,
            encoder=len(self.encoder_names),
            reasoning=len(looped),
            decoder=len(decoding),
            kv_bytes=kv_bytes_per_token(like, vllm_config),
            state_bytes=state_size * number,
            injected_bytes=injected_size * number,
            planes=options.last_plane(vllm_config.model_config.hf_config.max_loops),
        )
        self.state_names = [f"state.{piece}" for piece in range(self.layout.state_rows)]
        for depth in range(1, self.layout.planes + 1):
            for layer in [*looped, *decoding] if depth > 1 else []:
                PagedRows(layer_name_at(layer.layer_name, depth), layer, vllm_config)
            for name in self.state_names:
                PagedRows(layer_name_at(name, depth), like, vllm_config)
        # What only depth 1 has is last in its group, so that the groups of deeper depths have all
        # their layers at the same indices.
        for name in self.encoder_names:
            self._context[name] = self._context.pop(name)
        self.injected_names = [f"injected.{piece}" for piece in range(self.layout.injected_rows)]
        for name in self.injected_names:
            PagedRows(name, like, vllm_config)

    def state_pages(self) -> list[torch.Tensor]:
        """The pages that hold the states, once vLLM has bound the K/V memory."""
        return [self._context[name].kv_cache for name in self.state_names]

    def injected_pages(self) -> list[torch.Tensor]:
        """The pages that hold the constant input of each position, at depth 1."""
        return [self._context[name].kv_cache for name in self.injected_names]

    def floats(self) -> list[torch.Tensor]:
        """The floating-point numbers in the memory of all planes, [num_blocks, ...] each, once
        vLLM has bound it."""
        found = [page.view(self.state_dtype) for page in self.state_pages() + self.injected_pages()]
        for name in self.encoder_names + self.layer_names:
            found += floats_in(self._context[name].kv_cache, self.kv_dtype)
        return found

    def allow_extra_slots(self) -> None:
        """Lets the K/V of a row go to more than one slot (policy `last_exited`): `slot_rows` names
        the row of each slot in the slot mapping, and writes can be deferred."""
        for name in self.layer_names:
            impl = self._context[name].impl
            impl.__class__ = with_extra_slots(type(impl), self)

    @contextmanager
    def deferring(self, rows: torch.Tensor | None) -> Iterator[DeferredWrites | None]:
        """Inside, the K/V of `rows` [M] is stored for slots that are known later; None for none."""
        self.deferred = None if rows is None else DeferredWrites(rows)
        try:
            yield self.deferred
        finally:
            self.deferred = None

    @contextmanager
    def at_depth(self, depth: int) -> Iterator[None]:
        """Inside, attention of the looped layers reads and writes the plane of `depth`, or the
        last one.

        Expects that the surrounding forward context holds metadata for every plane, as vLLM's
        runners build it for every KV cache group. A profiling run has none.
        """
        context, depth = get_forward_context(), min(depth, self.layout.planes)
        if depth == 1 or context.attn_metadata is None:
            yield
            return
        if not isinstance(context.attn_metadata, dict) or not isinstance(
            context.slot_mapping, dict
        ):
            raise NotImplementedError("looped models do not run with micro-batches (enable_dbo)")
        metadata, slots = dict(context.attn_metadata), dict(context.slot_mapping)
        for name in self.layer_names:
            source = layer_name_at(name, depth)
            metadata[name] = metadata[source]
            if source in slots:
                slots[name] = slots[source]
        with override_forward_context(replace(context, attn_metadata=metadata, slot_mapping=slots)):
            yield


def attention_layers(part: nn.Module) -> list[Attention]:
    """The attention layers of a part of a model, in order."""
    return [module for module in part.modules() if isinstance(module, Attention)]


def kv_bytes_per_token(layer: Attention, vllm_config: VllmConfig) -> int:
    """Bytes of K and V of one token in one layer, on this rank."""
    spec = layer.get_kv_cache_spec(vllm_config)
    assert spec is not None
    return spec.page_size_bytes // spec.block_size
