"""Which part of a matrix of the checkpoint a rank has, as vLLM's linear layers divide it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from vllm.model_executor.layers.linear import (
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)


@dataclass(frozen=True)
class Shard:
    """What one rank holds of one matrix of the checkpoint, [out, in].

    - `whole`: the size of the matrix in the checkpoint, outputs and inputs.
    - `outputs`: ranges of rows, in the order in which the layer has them.
    - `inputs`: the range of columns.
    - `adds_bias`: whether this rank adds the bias.
    """

    whole: tuple[int, int]
    outputs: tuple[range, ...]
    inputs: range
    adds_bias: bool = True

    @property
    def num_outputs(self) -> int:
        return sum(map(len, self.outputs))

    def outputs_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The rows of a tensor [out, ...] that this rank holds."""
        return torch.cat([tensor[rows.start : rows.stop] for rows in self.outputs])

    def inputs_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The columns of a tensor [..., in] that this rank holds."""
        return tensor[..., self.inputs.start : self.inputs.stop]


def shards_of(linear: LinearBase, num_matrices: int) -> list[Shard]:
    """The shards of a layer of vLLM for the `num_matrices` matrices that the checkpoint has for it:
    one for each of its parts, or a single one with all parts."""
    rank, ranks = linear.tp_rank, linear.tp_size
    if isinstance(linear, RowParallelLinear):
        size = linear.input_size_per_partition
        columns = _part(rank, size)
        whole = (linear.output_size, linear.input_size)
        return [Shard(whole, (range(linear.output_size),), columns, adds_bias=rank == 0)]
    kept, inputs = _rows(linear, rank, ranks), range(linear.input_size)
    if num_matrices == len(kept):
        return [Shard((size, len(inputs)), (rows,), inputs) for size, rows in kept]
    assert num_matrices == 1
    begin, merged = 0, []
    for size, rows in kept:
        merged.append(range(begin + rows.start, begin + rows.stop))
        begin += size
    return [Shard((begin, len(inputs)), tuple(merged), inputs)]


def _rows(linear: LinearBase, rank: int, ranks: int) -> Sequence[tuple[int, range]]:
    """For each part of a layer that divides its outputs: its size, and the rows on this rank."""
    if not isinstance(linear, QKVParallelLinear):
        merged = isinstance(linear, MergedColumnParallelLinear)
        sizes = linear.output_sizes if merged else [linear.output_size]
        return [(size, _part(rank, size // ranks)) for size in sizes]
    # K/V heads are repeated if there are more ranks than heads.
    kv_rank, heads = rank // linear.num_kv_head_replicas, linear.total_num_kv_heads
    q, k, v = linear.head_size, linear.head_size, linear.v_head_size
    return [
        (linear.total_num_heads * q, _part(rank, linear.num_heads * q)),
        (heads * k, _part(kv_rank, linear.num_kv_heads * k)),
        (heads * v, _part(kv_rank, linear.num_kv_heads * v)),
    ]


def _part(number: int, size: int) -> range:
    return range(number * size, (number + 1) * size)
