"""The first state of a recurrence, which is drawn and not computed.

The original draws it anew in every call. Here it is a pure function of the position, and for
`noise` of a seed, so that a prefix found in the cache, a preemption or the batch changes nothing.
"""

from math import erf, sqrt
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

NOISE, ZEROS = "noise", "zeros"
TABLE = "s0"  # the tensor of a table's file, [positions, H]
CUT = 3.0  # standard deviations at which the noise ends
_WORD = 0xFFFFFFFF


def noise(seeds: torch.Tensor, positions: torch.Tensor, size: int, std: float) -> torch.Tensor:
    """Truncated normal noise [T, size] in float32, cut at three times `std`: that of `positions`
    [T] with `seeds` [T], both int64. Equal on all devices up to rounding of the last step."""
    low = _mixed((seeds & _WORD) + 0x9E3779B9)
    high = _mixed(((seeds >> 32) & _WORD) + low)
    first = _mixed(high ^ _mixed(positions + 0x7F4A7C15))
    second = _mixed(first + 0x6A09E667)
    channels = torch.arange(1, size + 1, device=seeds.device) * 0x9E3779B1
    bits = _mixed(_mixed(channels ^ first[:, None]) + second[:, None])
    share = ((bits >> 8).float() + 0.5) * 2.0**-24
    inside = erf(CUT / sqrt(2))
    drawn = torch.erfinv((2 * share - 1) * inside) * (sqrt(2) * std)
    return drawn.clamp(-CUT * std, CUT * std)


def _mixed(words: torch.Tensor) -> torch.Tensor:
    """A bijection of 32-bit words, in int64, in which each bit depends on all (as in the finaliser
    of MurmurHash3). Of sums and products that are longer, the lowest 32 bits count."""
    words = words & _WORD
    words = words ^ (words >> 16)
    words = (words * 0x85EBCA6B) & _WORD
    words = words ^ (words >> 13)
    words = (words * 0xC2B2AE35) & _WORD
    return words ^ (words >> 16)


def signed(seed: int) -> int:
    """A seed as an int64, by its lowest 64 bits."""
    return (seed + 2**63) % 2**64 - 2**63


def load_table(file: str, size: int) -> torch.Tensor:
    """The first states [positions, size] in a file, in float32.

    Raises `ValueError` for a file that is none, or does not fit states of `size` numbers.
    """
    told = f"initial_state={file!r}"
    fix = (
        f"give {ZEROS!r}, {NOISE!r} or a safetensors file with a tensor {TABLE!r} of numbers, "
        f"[positions, {size}]"
    )
    if not Path(file).is_file():
        raise ValueError(
            f"{told} is neither {ZEROS!r} nor {NOISE!r}, and no such file exists; {fix}"
        )
    try:
        with safe_open(file, framework="pt") as tensors:
            if TABLE not in tensors.keys():  # noqa: SIM118  (no mapping)
                raise ValueError(f"{told} has no tensor {TABLE!r}; {fix}")
            table: torch.Tensor = tensors.get_tensor(TABLE)
    except SafetensorError as error:
        raise ValueError(f"{told} cannot be read ({error}); {fix}") from error
    if table.dim() != 2 or table.shape[1] != size or not len(table):
        raise ValueError(f"{told} has a tensor {TABLE!r} of shape {list(table.shape)}; {fix}")
    if not table.is_floating_point() or not torch.isfinite(table).all():
        raise ValueError(f"{told} has a tensor {TABLE!r} with NaN, infinity or integers; {fix}")
    return table.float()
