"""Reads tensors of a checkpoint in pieces and writes them as shards.

Only one piece (16 MiB) of one tensor is in memory at a time, and tensors are copied byte for byte.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from huggingface_hub import (
    parse_local_safetensors_file_metadata,
    split_state_dict_into_shards_factory,
)
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

PIECE = 16 * 2**20
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message says how to fix it."""


class TensorSource(Protocol):
    """A tensor on disk or in memory. `dtype` is named as in safetensors (`BF16`)."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def nbytes(self) -> int: ...

    def pieces(self) -> Iterator[bytes]:
        """The bytes of the tensor in order, at most `PIECE` at a time."""
        ...

    def load(self) -> torch.Tensor:
        """The whole tensor, on the CPU."""
        ...


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file: `nbytes` bytes from `offset` on."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def pieces(self) -> Iterator[bytes]:
        with self.file.open("rb") as stream:
            stream.seek(self.offset)
            remaining = self.nbytes
            while remaining:
                piece = stream.read(min(PIECE, remaining))
                if not piece:
                    raise CheckpointError(f"{self.file} ends inside {self.name}; download it again")
                remaining -= len(piece)
                yield piece

    def load(self) -> torch.Tensor:
        with safe_open(self.file, framework="pt") as opened:
            return opened.get_tensor(self.name)


@dataclass(frozen=True)
class LoadedTensor:
    """A tensor in memory."""

    tensor: torch.Tensor

    @property
    def dtype(self) -> str:
        names = [name for name, dtype in DTYPES.items() if dtype == self.tensor.dtype]
        return names[0] if names else str(self.tensor.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def nbytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()

    def pieces(self) -> Iterator[bytes]:
        flat = self.tensor.detach().contiguous().flatten().view(torch.uint8)
        for start in range(0, self.nbytes, PIECE):
            yield flat[start : start + PIECE].numpy().tobytes()

    def load(self) -> torch.Tensor:
        return self.tensor


@dataclass(frozen=True)
class PickledTensor:
    """A tensor in a pickled checkpoint. The file is opened at each access, because an open memory
    map would stay in memory."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    def pieces(self) -> Iterator[bytes]:
        yield from LoadedTensor(self.load()).pieces()

    def load(self) -> torch.Tensor:
        tensor: torch.Tensor = _unpickle(self.file)[self.name]
        return tensor


def weight_files(folder: Path, *other_names: str) -> list[Path]:
    """The weight files of a checkpoint: safetensors if there are any, else pickled files.

    `other_names`: single files to look for last. Raises `CheckpointError` if there is none, or if a
    file that the index lists is missing.
    """
    for name in (SAFETENSORS, PICKLED):
        index = folder / f"{name}.index.json"
        if index.is_file():
            try:
                names = set(json.loads(index.read_text())["weight_map"].values())
                files = [folder / Path(str(shard)).name for shard in sorted(names)]
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise CheckpointError(
                    f"{index} is damaged ({error!r}); download it again"
                ) from error
            if missing := [file.name for file in files if not file.is_file()]:
                raise CheckpointError(
                    f"{folder} lacks {', '.join(missing)}, which {index.name} lists; download it "
                    "again"
                )
            return files
        if (folder / name).is_file():
            return [folder / name]
    for name in other_names:
        if (folder / name).is_file():
            return [folder / name]
    raise CheckpointError(
        f"{folder} has no weights ({SAFETENSORS}, {PICKLED}, or their shards with an index); give "
        "a complete checkpoint"
    )


def read_tensors(files: list[Path]) -> dict[str, TensorSource]:
    """All tensors in `files` by name; only headers are read.

    Raises `CheckpointError` that names a file that is truncated or not a checkpoint, a tensor that
    is stored twice, or a tensor whose dtype is not in `DTYPES` (a quantised checkpoint).
    """
    tensors: dict[str, TensorSource] = {}
    for file in files:
        found = _safetensors(file) if file.suffix == ".safetensors" else _pickled(file)
        for name, tensor in found.items():
            if name in tensors:
                raise CheckpointError(f"{file} contains {name} a second time; remove one of them")
            if tensor.dtype not in DTYPES:
                raise CheckpointError(
                    f"{name} in {file} has dtype {tensor.dtype}, but only {', '.join(DTYPES)} can "
                    "be recast; use the model before quantisation"
                )
            tensors[name] = tensor
    return tensors


def _safetensors(file: Path) -> Mapping[str, TensorSource]:
    try:
        with safe_open(file, framework="pt"):  # compares the header with the size of the file
            pass
        infos = parse_local_safetensors_file_metadata(file).tensors
        with file.open("rb") as stream:
            data = 8 + int.from_bytes(stream.read(8), "little")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} is truncated or not a safetensors file ({error}); download it again"
        ) from error
    return {
        name: StoredTensor(
            file=file,
            name=name,
            dtype=str(info.dtype),
            shape=tuple(info.shape),
            offset=data + info.data_offsets[0],
            nbytes=info.data_offsets[1] - info.data_offsets[0],
        )
        for name, info in infos.items()
    }


def _pickled(file: Path) -> Mapping[str, TensorSource]:
    tensors = {}
    for name, tensor in _unpickle(file).items():
        if tensor.layout != torch.strided or tensor.is_meta:
            raise CheckpointError(f"{name} in {file} is sparse or empty; save the model again")
        found = LoadedTensor(tensor)
        tensors[name] = PickledTensor(file, name, found.dtype, found.shape, found.nbytes)
    return tensors


def _unpickle(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a pickled file, memory-mapped. Raises `CheckpointError`."""
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # pickle, zip and torch raise many types
        raise CheckpointError(
            f"{file} is damaged, older than PyTorch 1.6, or contains more than tensors ({error}); "
            "download it again, or save the model as safetensors"
        ) from error
    if not isinstance(loaded, Mapping):
        raise CheckpointError(
            f"{file} must contain tensors by name; save the state dict of the model"
        )
    return {str(name): t for name, t in loaded.items() if isinstance(t, torch.Tensor)}


def write_tensors(
    folder: Path, tensors: Mapping[str, TensorSource], max_shard_size: int | str
) -> dict[str, str]:
    """Writes `tensors` as safetensors shards with an index, and shows a progress bar.

    `max_shard_size`: bytes, or a string such as `5GB`. Returns the SHA-256 of each file written.
    """
    plan = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    total = sum(tensor.nbytes for tensor in tensors.values())
    hashes = {}
    with tqdm(total=total, unit="B", unit_scale=True, desc="write") as progress:
        for name, held in plan.filename_to_tensors.items():
            shard = {key: tensors[key] for key in held}
            hashes[name] = _write_shard(folder / name, shard, progress)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / f"{SAFETENSORS}.index.json").write_text(json.dumps(index, indent=2))
    return hashes


def _write_shard(file: Path, tensors: Mapping[str, TensorSource], progress: "tqdm[None]") -> str:
    """Writes one safetensors file. Tensors with wide dtypes come first, so that all are aligned."""
    tensors = dict(sorted(tensors.items(), key=lambda item: -DTYPES[item[1].dtype].itemsize))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        offsets = [end, end := end + tensor.nbytes]
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the data
    digest = hashlib.sha256()
    with file.open("wb") as out:
        for piece in (len(text).to_bytes(8, "little"), text):
            out.write(piece)
            digest.update(piece)
        for tensor in tensors.values():
            for piece in tensor.pieces():
                out.write(piece)
                digest.update(piece)
                progress.update(len(piece))
    with safe_open(file, framework="pt"):  # raises if the header does not match the data
        pass
    return digest.hexdigest()
