"""Writes LoopUS checkpoints from a pretrained model, and converts between the two formats."""

import copy
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from vllm_loopus.base_config import ConfigWithBase
from vllm_loopus.config import LoopUSConfig
from vllm_loopus.modeling.checkpoint import (
    IGNORED_SUFFIXES,
    LEGACY_WEIGHTS,
    current_name,
    raise_if_wrong,
)
from vllm_loopus.modeling.confidence import ConfidenceHead
from vllm_loopus.modeling.gate import SelectiveGate
from vllm_loopus.modeling.model import LoopUSForCausalLM
from vllm_loopus.recast.base import EMBEDDING, HEAD, Base, find_checkpoint, read_config
from vllm_loopus.recast.cut import Cut
from vllm_loopus.recast.output import check_output, complete_folder
from vllm_loopus.recast.tensors import (
    DTYPES,
    CheckpointError,
    LoadedTensor,
    TensorSource,
    read_tensors,
    weight_files,
    write_tensors,
)

FORMATS = ("loopus", "lds")
SIZE = re.compile(r"[1-9]\d*(KB|MB|GB|TB)", re.IGNORECASE)
OUTSIDE_LAYERS = {
    EMBEDDING: "encoder.embed_tokens.weight",
    "model.norm.weight": "decoder.norm.weight",
    HEAD: "decoder.lm_head.weight",
}
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
# Files of a model besides config and weights, which are copied unchanged.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
    "generation_config.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
)
# Files that `recast` adds to a checkpoint; `convert` copies them.
METADATA_FILES = (
    "README.md",
    "provenance.json",
    "analysis.json",
    "representation.png",
    "report.html",
)


@dataclass(frozen=True)
class WriteOptions:
    """How a checkpoint is written.

    - `checkpoint_format`: `loopus`, or `lds` for the released format.
    - `max_shard_size`: the maximum size of a weight file in bytes, or a string such as `5GB`.
    - `force`: replace an existing checkpoint.
    - `finish`: called with the temporary folder and the SHA-256 of each weight file before the
      checkpoint is moved to its place; may add files.
    """

    checkpoint_format: str = FORMATS[0]
    max_shard_size: int | str = "5GB"
    force: bool = False
    finish: Callable[[Path, dict[str, str]], None] | None = None

    def __post_init__(self) -> None:
        if self.checkpoint_format not in FORMATS:
            raise ValueError(
                f"format={self.checkpoint_format!r} is unknown; choose {' or '.join(FORMATS)}"
            )
        if isinstance(self.max_shard_size, str) and not SIZE.fullmatch(self.max_shard_size):
            raise ValueError(
                f"max_shard_size={self.max_shard_size!r} is not a size; write it as 500MB or 5GB"
            )


DEFAULTS = WriteOptions()


def looped_name(name: str, cut: Cut) -> str:
    """The name in a LoopUS checkpoint of a tensor of the base model; unknown names are returned
    unchanged."""
    if match := LAYER.fullmatch(name):
        index, rest = int(match[1]), match[2]
        for part, run in cut.runs.items():
            if index in run:
                return f"{part}.layers.{run.index(index)}.{rest}"
    return OUTSIDE_LAYERS.get(name, name)


