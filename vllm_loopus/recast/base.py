"""Finds, reads and checks the pretrained model to recast.

Tensor names are normalised to those of a plain causal LM (`model.layers.0...`, `lm_head`), whatever
wrapper the model was saved with.
"""

import copy
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from vllm_loopus.aliases import known_aliases
from vllm_loopus.architectures import ARCHITECTURES
from vllm_loopus.backbones import BACKBONES
from vllm_loopus.modeling.checkpoint import IGNORED_SUFFIXES, LEGACY_WEIGHTS
from vllm_loopus.recast.cut import MIN_LAYERS
from vllm_loopus.recast.gguf_file import SUFFIX, GgufFile, find_gguf
from vllm_loopus.recast.tensors import (
    DTYPES,
    CheckpointError,
    TensorSource,
    read_tensors,
    weight_files,
)

# The files to download from a repository. Other weight formats would double the download.
TEXT_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "NOTICE*")
SAFETENSORS_FILES = ("model*.safetensors",)
PICKLED_FILES = ("pytorch_model*.bin", LEGACY_WEIGHTS)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Prefixes of the text model's tensors in checkpoints of current and older transformers versions.
PREFIXES = ("model.", "model.language_model.", "language_model.model.", "language_model.", "")
HEADS = (HEAD, "language_model.lm_head.weight", "model.lm_head.weight")
LM_HEADS = ("ForCausalLM", "LMHeadModel")  # ends of class names
EXPERTS = re.compile(r"(num|n)_(local_|routed_)?experts$")


@dataclass(frozen=True)
class Base:
    """A pretrained causal LM on disk.

    `config`: the config of the text model. `tensors`: its tensors under normalised names; a tied
    LM head is listed separately. `left_out`: the names of tensors of other modalities. `gguf`: the
    GGUF file that it was read from; `folder` is then temporary, and removed with this object.
    """

    name: str
    folder: Path
    revision: str | None
    config: PreTrainedConfig
    tensors: Mapping[str, TensorSource]
    files: tuple[Path, ...]
    left_out: tuple[str, ...]
    gguf: GgufFile | None = None
    unpacked: "TemporaryDirectory[str] | None" = field(default=None, repr=False)

    @property
    def source(self) -> Path:
        """The folder that was given or downloaded."""
        return self.folder if self.gguf is None else self.gguf.path.parent

    @property
    def num_layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def repository(self) -> str | None:
        """`owner/name` on the hub; None for a local folder."""
        if not is_snapshot(self.folder):
            return None
        _, *parts = self.folder.parent.parent.name.split("--")  # models--owner--name
        return "/".join(parts)

    @property
    def dtypes(self) -> dict[str, int]:
        """The number of tensors of each dtype, the most frequent first."""
        return dict(Counter(tensor.dtype for tensor in self.tensors.values()).most_common())

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @classmethod
    def open(cls, name: str, revision: str | None = None, min_layers: int = MIN_LAYERS) -> "Base":
        """Opens a folder, an alias, `owner/name` on the hub, or a GGUF file or a folder with one.

        `min_layers`: how many layers it must have.

        Raises `CheckpointError` if the model cannot be recast, or if files are missing or damaged.
        """
        if (file := find_gguf(name)) is not None:
            return cls._of_gguf(name, file, min_layers)
        folder = find_checkpoint(name, revision)
        if revision is not None and not is_snapshot(folder):
            raise CheckpointError(
                f"revision={revision!r} has no effect for the local folder {name}; leave it out"
            )
        return cls._read(name, folder, min_layers)

    @classmethod
    def _of_gguf(cls, name: str, file: Path, min_layers: int) -> "Base":
        gguf = GgufFile.open(file)
        # Refused before the weights are read.
        config = gguf.config()
        _text_config(file, config.to_dict() | {"architectures": []}, min_layers, config)
        unpacked = gguf.unpack_for_reading()
        read = cls._read(name, Path(unpacked.name), min_layers)
        return replace(read, files=(file,), gguf=gguf, unpacked=unpacked)

    @classmethod
    def _read(cls, name: str, folder: Path, min_layers: int) -> "Base":
        config, whole = _text_config(folder, read_config(folder), min_layers)
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
    """Whether a folder is a snapshot in the hub's cache, named by its commit."""
    return folder.parent.name == "snapshots"


def find_checkpoint(name: str, revision: str | None = None) -> Path:
    """The folder of a checkpoint: a path, the target of an alias, or a download from the hub.

    Raises `CheckpointError` if it cannot be found.
    """
    target = name if Path(name).exists() else known_aliases().get(name, name)
    folder = Path(target).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(
            f"{name} is a file; "
            + (
                f"write it as a checkpoint first: vllm-loopus convert {name} FOLDER"
                if folder.suffix == SUFFIX
                else "give the checkpoint's folder"
            )
        )
    if target.count("/") != 1 or target.startswith((".", "/", "~")):
        raise CheckpointError(
            f"{name} is neither a folder nor an alias (vllm-loopus alias list) nor owner/name on "
            "the hub"
        )
    try:
        fetched = _fetch(target, revision, (*TEXT_FILES, *SAFETENSORS_FILES))
        if not any(fetched.glob("*.safetensors")):
            fetched = _fetch(target, revision, (*TEXT_FILES, *PICKLED_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{target} could not be downloaded from the hub and is not in its cache ({error}); "
            "check the name, the network and HF_TOKEN, or give a folder"
        ) from error
    return fetched


def _fetch(repository: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))


