"""The pretrained model to recast: found, read and checked before any work starts.

Tensor names are brought to one form, that of a plain causal LM (`model.layers.0...`, `lm_head`),
whatever wrapper the model was saved in.
"""

import copy
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from vllm_loopus.aliases import known_aliases
from vllm_loopus.backbones import BACKBONES
from vllm_loopus.modeling.checkpoint import IGNORED_SUFFIXES, LEGACY_WEIGHTS
from vllm_loopus.recast.cut import LEAST_LAYERS
from vllm_loopus.recast.tensors import (
    DTYPES,
    CheckpointError,
    TensorSource,
    read_tensors,
    weight_files,
)

# What is fetched of a repository: its other weight files would double the download.
TEXT_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "NOTICE*")
SAFETENSORS_FILES = ("model*.safetensors",)
PICKLED_FILES = ("pytorch_model*.bin", LEGACY_WEIGHTS)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Where the text model's tensors stand in checkpoints of this and earlier years of transformers.
PREFIXES = ("model.", "model.language_model.", "language_model.model.", "language_model.", "")
HEADS = (HEAD, "language_model.lm_head.weight", "model.lm_head.weight")
LM_HEADS = ("ForCausalLM", "LMHeadModel")  # ends of class names
EXPERTS = re.compile(r"(num|n)_(local_|routed_)?experts$")


@dataclass(frozen=True)
class Base:
    """A pretrained causal LM on disk, ready to be recast.

    `config` is the text model's own config, `tensors` its tensors in plain form (a tied head is
    there under its own name), `left_out` the names of tensors of other modalities.
    """

    name: str
    folder: Path
    revision: str | None
    config: PreTrainedConfig
    tensors: Mapping[str, TensorSource]
    files: tuple[Path, ...]
    left_out: tuple[str, ...]

    @property
    def num_layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def repository(self) -> str | None:
        """`owner/name` on the hub, where it came from there."""
        if not is_snapshot(self.folder):
            return None
        _, *parts = self.folder.parent.parent.name.split("--")  # models--owner--name
        return "/".join(parts)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @classmethod
    def open(cls, name: str, revision: str | None = None) -> "Base":
        """`name` is a folder, an alias or `owner/name` on the hub.

        Raises `CheckpointError` for what is no causal LM that can be recast, and for files that are
        missing or damaged.
        """
        folder = find_checkpoint(name, revision)
        if revision is not None and not is_snapshot(folder):
            raise CheckpointError(f"revision={revision!r} means nothing to the folder {name}")
        raw = read_config(folder)
        config, whole = _text_config(folder, raw)
        files = weight_files(folder)
        tensors, left_out = _plain_names(folder, read_tensors(files), whole)
        return cls(
            name=name,
            folder=folder,
            revision=folder.name if is_snapshot(folder) else None,
            config=config,
            tensors=tensors,
            files=tuple(files),
            left_out=left_out,
        )


def is_snapshot(folder: Path) -> bool:
    """Whether a folder is one of the hub's cache, named by its commit."""
    return folder.parent.name == "snapshots"


