"""Where to cut a base model: the rule that finds a cut, and cuts given by hand.

The paper cuts "where the cosine similarity between layers changes most abruptly" and gives no
algorithm. The rule here is least-squares change-point detection with two change points: the
profile of angular distances between consecutive states (one a layer) is explained as well as
possible by three constants, one for encoder, reasoning block and decoder.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

LEAST_LAYERS = 3
LARGEST_SHARE = 4  # encoder and decoder take at most one layer in four each (published: one in six)
NONE = "none"
RANGE = re.compile(r"(\d+)(?:\.\.(\d+))?")


@dataclass(frozen=True)
class Cut:
    """The first `encoder` layers, the last `decoder` layers, and those between, of `num_layers`.

    Raises `ValueError` when no layer is left to loop.
    """

    num_layers: int
    encoder: int
    decoder: int

    def __post_init__(self) -> None:
        if min(self.encoder, self.decoder) < 0 or self.encoder + self.decoder >= self.num_layers:
            raise ValueError(
                f"encoder={self.encoder} and decoder={self.decoder} leave no layer of "
                f"{self.num_layers} for the reasoning block; lower one of them"
            )

    @property
    def runs(self) -> dict[str, list[int]]:
        """Layer indices of the base by block, in order."""
        layers, end = list(range(self.num_layers)), self.num_layers - self.decoder
        return {
            "encoder": layers[: self.encoder],
            "reasoning": layers[self.encoder : end],
            "decoder": layers[end:],
        }

    @property
    def config_fields(self) -> dict[str, list[int]]:
        """The same as fields of `LoopUSConfig`."""
        return {f"{block}_layer_indices": run for block, run in self.runs.items()}

    def __str__(self) -> str:
        return ", ".join(f"{block} {range_text(run)}" for block, run in self.runs.items())


# Cuts of the published checkpoints: last part of the base's name -> cut.
PUBLISHED = {
    "tinyllama": Cut(22, 1, 1),
    "qwen3-1.7b": Cut(28, 2, 1),
    "qwen3-4b": Cut(36, 2, 1),
    "qwen3-8b": Cut(36, 6, 1),
    "phi-4": Cut(40, 6, 1),
}


def published_cut(base: str, num_layers: int) -> Cut | None:
    """The cut of the published checkpoint of this base, if there is one."""
    name = base.rstrip("/").rpartition("/")[2].lower()
    for known, cut in PUBLISHED.items():
        if re.match(rf"{re.escape(known)}($|[-_])", name) and cut.num_layers == num_layers:
            return cut
    return None


def range_text(run: Sequence[int]) -> str:
    """`0..1` for layers 0 and 1; `none` for no layer."""
    return f"{run[0]}..{run[-1]}" if run else NONE


def parse_encoder(text: str, num_layers: int) -> int:
    """Layers of an encoder given as `0..1`, `0` or `none`. Raises `ValueError`."""
    first, last = _parse_range("encoder", text, num_layers)
    if first != 0:
        raise ValueError(f"encoder={text!r} must begin at layer 0, or be {NONE!r}")
    return last + 1


def parse_decoder(text: str, num_layers: int) -> int:
    """Layers of a decoder given as `26..27`, `27` or `none`. Raises `ValueError`."""
    if text.strip() == NONE:
        return 0
    first, last = _parse_range("decoder", text, num_layers)
    if last != num_layers - 1:
        raise ValueError(
            f"decoder={text!r} must end at the last layer, {num_layers - 1}, or be {NONE!r}"
        )
    return last + 1 - first


def _parse_range(field: str, text: str, num_layers: int) -> tuple[int, int]:
    if text.strip() == NONE:
        return 0, -1
    match = RANGE.fullmatch(text.strip())
    if not match:
        raise ValueError(f"{field}={text!r} is no range of layers; write it as 0..1 or {NONE}")
    first, last = int(match[1]), int(match[2] or match[1])
    if not first <= last < num_layers:
        raise ValueError(
            f"{field}={text!r} must lie within the model's layers, 0..{num_layers - 1}"
        )
    return first, last


@dataclass(frozen=True)
class ScoredCut:
    """`score`: the share of the profile's variance that the three blocks explain, 0 to 1."""

    cut: Cut
    score: float


def rank_cuts(
    similarity: Sequence[float], encoder: int | None = None, decoder: int | None = None
) -> list[ScoredCut]:
    """All admissible cuts, best first.

    `similarity` is the mean cosine similarity between a layer's input and output, one a layer; its
    angle is what is compared, because cosines near 1 hide differences. Encoder and decoder hold at
    least one layer and at most a quarter of them, unless given. Of equal cuts the one that loops
    more layers comes first. Raises `ValueError` for fewer than three layers.
    """
    num_layers = len(similarity)
    if num_layers < LEAST_LAYERS:
        raise ValueError(
            f"num_hidden_layers={num_layers} is too few to cut; at least {LEAST_LAYERS} are needed"
        )
    angles = [math.acos(min(1.0, max(-1.0, cosine))) / math.pi for cosine in similarity]
    most = max(1, num_layers // LARGEST_SHARE)
    ends = range(1, most + 1)
    total = _scatter(angles)
    ranked = []
    for first in ends if encoder is None else [encoder]:
        for last in ends if decoder is None else [decoder]:
            if first + last >= num_layers:
                continue
            blocks = angles[:first], angles[first : num_layers - last], angles[num_layers - last :]
            left = sum(_scatter(block) for block in blocks)
            score = 1 - left / total if total > 0 else 0.0
            ranked.append(ScoredCut(Cut(num_layers, first, last), score))
    if not ranked:
        raise ValueError(
            f"encoder={encoder} and decoder={decoder} leave no layer of {num_layers} for the "
            "reasoning block and the other end; give both ends, none for an empty one"
        )
    return sorted(ranked, key=lambda c: (-round(c.score, 12), c.cut.encoder + c.cut.decoder))


def _scatter(values: Sequence[float]) -> float:
    """Sum of squared distances to the mean."""
    if not values:
        return 0.0
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values)