def read_config(folder: Path) -> dict[str, Any]:
    """The content of config.json in a checkpoint folder. Raises `CheckpointError` without one."""
    file = folder / "config.json"
    try:
        raw = json.loads(file.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no config.json; give a checkpoint folder") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); download it again") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file} must contain a JSON object; download it again")
    return raw


def _text_config(
    folder: Path,
    raw: Mapping[str, Any],
    min_layers: int,
    config: PreTrainedConfig | None = None,
) -> tuple[PreTrainedConfig, PreTrainedConfig]:
    """The config of the text model, and the config on disk, which may contain it as a part.

    `config`: the config, if it is not that of the folder.

    Raises `CheckpointError` if it is not a plain causal LM with a supported backbone.
    """
    model_type = raw.get("model_type")
    architectures = raw.get("architectures") or []
    where = f"{folder}: model_type={model_type!r}"
    if not isinstance(model_type, str | None) or not (
        isinstance(architectures, list) and all(isinstance(name, str) for name in architectures)
    ):
        raise CheckpointError(
            f"{where}, architectures={architectures!r} must be a string and a list of strings; "
            "correct config.json"
        )
    if model_type in ("loopus", "lds"):
        raise CheckpointError(
            f"{where} is a LoopUS model already; vllm-loopus convert changes its format"
        )
    if model_type in {architecture.config_class.model_type for architecture in ARCHITECTURES}:
        raise CheckpointError(f"{where} is a looped model already; recast the model it is made of")
    if model_type not in CONFIG_MAPPING:
        raise CheckpointError(
            f"{where} is unknown to the installed transformers; supported: {', '.join(BACKBONES)}"
        )
    if raw.get("quantization_config"):
        raise CheckpointError(
            f"{where} is quantised (quantization_config); recast the model it was made from"
        )
    try:
        config = config or AutoConfig.from_pretrained(folder)
    except Exception as error:  # validators raise many types
        raise CheckpointError(f"{folder / 'config.json'} is not valid: {error}") from error
    if config.is_encoder_decoder:
        raise CheckpointError(
            f"{where} is an encoder-decoder model; only decoder-only models can be recast"
        )
    text = copy.deepcopy(config.get_text_config())
    composite = text.model_type != model_type
    heads = LM_HEADS + (("ForConditionalGeneration",) if composite else ())
    if architectures and not any(name.endswith(heads) for name in architectures):
        raise CheckpointError(
            f"{where} with architectures={architectures} is not a causal language model; give a "
            "checkpoint whose architecture ends in ForCausalLM"
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
    if text.num_hidden_layers < min_layers:
        raise CheckpointError(
            f"{where} with num_hidden_layers={text.num_hidden_layers} has too few layers to cut; "
            f"at least {min_layers} are needed"
        )
    text.dtype = text.dtype or config.dtype
    if text.dtype not in (None, *DTYPES.values()):
        raise CheckpointError(f"{where} has dtype={text.dtype}; it must be one of {list(DTYPES)}")
    return text, config


def _plain_names(
    folder: Path, found: Mapping[str, TensorSource], whole: PreTrainedConfig
) -> tuple[dict[str, TensorSource], tuple[str, ...]]:
    """The tensors under normalised names, and the names of the tensors left out."""
    composite = whole.get_text_config() is not whole
    prefixes = PREFIXES[:-1] if composite else PREFIXES
    prefix = next((p for p in prefixes if f"{p}embed_tokens.weight" in found), None)
    if prefix is None:
        raise CheckpointError(
            f"{folder} has no embedding tensor ({EMBEDDING}); give a complete checkpoint"
        )
    tensors: dict[str, TensorSource] = {}
    left_out = []
    for name, tensor in found.items():
        if name.endswith(IGNORED_SUFFIXES):
            continue
        if name not in HEADS and not name.startswith(prefix) and composite:
            left_out.append(name)
            continue
        # Other tensors keep their names; the check against the config will report them.
        plain = f"model.{name.removeprefix(prefix)}" if name.startswith(prefix) else name
        plain = HEAD if name in HEADS else plain
        if plain in tensors:
            raise CheckpointError(f"{folder} has {plain} twice, once as {name}; remove one of them")
        tensors[plain] = tensor
    if getattr(whole, "tie_word_embeddings", whole.get_text_config().tie_word_embeddings):
        tensors.setdefault(HEAD, tensors[EMBEDDING])
    return tensors, tuple(left_out)
