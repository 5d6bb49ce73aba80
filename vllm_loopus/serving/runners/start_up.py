"""The start-up summary in the log: the model, its K/V memory and the options of an engine."""

from typing import Any

from vllm.utils.math_utils import cdiv

from vllm_loopus.architectures import record_of
from vllm_loopus.serving.knobs.engine import ALL_PLANES, AUTO, LAST, ZEROS, EngineOptions
from vllm_loopus.serving.model.facts import ModelFacts, told_depths
from vllm_loopus.serving.model.kv_layout import KVLayout, sequences_that_fit
from vllm_loopus.serving.runners.selection import runner_in_use

# What vLLM would do and we do not, and why. Options that are refused: docs/serving.md.
NO_ASYNC_SCHEDULING = "which sequences get a token is only known after a step"
NO_GRAPHS = "cudagraph_mode FULL captures the loop's regions, unverified: docs/gpu.md"


def start_up_summary(vllm_config: Any, layout: KVLayout, kv_cache_config: Any) -> str:
    """What a worker logs once its K/V memory is there."""
    model = vllm_config.model_config
    options = EngineOptions.of(vllm_config.additional_config)
    block_size = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
    pool = kv_cache_config.num_blocks, block_size, model.max_model_len
    fit = [f"{sequences_that_fit(*pool, d):.1f} at {d}" for d in told_depths(layout.planes)]
    items = ", ".join(f"{name} {size / 1024:.2f}" for name, size in layout.items().items())
    facts = ModelFacts.of(model.hf_config, layout)
    policy = (
        f"{options.kv_policy}, prefill {options.prefill_depth}, exit quorum {options.exit_quorum}"
    )
    rows = [
        ("model", f"{_served_as(model)} ({facts.kind}, {model.dtype})"),
        *facts.rows(),
        (f"  of them at {layout.max_loops}", f"{items} (KiB, on one rank)"),
        ("first state", _first_state(vllm_config, options)),
        ("K/V policy", policy),
        ("K/V planes", "" if options.kv_planes == ALL_PLANES else options.kv_planes),
        ("K/V dtype", _kv_dtype(vllm_config.cache_config.cache_dtype)),
        ("guesses", _guesses(options)),
        ("K/V memory", f"{kv_cache_config.num_blocks} blocks of {block_size} tokens at one depth"),
        ("  fit", f"{', '.join(fit)} (sequences of {model.max_model_len} tokens, by depth)"),
        ("runner", runner_in_use(vllm_config.use_v2_model_runner)),
        ("effort", _efforts(options.reasoning_effort)),
        ("switched off", "; ".join(f"{what} ({why})" for what, why in switched_off(vllm_config))),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"  {name:<{width}}  {text}" for name, text in rows if text]
    return "\n".join([f"{facts.family} model:", *lines])


def carry_bytes(vllm_config: Any) -> int:
    """What the exit rule keeps on the device for as many sequences as may run."""
    config = vllm_config.model_config.hf_config
    numbers = len(record_of(config).exit_rule.from_config(config).first_carry)
    slots = EngineOptions.of(vllm_config.additional_config).positions_in_flight
    return 4 * numbers * slots * int(vllm_config.scheduler_config.max_num_seqs)


def check_depth_fits(vllm_config: Any, layout: KVLayout, available: int) -> None:
    """Raises `ValueError` if K/V memory of `available` bytes holds no sequence of the greatest
    length at full depth. vLLM's own check does not know that fewer loops would do."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    fits_itself = getattr(model, "original_max_model_len", None) == -1  # vLLM lowers it
    if cache.num_gpu_blocks_override is not None or fits_itself:
        return
    blocks = cdiv(model.max_model_len, cache.block_size)
    one = blocks * cache.block_size * layout.block_bytes_per_token
    deepest = available // one
    if layout.planes <= deepest or available <= 0:
        return
    tokens = available // layout.allocated(layout.max_loops) // cache.block_size * cache.block_size
    lower = f"max_loops to {deepest} or less (--hf-overrides '{{\"max_loops\": {deepest}}}')"
    if layout.planes < layout.max_loops:
        lower = f"kv_planes to '{LAST}{deepest}' or less"
    fixes = [
        f"lower {lower}" if deepest else "",
        f"lower max_model_len to {tokens} or less" if tokens else "",
        "give K/V more memory",
    ]
    raise ValueError(
        f"max_loops={layout.max_loops} does not fit: a sequence of max_model_len="
        f"{model.max_model_len} takes {layout.planes * one / 2**30:.2f} GiB of K/V at that "
        f"depth, and there are {available / 2**30:.2f} GiB; {', or '.join(filter(None, fixes))}"
    )


def switched_off(vllm_config: Any) -> list[tuple[str, str]]:
    """Features of vLLM that are off because the model is looped, and why."""
    off = [("asynchronous scheduling", NO_ASYNC_SCHEDULING)]
    if not vllm_config.compilation_config.cudagraph_mode:
        off.append(("CUDA graphs", NO_GRAPHS))
    return off


def _served_as(model: Any) -> str:
    name = model.served_model_name
    return model.model if name == model.model else f"{name}, {model.model}"


def _kv_dtype(name: str) -> str:
    return "" if name == AUTO else f"{name}; states keep the model's"


def _first_state(vllm_config: Any, options: EngineOptions) -> str:
    """Empty for a model whose first state is computed."""
    model = vllm_config.model_config
    if record_of(model.hf_config).first_state is None:
        return ""
    if options.draws_noise:
        return f"noise, by the request's seed ({model.seed} without one) and the position"
    if options.initial_state == ZEROS:
        return ZEROS
    return f"of {model.max_model_len} positions, from {options.initial_state}"


def _guesses(options: EngineOptions) -> str:
    if not options.speculates:
        return ""
    where = AUTO if options.speculate == AUTO else f"after {options.draft_depth} passes"
    return f"{where}, up to {options.lookahead} positions of a sequence ahead"


def _efforts(mapping: Any) -> str:
    return ", ".join(f"{effort}: {loops} loops" for effort, loops in mapping.items())
