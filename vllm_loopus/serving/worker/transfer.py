"""Small host-device copies: asynchronous, except reading the verdict.

A plain `.to(device)` from pageable memory waits for everything queued on the device. A pass sends
its positions, slots and tables without waiting, and reads its verdict back once (`to_host`).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.utils.torch_utils import async_tensor_h2d


def to_device(values: NDArray[Any] | Sequence[float], device: torch.device) -> torch.Tensor:
    """A copy of `values` on the device. On a CPU it shares the memory of an array."""
    array = np.ascontiguousarray(values)
    if array.dtype == np.float64:
        array = array.astype(np.float32)
    if device.type == "cpu":
        return torch.from_numpy(array)
    return async_tensor_h2d(array, device=device)


def to_host(values: torch.Tensor) -> NDArray[Any]:
    """The values on the host. Waits until the device has computed them."""
    if values.device.type != "cuda":
        return values.cpu().numpy()
    result = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    result.copy_(values, non_blocking=True)
    done = torch.cuda.Event()
    done.record()
    done.synchronize()
    return result.numpy()
