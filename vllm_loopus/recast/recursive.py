"""Recasts a pretrained model as a relaxed recursive transformer (arXiv 2410.20672).

The L layers become a block of K = L / B tied layers that is run B times. The difference between a
layer's matrix and the tied one is what the LoRA of its loop starts from, by truncated SVD. Norms
and biases are kept for each loop, so that at full rank the model is the base.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from vllm_loopus.architectures.recursive.config import RecursiveConfig
from vllm_loopus.architectures.recursive.reference import RecursiveForCausalLM
from vllm_loopus.recast.base import EMBEDDING, HEAD, Base
from vllm_loopus.recast.convert import COMPANIONS, WriteOptions, check_tensors, write_checkpoint
from vllm_loopus.recast.tensors import (
    DTYPES,
    CheckpointError,
    LoadedTensor,
    TensorSource,
)

LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
LORA_DTYPE = "F32"  # of the LoRA on disk: at full rank in 16 bits the model would not be the base


def sources_of_tied(tie: str, num_layers: int, loops: int) -> list[list[int]]:
    """For each of the K tied layers, the layers of the base that it is the mean of.

    `stepwise`: K layers at equal distances, with the first and the last. `lower`: the first K.
    `average`: those that it stands for in the loops.
    """
    size = num_layers // loops
    if tie == "average":
        return [[loop * size + layer for loop in range(loops)] for layer in range(size)]
    if tie == "lower" or size == 1:
        return [[layer] for layer in range(size)]
    return [[round(layer * (num_layers - 1) / (size - 1))] for layer in range(size)]


@dataclass(frozen=True)
class MeanTensor:
    """The mean of matrices of the base, in their dtype."""

    parts: tuple[TensorSource, ...]

    @property
    def dtype(self) -> str:
        return self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parts[0].shape

    @property
    def nbytes(self) -> int:
        return self.parts[0].nbytes

    def load(self) -> torch.Tensor:
        total = sum(part.load().float() for part in self.parts)
        assert isinstance(total, torch.Tensor)
        return (total / len(self.parts)).to(DTYPES[self.dtype])

    def pieces(self) -> Iterator[bytes]:
        return LoadedTensor(self.load()).pieces()


@dataclass
class Residual:
    """What a matrix of the base differs by from the tied one, [out, in], and its best rank r.

    `kept`: the share of the squared Frobenius norm that is within rank r; 1 without a difference.
    Factors are in memory until both are read.
    """

    own: TensorSource
    tied: TensorSource
    rank: int
    seed: int
    device: torch.device
    kept: float | None = None
    _factors: dict[str, torch.Tensor] = field(default_factory=dict)

    def take(self, name: str) -> torch.Tensor:
        """`lora_A` = V_r^T [r, in] or `lora_B` = U_r S_r [out, r], in float32."""
        if name not in self._factors:
            a, b = self._factorise()
            self._factors = {"lora_A": a, "lora_B": b}
        return self._factors.pop(name)

    def _factorise(self) -> tuple[torch.Tensor, torch.Tensor]:
        own, tied = (t.load().to(self.device, torch.float64) for t in (self.own, self.tied))
        difference = own - tied
        if not difference.any():
            # Any A serves. One that reads all inputs can be trained as any other LoRA.
            generator = torch.Generator().manual_seed(self.seed)
            inputs = torch.randn(difference.shape[1], self.rank, generator=generator)
            self.kept = 1.0
            return torch.linalg.qr(inputs).Q.T.contiguous(), torch.zeros(len(own), self.rank)
        a, b, self.kept = truncated_svd(difference, self.rank)
        return a.float().cpu().contiguous(), b.float().cpu().contiguous()


def truncated_svd(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """`V_r^T` [r, in], `U_r S_r` [out, r], and the share of the squared norm within rank r.

    From the eigenvectors of the Gram matrix of the shorter side, in four times less time than all
    singular vectors take. In float64 its loss of digits is below float32's.
    """
    wide = len(matrix) <= matrix.shape[1]
    values, vectors = torch.linalg.eigh(matrix @ matrix.T if wide else matrix.T @ matrix)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)[:, :rank]
    kept = min((values[:rank].sum() / values.sum()).item(), 1.0)
    if not wide:
        return vectors.T, matrix @ vectors, kept
    scale = values[:rank].sqrt()
    scale = scale.clamp(min=1e-10 * scale[0].item())  # A without zeros to divide by
    return (vectors.T @ matrix) / scale[:, None], vectors * scale, kept


@dataclass(frozen=True)
class Factor:
    """One of the two factors of a residual, computed when it is written."""

    residual: Residual
    name: str
    shape: tuple[int, ...]
    dtype: str = LORA_DTYPE

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.shape[1] * DTYPES[self.dtype].itemsize

    def load(self) -> torch.Tensor:
        return self.residual.take(self.name)

    def pieces(self) -> Iterator[bytes]:
        return LoadedTensor(self.load()).pieces()


@dataclass(frozen=True)
class RecursivePlan:
    """The config and tensors of a recast that has been checked and not yet written."""

    base: Base
    config: RecursiveConfig
    tensors: dict[str, TensorSource]
    residuals: dict[str, Residual]  # by the name of the matrix in the base

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @cached_property
    def parameters(self) -> dict[str, int]:
        """The number of parameters of the base, and of the tied part and LoRA of the recast."""
        lora = sum(count(t) for name, t in self.tensors.items() if ".lora_" in name)
        whole = sum(count(tensor) for tensor in self.tensors.values())
        base = sum(count(t) for name, t in self.base.tensors.items() if not self._is_tied(name))
        return {"base": base, "tied": whole - lora, "lora": lora}

    def _is_tied(self, name: str) -> bool:
        return name == HEAD and self.config.tie_word_embeddings

    def write(self, out: Path, options: WriteOptions) -> None:
        """Writes the checkpoint. `out` is created only when it is complete; errors are those of
        `convert.recast`."""
        write_checkpoint(out, self.config, self.tensors, self.base.folder, COMPANIONS, options)


def count(tensor: TensorSource) -> int:
    """How many numbers a tensor has."""
    return tensor.nbytes // DTYPES[tensor.dtype].itemsize


def plan(
    base: Base,
    *,
    loops: int,
    lora_rank: int,
    tie: str,
    seed: int = 0,
    device: torch.device | None = None,
) -> RecursivePlan:
    """Checks a recast of `base`. Reads only headers and writes nothing.

    Raises `ValueError` with field, value and fix for loops, a rank or a choice that is not
    possible, and for tensors that do not fit the base config.
    """
    base_config = base.config.to_dict()
    base_config.pop("auto_map", None)  # custom code of the base repository is not used
    head = base.tensors.get(HEAD)
    tied_head = head is not None and head is base.tensors[EMBEDDING]
    try:
        config = RecursiveConfig(
            base_config=base_config,
            base_model_name_or_path=base.name,
            loops=loops,
            lora_rank=lora_rank,
            tie=tie,
            tie_word_embeddings=tied_head,
        )
        expected = RecursiveForCausalLM.expected_shapes(config)
    except ValueError:
        raise
    except Exception as error:  # model classes raise many types
        raise CheckpointError(f"{base.name}: config.json is not valid: {error!r}") from error
    matrices = [shape for name, shape in expected.items() if _is_matrix(name)]
    largest = max(min(shape) for shape in matrices)
    if lora_rank > largest:
        raise ValueError(
            f"lora_rank={lora_rank} is beyond the matrices of {base.name}, the largest of which "
            f"has rank {largest}; give 0 to {largest} (a smaller matrix gets its full rank)"
        )
    config.dtype = base.config.dtype or DTYPES[base.tensors[EMBEDDING].dtype]
    tensors, residuals = _tensors(base, config, expected, seed, device or torch.device("cpu"))
    check_tensors(expected, tensors, base.name)
    return RecursivePlan(base, config, tensors, residuals)


def _is_matrix(name: str) -> bool:
    return LAYER.fullmatch(name) is not None


def _tensors(
    base: Base,
    config: RecursiveConfig,
    expected: dict[str, torch.Size],
    seed: int,
    device: torch.device,
) -> tuple[dict[str, TensorSource], dict[str, Residual]]:
    sources = sources_of_tied(config.tie, base.num_layers, config.loops)
    tensors: dict[str, TensorSource] = {}
    residuals: dict[str, Residual] = {}
    for name, tensor in base.tensors.items():
        if name == HEAD and config.tie_word_embeddings:
            continue
        match = LAYER.fullmatch(name)
        if match is None or int(match[1]) >= base.num_layers:
            tensors[name] = tensor
            continue
        (loop, layer), rest = divmod(int(match[1]), config.block_size), match[2]
        tied_name, own_name = f"model.layers.{layer}.{rest}", f"model.loops.{loop}.layers.{layer}."
        if tied_name not in expected:
            tensors[own_name + rest] = tensor
            continue
        parts = [base.tensors.get(f"model.layers.{source}.{rest}") for source in sources[layer]]
        found = tuple(part for part in parts if part is not None)
        if len(found) < len(parts) or any(part.shape != tensor.shape for part in found):
            continue  # reported as missing
        tied = found[0] if len(found) == 1 else MeanTensor(found)
        tensors.setdefault(tied_name, tied)
        if tensor.shape != tuple(expected[tied_name]) or not config.lora_rank:
            continue
        outputs, inputs = tensor.shape
        rank = config.rank_of(outputs, inputs)
        residuals[name] = residual = Residual(tensor, tied, rank, seed, device)
        module = own_name + rest.removesuffix(".weight")
        for factor, shape in {"lora_A": (rank, inputs), "lora_B": (outputs, rank)}.items():
            tensors[f"{module}.{factor}.weight"] = Factor(residual, factor, shape)
    return tensors, residuals
