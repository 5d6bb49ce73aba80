"""Small host-device copies: asynchronous, except waiting for what comes back.

A plain `.to(device)` from pageable memory waits for everything queued on the device. A pass sends
its positions, slots and tables without waiting, in one copy, and its verdict comes back while the
host does something else.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.utils.torch_utils import async_tensor_h2d

ALIGNMENT = 16  # bytes: where a packed array may begin


def to_device(values: NDArray[Any] | Sequence[float], device: torch.device) -> torch.Tensor:
    """A copy of `values` on the device. On a CPU it shares the memory of an array."""
    array = np.ascontiguousarray(values)
    if array.dtype == np.float64:
        array = array.astype(np.float32)
    if device.type == "cpu":
        return torch.from_numpy(array)
    return async_tensor_h2d(array, device=device)


def all_to_device(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[torch.Tensor]:
    """`to_device` of several arrays in one copy."""
    if device.type == "cpu" or len(arrays) < 2:
        return [to_device(array, device) for array in arrays]
    ends, end = [], 0
    for array in arrays:
        begin = -(-end // ALIGNMENT) * ALIGNMENT
        end = begin + array.nbytes
        ends.append((begin, end))
    packed = np.empty(end, dtype=np.uint8)
    for array, (begin, end) in zip(arrays, ends, strict=True):
        packed[begin:end] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    sent = async_tensor_h2d(packed, device=device)
    return [
        sent[begin:end].view(torch.from_numpy(np.empty(0, array.dtype)).dtype).view(array.shape)
        for array, (begin, end) in zip(arrays, ends, strict=True)
    ]


class HostCopy:
    """Values on their way to the host."""

    def __init__(self, values: torch.Tensor) -> None:
        """Queues the copy behind what has been launched so far."""
        self._done: torch.cuda.Event | None = None
        if values.device.type != "cuda":
            self._values = values.cpu()
            return
        self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        self._values.copy_(values, non_blocking=True)
        self._done = torch.cuda.Event()
        self._done.record()

    def wait(self) -> NDArray[Any]:
        """The values, once the device has computed them."""
        if self._done is not None:
            self._done.synchronize()
        result: NDArray[Any] = self._values.numpy()
        return result
