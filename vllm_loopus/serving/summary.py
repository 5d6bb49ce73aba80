"""What somebody who starts a LoopUS model wants to know, as data and as one block of the log.

`vllm-loopus info` prints the first part, for a checkpoint that nothing runs.
"""

from dataclasses import dataclass
from typing import Any

from vllm_loopus.config import LoopUSConfig
from vllm_loopus.serving.kv_layout import KVLayout, sequences_that_fit

# What vLLM would do and a LoopUS model does not, and why. Refused options: docs/serving.md.
NO_ASYNC_SCHEDULING = "which sequences get a token is known after a step only"
NO_GRAPHS = "cudagraph_mode FULL captures the loop's regions, unverified: docs/gpu.md"


@dataclass(frozen=True)
class ModelFacts:
    """A LoopUS checkpoint, from its config."""

    base: str  # model type of the base
    encoder: str
    reasoning: str
    decoder: str
    max_loops: int
    min_loops: int
    halting: str
    kv_bytes_a_token: dict[int, int]  # by depth, on one rank

    @classmethod
    def of(cls, config: LoopUSConfig, layout: KVLayout) -> "ModelFacts":
        return cls(
            base=config.base.model_type,
            encoder=layers(config.encoder_layer_indices),
            reasoning=layers(config.reasoning_layer_indices),
            decoder=layers(config.decoder_layer_indices),
            max_loops=config.max_loops,
            min_loops=config.min_loops,
            halting=halting_rule(config),
            kv_bytes_a_token={d: layout.allocated(d) for d in range(1, config.max_loops + 1)},
        )

    def rows(self) -> list[tuple[str, str]]:
        """What to print, a name and a text each."""
        cut = f"encoder {self.encoder}, reasoning {self.reasoning}, decoder {self.decoder}"
        sizes = [f"{size / 1024:.2f} KiB at {d}" for d, size in self.kv_bytes_a_token.items()]
        return [
            ("cut", cut),
            ("loops", f"{self.min_loops} to {self.max_loops}"),
            ("halting", self.halting),
            ("K/V a token", ", ".join(sizes)),
        ]


def halting_rule(config: LoopUSConfig) -> str:
    """The halting rule in words."""
    if config.halting_strategy == "convergence":
        return f"convergence: when a loop moves the state by less than {config.convergence_epsilon}"
    every = "every loop" if config.exit_interval == 1 else f"every {config.exit_interval} loops"
    what = "confidence" if config.halting_strategy == "threshold" else "accumulated confidence"
    return f"{config.halting_strategy}: {what} above {config.exit_threshold}, looked at {every}"


def layout_of(config: LoopUSConfig, dtype_bytes: int, tensor_parallel: int = 1) -> KVLayout:
    """The K/V layout of a checkpoint that is not loaded; unquantised K/V, bytes on one rank."""
    base = config.base
    heads = getattr(base, "num_key_value_heads", None) or base.num_attention_heads
    head_size = getattr(base, "head_dim", None) or base.hidden_size // base.num_attention_heads
    kv_bytes = 2 * max(heads // tensor_parallel, 1) * head_size * dtype_bytes
    return KVLayout.of(config, kv_bytes, config.hidden_size * dtype_bytes)


def layout_of_engine(vllm_config: Any) -> KVLayout:
    """The K/V layout of a rank of an engine, as its workers lay it out."""
    model = vllm_config.model_config
    ranks = vllm_config.parallel_config.tensor_parallel_size
    return layout_of(model.hf_config, model.dtype.itemsize, ranks)


def start_up_summary(vllm_config: Any, layout: KVLayout, kv_cache_config: Any) -> str:
    """The block that a worker logs once its K/V memory is there."""
    from vllm_loopus.serving.knobs import EngineOptions
    from vllm_loopus.serving.runners.selection import runner_in_use

    model, config = vllm_config.model_config, vllm_config.model_config.hf_config
    options = EngineOptions.of(vllm_config.additional_config)
    block_size = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
    pool = kv_cache_config.num_blocks, block_size, model.max_model_len
    fit = [f"{sequences_that_fit(*pool, d):.1f} at {d}" for d in range(1, layout.max_loops + 1)]
    items = ", ".join(f"{name} {size / 1024:.2f}" for name, size in layout.items().items())
    rows = [
        ("model", f"{_served_as(model)} (LoopUS on {config.base.model_type}, {model.dtype})"),
        *ModelFacts.of(config, layout).rows(),
        (f"  of them at {layout.max_loops}", f"{items} (KiB, on one rank)"),
        (
            "K/V policy",
            f"{options.kv_policy}, prefill {options.prefill_depth}, "
            f"exit quorum {options.exit_quorum}",
        ),
        ("K/V memory", f"{kv_cache_config.num_blocks} blocks of {block_size} tokens at one depth"),
        ("  fit", f"{', '.join(fit)} (sequences of {model.max_model_len} tokens, by depth)"),
        ("runner", runner_in_use(vllm_config.use_v2_model_runner)),
        ("effort", _efforts(options.reasoning_effort)),
        ("switched off", "; ".join(f"{what} ({why})" for what, why in switched_off(vllm_config))),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {text}" for name, text in rows if text)


def switched_off(vllm_config: Any) -> list[tuple[str, str]]:
    """Features of vLLM that are off because the model is a LoopUS model, and why."""
    compilation = vllm_config.compilation_config
    off = [("asynchronous scheduling", NO_ASYNC_SCHEDULING)]
    if not compilation.cudagraph_mode:
        off.append(("CUDA graphs", NO_GRAPHS))
    return off


def _served_as(model: Any) -> str:
    name = model.served_model_name
    return model.model if name == model.model else f"{name}, {model.model}"


def _efforts(mapping: Any) -> str:
    return ", ".join(f"{effort}: {loops} loops" for effort, loops in mapping.items())


def layers(indices: Any) -> str:
    if not indices:
        return "no layer"
    first, last = indices[0], indices[-1]
    return f"layer {first}" if first == last else f"layers {first}-{last} ({len(indices)})"
