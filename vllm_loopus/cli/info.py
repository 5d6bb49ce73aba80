"""`vllm-loopus info MODEL`: shows the layout of a checkpoint and the size of its K/V."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_loopus import aliases
from vllm_loopus.architectures import LoopedConfig, record_of
from vllm_loopus.cli.output import JsonOption, print_json, print_table, report_errors

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
BLOCK_SIZE = 128  # vLLM's default on a CPU; the smaller blocks on a GPU waste less
WEIGHTS = ("*.safetensors", "*.pt", "*.bin")


def known_models() -> list[str]:
    """All aliases, for shell completion."""
    try:
        return sorted(aliases.known_aliases())
    except aliases.AliasError:
        return []


ModelArgument = Annotated[
    str,
    typer.Argument(
        help="An alias, a checkpoint folder, or owner/name on the hub.",
        autocompletion=known_models,
    ),
]


@dataclass(frozen=True)
class KVEstimate:
    """The size of a model's K/V, and how many sequences fit in memory."""

    dtype: str
    kv_cache_dtype: str
    kv_planes: str
    tensor_parallel_size: int
    bytes_a_token: dict[int, int]  # by depth, on one rank
    memory_bytes: int  # on one rank
    max_model_len: int
    sequences: dict[int, float]  # sequences of max_model_len tokens that fit, by exit depth


def resolve(model: str) -> str:
    """The folder or repository that vLLM loads. Raises `AliasError` for an unknown alias."""
    if Path(model).exists():
        return model
    target = aliases.known_aliases().get(model, model)
    if target == model:
        aliases.explain_unknown_alias(model)
    return target


def load_config(model: str) -> LoopedConfig:
    """The config of a looped model. Raises `ValueError` if it cannot be read or is not one."""
    from transformers import AutoConfig

    target = resolve(model)
    if Path(target).is_file():
        hint = (
            "a GGUF file of a plain model; vllm-loopus recast makes a LoopUS model from it"
            if target.endswith(".gguf")
            else "a file; give a checkpoint folder"
        )
        raise ValueError(f"{target} is {hint}")
    if Path(target).is_dir() and not (Path(target) / "config.json").is_file():
        raise ValueError(f"{target} has no config.json; give a checkpoint folder")
    try:
        config = AutoConfig.from_pretrained(target)
    except OSError as error:
        raise ValueError(f"the config of {target} cannot be read: {error}") from error
    try:
        architecture = record_of(config)
    except ValueError as error:
        raise ValueError(f"{target} is {error}; vllm-loopus recast makes one from it") from error
    if architecture.settle is not None:
        architecture.settle(config, target, None)
    looped: LoopedConfig = config
    return looped


def estimate_kv(
    config: LoopedConfig,
    memory_gib: float | None = None,
    max_model_len: int | None = None,
    dtype: str | None = None,
    tensor_parallel_size: int = 1,
    kv_cache_dtype: str = "auto",
    kv_planes: str = "all",
) -> KVEstimate:
    """Estimates the K/V of a model.

    `memory_gib`: K/V memory of a rank; by default that of a CPU rank on this machine. Raises
    `ValueError` for an invalid dtype or length.
    """
    from vllm_loopus.serving.hooks.cpu_memory import CPU_CACHE_SHARE, free_cpu_memory
    from vllm_loopus.serving.knobs.engine import EngineOptions
    from vllm_loopus.serving.model.facts import layout_of
    from vllm_loopus.serving.model.kv_dtype import KV_DTYPES
    from vllm_loopus.serving.model.kv_layout import sequences_that_fit

    if kv_cache_dtype not in KV_DTYPES:
        known = ", ".join(KV_DTYPES)
        raise ValueError(f"kv_cache_dtype={kv_cache_dtype!r} is unknown; choose one of {known}")
    dtype = dtype or _dtype_of(config)
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"dtype={dtype!r} is unknown; choose one of {', '.join(DTYPE_BYTES)}")
    longest = int(config.get_text_config().max_position_embeddings)
    length = longest if max_model_len is None else max_model_len
    if not 1 <= length <= longest:
        raise ValueError(f"max_model_len={length} must be from 1 to {longest}, the model's maximum")
    options = EngineOptions.of({"loopus": {"kv_planes": kv_planes}})
    options.check(config)
    layout = layout_of(config, DTYPE_BYTES[dtype], tensor_parallel_size, kv_cache_dtype, options)
    if memory_gib is None:
        memory = int(CPU_CACHE_SHARE * free_cpu_memory()[0])
    else:
        memory = int(memory_gib * 2**30)
    blocks = memory // (layout.block_bytes_per_token * BLOCK_SIZE)
    depths = range(1, config.max_loops + 1)
    return KVEstimate(
        dtype=dtype,
        kv_cache_dtype=kv_cache_dtype,
        kv_planes=kv_planes,
        tensor_parallel_size=tensor_parallel_size,
        bytes_a_token={depth: layout.allocated(depth) for depth in depths},
        memory_bytes=memory,
        max_model_len=length,
        sequences={
            depth: round(
                sequences_that_fit(blocks, BLOCK_SIZE, length, min(depth, layout.planes)), 2
            )
            for depth in depths
        },
    )