def new_tensors(hidden_size: int, dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    """The tensors of gate and confidence head with the paper's initialisation, by name."""
    generator = torch.Generator().manual_seed(seed)
    gate = SelectiveGate(hidden_size)
    gate.reset_parameters(generator)
    head = ConfidenceHead(hidden_size)
    with torch.no_grad():
        _, _, weight, bias = head.parameters()
        weight.normal_(0, 0.02, generator=generator)
        bias.zero_()
    named = {
        **{f"reasoning.gate.{name}": value for name, value in gate.state_dict().items()},
        **{f"q_head.{name}": value for name, value in head.state_dict().items()},
    }
    return {name: tensor.to(dtype) for name, tensor in named.items()}


def plan(
    base: Base, cut: Cut, seed: int = 0, **fields: Any
) -> tuple[LoopUSConfig, dict[str, TensorSource]]:
    """The config and tensors of `base` split by `cut`. Reads only headers and writes nothing.

    `fields`: further fields of `LoopUSConfig`. Raises `ValueError` for invalid fields, and for
    tensors that do not fit the base config.
    """
    embedding = base.tensors[EMBEDDING]
    base_config = base.config.to_dict()
    base_config.pop("auto_map", None)  # custom code of the base repository is not used
    fields.setdefault("base_model_name_or_path", base.name)
    try:
        config = LoopUSConfig(base_config=base_config, **cut.config_fields, **fields)
        expected = LoopUSForCausalLM.expected_shapes(config)
        fresh = new_tensors(config.hidden_size, DTYPES[embedding.dtype], seed)
    except ValueError:
        raise
    except Exception as error:  # model classes raise many types
        raise CheckpointError(f"{base.name}: config.json is not valid: {error!r}") from error
    config.dtype = base.config.dtype or DTYPES[embedding.dtype]
    tensors = {looped_name(name, cut): tensor for name, tensor in base.tensors.items()}
    tensors.update({name: LoadedTensor(tensor) for name, tensor in fresh.items()})
    check_tensors(expected, tensors, base.name)
    return config, tensors


def recast(
    base: Base | str,
    out: Path,
    *,
    encoder: int,
    decoder: int,
    seed: int = 0,
    options: WriteOptions = DEFAULTS,
    **fields: Any,
) -> LoopUSConfig:
    """Writes a LoopUS checkpoint made from the pretrained model `base` to the folder `out`.

    The first `encoder` layers become the encoder, the last `decoder` layers the decoder. `fields`:
    further fields of `LoopUSConfig`. Weights are streamed, so memory use does not depend on the
    size of the model. `out` is created only when it is complete.

    Raises `FileExistsError` if `out` exists and may not be replaced, `OSError` if there is not
    enough disk space, and `ValueError` for an invalid model or cut.
    """
    base = base if isinstance(base, Base) else Base.open(base)
    config, tensors = plan(base, Cut(base.num_layers, encoder, decoder), seed, **fields)
    write_checkpoint(out, config, tensors, base.folder, COMPANIONS, options)
    return config


def convert(source: str, out: Path, options: WriteOptions) -> LoopUSConfig:
    """Rewrites the LoopUS checkpoint `source` (a folder, an alias or `owner/name`) as `out`.

    Tensors are copied byte for byte; old tensor names are updated. Options and errors are as in
    `recast`.
    """
    folder = find_checkpoint(source)
    model_type = read_config(folder).get("model_type")
    if model_type not in FORMATS:
        raise CheckpointError(
            f"{source}: model_type={model_type!r} is not a LoopUS checkpoint; vllm-loopus recast "
            "makes one from a pretrained model"
        )
    try:
        config = AutoConfig.from_pretrained(folder)  # in either format
        expected = LoopUSForCausalLM.expected_shapes(config)
    except Exception as error:  # validators and model classes raise many types
        raise CheckpointError(f"{folder / 'config.json'} is not valid: {error}") from error
    found = read_tensors(weight_files(folder, LEGACY_WEIGHTS))
    tensors: dict[str, TensorSource] = {}
    for name, tensor in found.items():
        if name.endswith(IGNORED_SUFFIXES):
            continue
        if current_name(name) in tensors:
            raise CheckpointError(
                f"{source} has {current_name(name)} twice, once as {name}; remove one of them"
            )
        tensors[current_name(name)] = tensor
    check_tensors(expected, tensors, source)
    write_checkpoint(out, config, tensors, folder, (*COMPANIONS, *METADATA_FILES), options)
    return config


def released_config(config: LoopUSConfig) -> dict[str, Any]:
    """The content of config.json in the format of the original implementation (`lds`).

    Fields that it does not have are written only if they differ from their defaults.
    """
    ours = config.to_dict()
    fields = {
        "N": config.max_loops,
        "q_threshold": config.exit_threshold,
        "q_eval_interval": config.exit_interval,
        "halting_strategy": config.halting_strategy,
        "convergence_epsilon": config.convergence_epsilon,
        "base_model_name_or_path": config.base_model_name_or_path,
        "base_config_dict": ours["base_config"],
        "encoder_layer_indices": list(config.encoder_layer_indices),
        "decoder_layer_indices": list(config.decoder_layer_indices),
        "reasoning_layer_indices": list(config.reasoning_layer_indices),
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "model_type": "lds",
        "dtype": ours.get("dtype"),
    }
    for name in ("min_loops", "confidence_input"):
        if ours[name] != getattr(LoopUSConfig, name):
            fields[name] = ours[name]
    return fields


def check_tensors(
    shapes: Mapping[str, torch.Size], tensors: Mapping[str, TensorSource], source: str
) -> None:
    """Raises `ValueError` that names the tensors of `source` that do not fit `shapes`, if any."""
    expected = {name: tuple(shape) for name, shape in shapes.items()}
    raise_if_wrong(
        source,
        missing=sorted(expected.keys() - tensors.keys()),
        unexpected=sorted(tensors.keys() - expected.keys()),
        misshapen=[
            f"{name} is {list(tensor.shape)}, expected {list(expected[name])}"
            for name, tensor in tensors.items()
            if name in expected and tensor.shape != expected[name]
        ],
    )


def write_checkpoint(
    out: Path,
    config: ConfigWithBase,
    tensors: Mapping[str, TensorSource],
    source: Path,
    companions: tuple[str, ...],
    options: WriteOptions,
) -> None:
    """Writes config, weights, and the files `companions` of the folder `source` to `out`."""
    needed = sum(tensor.nbytes for tensor in tensors.values())
    check_output(out, force=options.force, needed=needed, reads=source)
    with complete_folder(out) as folder:
        if options.checkpoint_format == "lds" and isinstance(config, LoopUSConfig):
            text = json.dumps(released_config(copy.deepcopy(config)), indent=1)
            (folder / "config.json").write_text(text)
        else:
            config.save_pretrained(folder)
        for name in companions:
            if (source / name).is_dir():
                shutil.copytree(source / name, folder / name)
            elif (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        hashes = write_tensors(folder, tensors, options.max_shard_size)
        if options.finish is not None:
            options.finish(folder, hashes)
