"""Reads a GGUF file (llama.cpp) as a pretrained model.

transformers reads weights, config and tokenizer, and dequantises the weights. The result is written
as an ordinary checkpoint in float32, which has every value of the file exactly.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from vllm_loopus.extras import need
from vllm_loopus.recast.output import check_output, complete_folder
from vllm_loopus.recast.tensors import CheckpointError, LoadedTensor, write_tensors

SUFFIX = ".gguf"
MAX_SHARD_SIZE = "5GB"
OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.pt")
STATED = ("general.architecture", "general.name", "general.license", "split.count")
BYTES = 4  # of a value in float32


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file and what its header says.

    `types`: the number of tensors of each type (`Q4_1`, `F32`). `values`: the number of weights.
    `model_name`, `license`: as stated in the file; None if it does not say.
    """

    path: Path
    architecture: str
    model_name: str | None
    license: str | None
    types: dict[str, int]
    values: int

    @property
    def description(self) -> str:
        """`GGUF, Q4_1 (210 tensors), F32 (61 tensors)`."""
        types = sorted(self.types.items(), key=lambda item: -item[1])
        return "GGUF, " + ", ".join(f"{name} ({count} tensors)" for name, count in types)

    @property
    def facts(self) -> dict[str, Any]:
        """For a provenance file."""
        stated = {name: value for name, value in asdict(self).items() if name != "path"}
        return {"file": self.path.name, **stated, "dequantised_to": "float32"}

    @classmethod
    def open(cls, path: Path) -> "GgufFile":
        """Reads the header. Raises `CheckpointError` that names what cannot be read."""
        need("a .gguf file", "recast", "gguf")
        from gguf import GGML_QUANT_SIZES, GGUFReader, dequantize
        from numpy import uint8, zeros

        try:
            reader = GGUFReader(path)
            fields = {
                name: reader.fields[name].contents() for name in STATED if name in reader.fields
            }
            tensors = list(reader.tensors)
        except Exception as error:  # the reader raises many types, also for new tensor types
            raise CheckpointError(
                f"{path} is damaged, or has a tensor type that the installed gguf does not know "
                f"({error}); download it again, or use another quantisation such as Q8_0"
            ) from error
        count = int(fields.get("split.count") or 1)
        if count > 1:
            raise CheckpointError(
                f"{path} is one of {count} parts; merge them with llama.cpp's llama-gguf-split "
                "--merge, and give the merged file"
            )
        unreadable = []
        types = Counter(tensor.tensor_type for tensor in tensors)
        for kind in types:
            try:
                dequantize(zeros(GGML_QUANT_SIZES[kind][1], dtype=uint8), kind)
            except NotImplementedError:
                unreadable.append(kind)
        if unreadable:
            names = [t.name for t in tensors if t.tensor_type in unreadable]
            raise CheckpointError(
                f"{path} has tensors of type {', '.join(kind.name for kind in unreadable)} "
                f"({names[0]} and {len(names) - 1} more), which transformers cannot dequantise; "
                "use a file of another quantisation, such as Q8_0 or Q4_K_M"
            )
        return cls(
            path=path,
            architecture=str(fields.get("general.architecture")),
            model_name=_text(fields.get("general.name")),
            license=_text(fields.get("general.license")),
            types={kind.name: number for kind, number in types.items()},
            values=sum(int(tensor.n_elements) for tensor in tensors),
        )

    def config(self) -> Any:
        """The config of the model. Raises `CheckpointError` for an unknown architecture."""
        folder, name = str(self.path.parent), self.path.name
        try:
            config = AutoConfig.from_pretrained(folder, gguf_file=name)
        except Exception as error:  # transformers raises many types
            raise CheckpointError(
                f"{self.path}: transformers cannot read GGUF files of the architecture "
                f"{self.architecture!r} ({error}); recast the model that it was made from"
            ) from error
        return config

    def unpack(self, folder: Path, max_shard_size: str = MAX_SHARD_SIZE) -> None:
        """Writes the model as a checkpoint to an existing folder: config, weights in float32,
        tokenizer with its chat template, generation config.

        The whole model is in memory. Raises `CheckpointError` if transformers cannot read it.
        """
        source, name = str(self.path.parent), self.path.name
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
            model = AutoModelForCausalLM.from_pretrained(
                source, gguf_file=name, dtype=torch.float32
            )
        except Exception as error:  # transformers raises many types
            raise CheckpointError(
                f"{self.path} ({self.architecture}, {self.description}) cannot be read by "
                f"transformers: {error}; recast the model that it was made from"
            ) from error
        fields = model.config.to_dict()
        fields.pop("quantization_config", None)
        config = type(model.config).from_dict(
            fields | {"architectures": [type(model).__name__], "dtype": "float32"}
        )
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        tied = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
        tensors = {
            key: LoadedTensor(tensor)
            for key, tensor in model.state_dict().items()
            if key not in tied
        }
        write_tensors(folder, tensors, max_shard_size)

    def unpack_for_reading(self) -> "tempfile.TemporaryDirectory[str]":
        """Unpacks to a temporary folder, which is removed with the returned object.

        Raises `OSError` if there is not enough space for it.
        """
        scratch = tempfile.TemporaryDirectory(prefix="vllm-loopus-gguf-")
        check_output(Path(scratch.name) / "model", force=False, needed=BYTES * self.values)
        self.unpack(Path(scratch.name))
        return scratch


def find_gguf(name: str) -> Path | None:
    """The GGUF file that `name` means: the file itself, or the only one in a folder without weights
    of another format; None if it means none. Raises `CheckpointError` if there are several."""
    path = Path(name).expanduser()
    if path.suffix == SUFFIX and path.is_file():
        return path
    if not path.is_dir() or any(next(path.glob(pattern), None) for pattern in OTHER_WEIGHTS):
        return None
    found = sorted(path.glob(f"*{SUFFIX}"))
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise CheckpointError(f"{name} has several GGUF files ({names}); give one of them")
    return found[0] if found else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def write_plain(
    path: Path,
    out: Path,
    provenance: Callable[[GgufFile], dict[str, Any]],
    *,
    force: bool,
    max_shard_size: str,
) -> None:
    """Writes a GGUF file as a plain checkpoint to the folder `out`.

    `provenance`: gives the content of `provenance.json`. `force`: as in `check_output`. Raises
    `FileExistsError`, `OSError` without enough space, and `CheckpointError` if the file cannot be
    read.
    """
    file = GgufFile.open(path)
    file.config()
    check_output(out, force=force, needed=BYTES * file.values, reads=path.parent)
    with complete_folder(out) as folder:
        file.unpack(folder, max_shard_size)
        (folder / "provenance.json").write_text(json.dumps(provenance(file), indent=1))