def info(
    model: ModelArgument,
    memory: Annotated[
        float | None,
        typer.Option(min=0, help="K/V memory of a rank in GiB. Default: that of a CPU rank here."),
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="Maximum tokens of a sequence. Default: the model's.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32.")] = None,
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="Number of ranks.")] = 1,
    kv_cache_dtype: Annotated[
        str, typer.Option(help="As in vllm serve: auto, fp8, int8_per_token_head, ...")
    ] = "auto",
    kv_planes: Annotated[
        str, typer.Option(help="all, or last:m, as in additional_config.")
    ] = "all",
    as_json: JsonOption = False,
) -> None:
    """Show the cut, loops, exit rule and K/V size of a checkpoint."""
    with report_errors(ValueError):
        config = load_config(model)
        estimate = estimate_kv(
            config, memory, max_model_len, dtype, tensor_parallel_size, kv_cache_dtype, kv_planes
        )
        facts = _facts(model, config)
    if as_json:
        print_json({**facts, "kv": asdict(estimate)})
        return
    rows = [(name.replace("_", " "), str(value)) for name, value in facts.items()]
    from vllm_loopus.serving.model.facts import told_depths

    depths = told_depths(config.max_loops)
    sizes = [f"{estimate.bytes_a_token[d] / 1024:.2f} KiB at {d}" for d in depths]
    stored = "" if kv_cache_dtype == "auto" else f", K/V in {kv_cache_dtype}"
    rows += [
        ("K/V per token", f"{', '.join(sizes)} ({estimate.dtype}{stored}, one rank)"),
        (
            f"fit in {estimate.memory_bytes / 2**30:.2f} GiB",
            f"sequences of {estimate.max_model_len} tokens: "
            + ", ".join(f"{estimate.sequences[d]:.2f} at {d}" for d in depths),
        ),
    ]
    print_table(("", model), rows)


def _facts(model: str, config: LoopedConfig) -> dict[str, Any]:
    from vllm_loopus.serving.model.facts import ModelFacts, layout_of

    folder = Path(resolve(model))
    facts = ModelFacts.of(config, layout_of(config, dtype_bytes=2))
    own = config.get_text_config() is config  # it has no base
    files = [file for pattern in WEIGHTS for file in folder.glob(pattern)]
    return {
        "leads_to": resolve(model),
        "family": facts.kind if own else facts.family,
        "base": facts.size,
        **({} if own else {"recast_from": config.base_model_name_or_path or "unknown"}),
        "encoder": facts.encoder,
        "reasoning": facts.reasoning,
        "decoder": facts.decoder,
        "min_loops": config.min_loops,
        "max_loops": config.max_loops,
        "halting": facts.exit_rule,
        "weights_mib": round(sum(f.stat().st_size for f in files) / 2**20, 2) if files else None,
    }


def _dtype_of(config: LoopedConfig) -> str:
    """The dtype that vLLM uses by default: float32 checkpoints are served in bfloat16."""
    known = (getattr(one, "dtype", None) for one in (config, config.get_text_config()))
    dtype = str(next(filter(None, known), "bfloat16")).removeprefix("torch.")
    return "bfloat16" if dtype == "float32" else dtype
