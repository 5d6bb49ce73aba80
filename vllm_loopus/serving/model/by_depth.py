"""Weights of a row's own depth in a pass that rows of all depths share: LoRA, biases and norms.

vLLM's punica kernels do the same for adapters of requests, but their CPU form copies a pair of
matrices for every row, and their GPU form takes half precision only. There are few depths here, so
on a CPU rows are brought into the order of their depths and every depth is one product; on a GPU,
where the host does not know the depths, one product takes the factors of all depths and what is not
a row's own is set to zero. Nothing waits for the device and nothing depends on the number of
sequences, so a pass can be captured.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.layernorm import GemmaRMSNorm
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase

from vllm_loopus.serving.model.shards import Shard


@dataclass(frozen=True)
class RowsByDepth:
    """The depths of the rows of a pass. Depths count from 0 here, as indices of weights.

    - `index` [T]: the depth of each row.
    - `only`: the depth of all rows, if it is known to be one.
    - `order` [T], `counts` [D]: the rows in the order of their depths, and how many have each; None
      if the host does not know them.
    """

    index: torch.Tensor
    only: int | None = None
    order: torch.Tensor | None = None
    counts: Sequence[int] = ()

    @classmethod
    def of(cls, depth: torch.Tensor) -> "RowsByDepth":
        """From depths [T] that count from 1; 0 in rows that only fill a pass up."""
        index = (depth.long() - 1).clamp(min=0)
        if index.device.type != "cpu" or not len(index):
            return cls(index)
        counts = torch.bincount(index).tolist()
        present = [number for number, rows in enumerate(counts) if rows]
        if len(present) == 1:
            return cls(index, only=present[0])
        return cls(index, order=torch.argsort(index, stable=True), counts=counts)


class Depths:
    """The rows of the pass in progress, for the layers that need them."""

    def __init__(self) -> None:
        self.rows = RowsByDepth(torch.zeros(0, dtype=torch.int64), only=0)

    def select(self, depth: torch.Tensor) -> None:
        """Says which rows the next layers are called with: depths [T] from 1."""
        self.rows = RowsByDepth.of(depth)


class NormByDepth(nn.Module):
    """A norm of vLLM with a weight for each depth [D, H]."""

    def __init__(self, norm: nn.Module, num_depths: int, depths: Depths) -> None:
        super().__init__()
        own = norm.weight
        assert isinstance(own, torch.Tensor)
        self._depths = depths
        self._centred = isinstance(norm, GemmaRMSNorm)  # scales by 1 + weight
        self.weight = nn.Parameter(own.new_empty(num_depths, *own.shape), requires_grad=False)
        # The weight that changes nothing. It is not a parameter: no checkpoint has it.
        del norm.weight
        self._neutral = torch.zeros_like(own) if self._centred else torch.ones_like(own)
        norm.register_buffer("weight", self._neutral, persistent=False)
        self.norm = norm

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        """[T, H], or heads [T, N, H], normed; with a residual [T, H] to add first, both."""
        rows, given = self._depths.rows, () if residual is None else (residual,)
        self.norm.weight = self._neutral.to(x.device)
        normed = self.norm(x, *given)
        if residual is None:
            return self._scaled(normed, rows)
        return self._scaled(normed[0], rows), normed[1]

    def _scaled(self, x: torch.Tensor, rows: RowsByDepth) -> torch.Tensor:
        scale = self.weight.index_select(0, rows.index)
        if x.dim() > 2:
            scale = scale.unsqueeze(1)
        if self._centred:
            return (x * (1 + scale.float())).to(x.dtype)
        return x * scale

    def load(self, depth: int, tensor: torch.Tensor) -> None:
        """Sets the weight [H] of a depth."""
        self.weight.data[depth].copy_(tensor)


class LoRAByDepth(nn.Module):
    """LoRA and bias of each depth for a linear layer of vLLM, on this rank.

    A merged layer has a LoRA for each of its `shards`, which fill different columns of the output.
    `lora_a` [D, R, in], R ranks in the order of the shards; `lora_b.N` [D, r, out of the shard].
    """

    def __init__(
        self,
        linear: LinearBase,
        shards: Sequence[Shard],
        ranks: Sequence[int],
        num_depths: int,
        depths: Depths,
    ) -> None:
        """`ranks`: of the LoRA of each shard; 0 for none."""
        super().__init__()
        self._depths, self._shards = depths, shards
        inputs = len(shards[0].inputs)
        self.bias: nn.Parameter | None = None
        if linear.bias is not None:
            outputs = sum(shard.num_outputs for shard in shards)
            self.bias = _parameter(num_depths, outputs)
            linear.register_parameter("bias", None)
        self._places: list[tuple[slice, slice]] = []  # ranks and output columns of each shard
        rank = column = 0
        for shard, own in zip(shards, ranks, strict=True):
            columns = slice(column, column + shard.num_outputs)
            self._places.append((slice(rank, rank + own), columns))
            rank, column = rank + own, column + shard.num_outputs
        self.lora_a = _parameter(num_depths, rank, inputs) if rank else None
        self.lora_b = nn.ParameterList(
            _parameter(num_depths, own, shard.num_outputs)
            for shard, own in zip(shards, ranks, strict=True)
            if rank
        )

    def load(self, depth: int, shard: int, kind: str, tensor: torch.Tensor) -> None:
        """Sets `lora_A` [r, in], `lora_B` [out, r] or `bias` [out] of a depth from the tensor of a
        whole checkpoint."""
        part, (ranks, columns) = self._shards[shard], self._places[shard]
        if kind == "lora_A":
            assert self.lora_a is not None
            self.lora_a.data[depth, ranks].copy_(part.inputs_of(tensor))
        elif kind == "lora_B":
            self.lora_b[shard].data[depth].copy_(part.outputs_of(tensor).T)
        elif self.bias is not None:
            # Ranks that add up their outputs add the bias once.
            kept = part.outputs_of(tensor) * part.adds_bias
            self.bias.data[depth, columns].copy_(kept)

    def add(self, output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Adds the LoRA of inputs [T, in], and the bias, to outputs [T, out], in place."""
        rows = self._depths.rows
        if self.bias is not None:
            output += (
                self.bias[rows.only]
                if rows.only is not None
                else self.bias.index_select(0, rows.index)
            )
        if self.lora_a is None:
            return output
        if rows.only is not None:
            self._add_at(rows.only, output, x)
        elif rows.order is not None:
            ordered = x.index_select(0, rows.order)
            added = output.new_zeros(output.shape)
            start = 0
            for depth, count in enumerate(rows.counts):
                if count:
                    part = slice(start, start + count)
                    self._add_at(depth, added[part], ordered[part])
                start += count
            output.index_add_(0, rows.order, added)
        else:
            self._add_masked(rows.index, output, x)
        return output

    def _add_at(self, depth: int, output: torch.Tensor, x: torch.Tensor) -> None:
        assert self.lora_a is not None
        shrunk = x @ self.lora_a[depth].T
        for (ranks, columns), b in zip(self._places, self.lora_b, strict=True):
            output[:, columns].addmm_(shrunk[:, ranks], b[depth])

    def _add_masked(self, index: torch.Tensor, output: torch.Tensor, x: torch.Tensor) -> None:
        assert self.lora_a is not None
        num_depths = len(self.lora_a)
        shrunk = (x @ self.lora_a.flatten(0, 1).T).unflatten(1, (num_depths, -1))
        every = torch.arange(num_depths, device=index.device)
        shrunk *= (index[:, None] == every)[:, :, None]
        for (ranks, columns), b in zip(self._places, self.lora_b, strict=True):
            output[:, columns].addmm_(shrunk[:, :, ranks].flatten(1), b.flatten(0, 1))


class LinearByDepth(LinearMethodBase):
    """vLLM's method of a linear layer, and what a depth adds to it."""

    def __init__(self, method: Any, added: LoRAByDepth) -> None:
        self._method, self._added = method, added

    def __getattr__(self, name: str) -> Any:
        return getattr(self._method, name)

    def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        self._method.create_weights(layer, *args, **kwargs)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self._method.process_weights_after_loading(layer)

    def apply(
        self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self._added.add(self._method.apply(layer, x, bias), x)


def _parameter(*shape: int) -> nn.Parameter:
    """In the model's dtype and on its device, the default ones while a model is built."""
    return nn.Parameter(torch.empty(shape), requires_grad=False)
