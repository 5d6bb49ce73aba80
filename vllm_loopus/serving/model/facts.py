"""Properties of a looped checkpoint from its config, for `vllm-loopus info` and the start log."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm_loopus.architectures import record_of
from vllm_loopus.serving.knobs.engine import EngineOptions
from vllm_loopus.serving.model.kv_dtype import AUTO, kv_bytes
from vllm_loopus.serving.model.kv_layout import KVLayout
from vllm_loopus.serving.model.padded_heads import stored_head_size


@dataclass(frozen=True)
class ModelFacts:
    """The properties of a looped checkpoint, as text and numbers."""

    family: str
    kind: str  # family, and the type of the base if it is made from one
    size: str  # layers and width
    encoder: str
    reasoning: str
    decoder: str
    max_loops: int
    min_loops: int
    exit_rule: str
    kv_bytes_a_token: dict[int, int]  # by depth, on one rank

    @classmethod
    def of(cls, config: Any, layout: KVLayout) -> "ModelFacts":
        """`config`: of a looped model."""
        architecture = record_of(config)
        layers, text = architecture.layers(config), config.get_text_config()
        named = architecture.variant
        kind = architecture.family + ("" if named is None else f", {named(config)}")
        return cls(
            family=architecture.family,
            kind=kind + ("" if text is config else f" on {text.model_type}"),
            size=f"{text.model_type}, {text.num_hidden_layers} layers of {text.hidden_size}",
            encoder=told_layers(layers.encoder),
            reasoning=told_layers(layers.reasoning),
            decoder=told_layers(layers.decoder),
            max_loops=config.max_loops,
            min_loops=config.min_loops,
            exit_rule=str(architecture.exit_rule.from_config(config)),
            kv_bytes_a_token={d: layout.allocated(d) for d in range(1, config.max_loops + 1)},
        )

    def rows(self) -> list[tuple[str, str]]:
        """The lines to print: names and texts."""
        layers = f"encoder {self.encoder}, reasoning {self.reasoning}, decoder {self.decoder}"
        depths = told_depths(self.max_loops)
        sizes = [f"{self.kv_bytes_a_token[d] / 1024:.2f} KiB at {d}" for d in depths]
        return [
            ("layers", layers),
            ("loops", f"{self.min_loops} to {self.max_loops}"),
            ("exit rule", self.exit_rule),
            ("K/V per token", ", ".join(sizes)),
        ]


def layout_of(
    config: Any,
    dtype_bytes: int,
    tensor_parallel: int = 1,
    kv_dtype: str = AUTO,
    options: EngineOptions | None = None,
) -> KVLayout:
    """The K/V layout of a checkpoint that is not loaded, on one rank.

    `dtype_bytes`: of a number of the model. `kv_dtype`: as in `--kv-cache-dtype`. A constant input
    of the loop is taken to have the size of a state.
    """
    options = options or EngineOptions()
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    head_size = stored_head_size(head_size)
    state = text.hidden_size * dtype_bytes
    layers = record_of(config).layers(config)
    return KVLayout.of(
        max_loops=config.max_loops,
        encoder=len(layers.encoder),
        reasoning=len(layers.reasoning),
        decoder=len(layers.decoder),
        kv_bytes=kv_bytes(max(heads // tensor_parallel, 1), head_size, kv_dtype, dtype_bytes),
        state_bytes=state,
        injected_bytes=state if layers.injects else 0,
        planes=options.last_plane(config.max_loops),
    )


def layout_of_engine(vllm_config: Any) -> KVLayout:
    """The K/V layout of a rank of an engine, as its workers lay it out."""
    model = vllm_config.model_config
    ranks = vllm_config.parallel_config.tensor_parallel_size
    kv_dtype = vllm_config.cache_config.cache_dtype
    options = EngineOptions.of(vllm_config.additional_config)
    return layout_of(model.hf_config, model.dtype.itemsize, ranks, kv_dtype, options)


def told_depths(max_loops: int) -> list[int]:
    """The depths to show figures of: all, or of many the powers of two and the last."""
    every = range(1, max_loops + 1)
    if max_loops <= 8:
        return list(every)
    return [depth for depth in every if depth & (depth - 1) == 0 or depth == max_loops]


def told_layers(indices: Sequence[int]) -> str:
    """A range of layers as text."""
    if not indices:
        return "no layer"
    first, last = indices[0], indices[-1]
    return f"layer {first}" if first == last else f"layers {first}-{last} ({len(indices)})"