def find_checkpoint(name: str, revision: str | None = None) -> Path:
    """The folder of a checkpoint: a path, an alias, or fetched from the hub (or its cache).

    Raises `CheckpointError` when there is none.
    """
    target = name if Path(name).exists() else known_aliases().get(name, name)
    folder = Path(target).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{name} is a file; give the checkpoint's folder")
    if target.count("/") != 1 or target.startswith((".", "/", "~")):
        raise CheckpointError(
            f"{name} is no folder, no alias (vllm-loopus alias list) and no owner/name on the hub"
        )
    try:
        fetched = _fetch(target, revision, (*TEXT_FILES, *SAFETENSORS_FILES))
        if not any(fetched.glob("*.safetensors")):
            fetched = _fetch(target, revision, (*TEXT_FILES, *PICKLED_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{target} could not be fetched from the hub, and is not in its cache ({error}); check "
            "the name, the network and HF_TOKEN, or give a folder"
        ) from error
    return fetched


def _fetch(repository: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a checkpoint folder. Raises `CheckpointError`."""
    file = folder / "config.json"
    try:
        raw = json.loads(file.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{folder} holds no config.json; give a checkpoint folder") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); fetch it again") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file} holds no object; fetch it again")
    return raw


def _text_config(folder: Path, raw: Mapping[str, Any]) -> tuple[PreTrainedConfig, PreTrainedConfig]:
    """The config to recast by, and the one on disk, which may be a composite around it.

    Raises `CheckpointError` for everything that is no plain causal LM of a known backbone.
    """
    model_type = raw.get("model_type")
    architectures = raw.get("architectures") or []
    where = f"{folder}: model_type={model_type!r}"
    if not isinstance(model_type, str | None) or not (
        isinstance(architectures, list) and all(isinstance(name, str) for name in architectures)
    ):
        raise CheckpointError(f"{where}, architectures={architectures!r} are no names")
    if model_type in ("loopus", "lds"):
        raise CheckpointError(f"{where} is a LoopUS model already; vllm-loopus convert rewrites it")
    if model_type not in CONFIG_MAPPING:
        raise CheckpointError(
            f"{where} is unknown to this transformers; supported: {', '.join(BACKBONES)}"
        )
    if raw.get("quantization_config"):
        raise CheckpointError(
            f"{where} is quantised (quantization_config); recast the model it was made from"
        )
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:  # of validators, whatever the field
        raise CheckpointError(f"{folder / 'config.json'} is not valid: {error}") from error
    if config.is_encoder_decoder:
        raise CheckpointError(f"{where} is an encoder-decoder model; only decoder-only models loop")
    text = copy.deepcopy(config.get_text_config())
    composite = text.model_type != model_type
    heads = LM_HEADS + (("ForConditionalGeneration",) if composite else ())
    if architectures and not any(name.endswith(heads) for name in architectures):
        raise CheckpointError(
            f"{where} with architectures={architectures} is no causal language model; give the "
            "checkpoint that ends in ForCausalLM"
        )
    if any(EXPERTS.search(name) and value for name, value in text.to_dict().items()):
        raise CheckpointError(
            f"{where} is a mixture of experts, which cannot be recast; "
            f"supported: {', '.join(BACKBONES)}"
        )
    if text.model_type not in BACKBONES:
        part = f" (its text part: {text.model_type!r})" if composite else ""
        raise CheckpointError(
            f"{where}{part} is not supported as a base; supported: {', '.join(BACKBONES)}"
        )
    if text.num_hidden_layers < LEAST_LAYERS:
        raise CheckpointError(
            f"{where} with num_hidden_layers={text.num_hidden_layers} has too few layers to cut; "
            f"at least {LEAST_LAYERS} are needed"
        )
    text.dtype = text.dtype or config.dtype
    if text.dtype not in (None, *DTYPES.values()):
        raise CheckpointError(f"{where} has dtype={text.dtype}; it must be one of {list(DTYPES)}")
    return text, config


def _plain_names(
    folder: Path, found: Mapping[str, TensorSource], whole: PreTrainedConfig
) -> tuple[dict[str, TensorSource], tuple[str, ...]]:
    """Tensors under the names of a plain causal LM, and the names left out."""
    composite = whole.get_text_config() is not whole
    prefixes = PREFIXES[:-1] if composite else PREFIXES
    prefix = next((p for p in prefixes if f"{p}embed_tokens.weight" in found), None)
    if prefix is None:
        raise CheckpointError(f"{folder} holds no embedding ({EMBEDDING}); is it a whole model?")
    tensors: dict[str, TensorSource] = {}
    left_out = []
    for name, tensor in found.items():
        if name.endswith(IGNORED_SUFFIXES):
            continue
        if name not in HEADS and not name.startswith(prefix) and composite:
            left_out.append(name)
            continue
        # Whatever is none of both keeps its name: the check against the config refuses it.
        plain = f"model.{name.removeprefix(prefix)}" if name.startswith(prefix) else name
        plain = HEAD if name in HEADS else plain
        if plain in tensors:
            raise CheckpointError(f"{folder} holds {plain} twice, once as {name}; keep one")
        tensors[plain] = tensor
    if getattr(whole, "tie_word_embeddings", whole.get_text_config().tie_word_embeddings):
        tensors.setdefault(HEAD, tensors[EMBEDDING])
    return tensors, tuple(left_out)
