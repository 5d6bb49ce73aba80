"""Where to cut a base model: the cutting rule, and cuts given by the user.

The rule takes, of the cuts that loop at least a third of the layers, the one whose untrained model
has the lowest loss at depth 2 (`untrained.py`). Without losses it is the profile alone: the paper
cuts "where the cosine similarity between layers changes most abruptly" and does not give an
algorithm, so it is least-squares change-point detection with two change points; three constants,
one each for encoder, reasoning block and decoder, are fitted to the profile of angular distances
between consecutive states (one value per layer).
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MIN_LAYERS = 3
LOOPED_SHARE = 3  # the rule loops at least 1/3 of the layers; with fewer, a pass refines little
LARGEST_SHARE = 4  # by the profile, an end gets at most 1/4 of the layers (published: 1/6)
NONE = "none"
RANGE = re.compile(r"(\d+)(?:\.\.(\d+))?")


@dataclass(frozen=True)
class Cut:
    """Splits `num_layers` layers into the first `encoder`, the last `decoder`, and those between.

    Raises `ValueError` if no layer is left for the reasoning block.
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
        """The layer indices of encoder, reasoning block and decoder, in this order."""
        layers, end = list(range(self.num_layers)), self.num_layers - self.decoder
        return {
            "encoder": layers[: self.encoder],
            "reasoning": layers[self.encoder : end],
            "decoder": layers[end:],
        }

    @property
    def loops_enough(self) -> bool:
        """Whether the rule may choose it by its loss."""
        return (self.num_layers - self.encoder - self.decoder) * LOOPED_SHARE >= self.num_layers

    @property
    def config_fields(self) -> dict[str, list[int]]:
        """The cut as fields of `LoopUSConfig`."""
        return {f"{part}_layer_indices": run for part, run in self.runs.items()}

    def __str__(self) -> str:
        return ", ".join(f"{part} {range_text(run)}" for part, run in self.runs.items())


# Cuts of the published checkpoints: last component of the base model's name -> cut.
PUBLISHED = {
    "tinyllama": Cut(22, 1, 1),
    "qwen3-1.7b": Cut(28, 2, 1),
    "qwen3-4b": Cut(36, 2, 1),
    "qwen3-8b": Cut(36, 6, 1),
    "phi-4": Cut(40, 6, 1),
}


def published_cut(base: str, num_layers: int) -> Cut | None:
    """The cut of the published checkpoint of this base model; None if there is none."""
    name = base.rstrip("/").rpartition("/")[2].lower()
    for known, cut in PUBLISHED.items():
        if re.match(rf"{re.escape(known)}($|[-_])", name) and cut.num_layers == num_layers:
            return cut
    return None


def range_text(run: Sequence[int]) -> str:
    """`0..1` for layers 0 and 1; `none` without layers."""
    return f"{run[0]}..{run[-1]}" if run else NONE


def parse_encoder(text: str, num_layers: int) -> int:
    """The number of encoder layers given as `0..1`, `0` or `none`. Raises `ValueError`."""
    first, last = _parse_range("encoder", text, num_layers)
    if first != 0:
        raise ValueError(f"encoder={text!r} must begin at layer 0, or be {NONE!r}")
    return last + 1


def parse_decoder(text: str, num_layers: int) -> int:
    """The number of decoder layers given as `26..27`, `27` or `none`. Raises `ValueError`."""
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
        raise ValueError(f"{field}={text!r} is not a range of layers; write it as 0..1 or {NONE}")
    first, last = int(match[1]), int(match[2] or match[1])
    if not first <= last < num_layers:
        raise ValueError(f"{field}={text!r} must be within the model's layers, 0..{num_layers - 1}")
    return first, last


@dataclass(frozen=True)
class ScoredCut:
    """A cut, and the share (0 to 1) of the profile's variance that its three parts explain.

    `losses`: of the untrained model at depths 1 and 2, in nats per token; None if not measured.
    """

    cut: Cut
    score: float
    losses: tuple[float, ...] | None = None


def rank_cuts(
    similarity: Sequence[float], encoder: int | None = None, decoder: int | None = None
) -> list[ScoredCut]:
    """All admissible cuts by the profile, best first.

    `similarity`: for each layer, the mean cosine similarity between its input and output. The rule
    compares the angles, because cosines near 1 hide differences. Unless given, `encoder` and
    `decoder` are at least one layer and at most a quarter of the layers. Of cuts with the same
    score, the one with more looped layers comes first. Raises `ValueError` for fewer than three
    layers.
    """
    num_layers = len(similarity)
    if num_layers < MIN_LAYERS:
        raise ValueError(
            f"num_hidden_layers={num_layers} is too few to cut; at least {MIN_LAYERS} are needed"
        )
    most = max(1, num_layers // LARGEST_SHARE)
    ends = range(1, most + 1)
    ranked = []
    for first in ends if encoder is None else [encoder]:
        for last in ends if decoder is None else [decoder]:
            if first + last >= num_layers:
                continue
            cut = Cut(num_layers, first, last)
            ranked.append(ScoredCut(cut, profile_score(similarity, cut)))
    if not ranked:
        raise ValueError(
            f"encoder={encoder} and decoder={decoder} leave no layer of {num_layers} for the "
            "reasoning block and the other part; give both, with none for an empty one"
        )
    return sorted(ranked, key=lambda c: (-round(c.score, 12), c.cut.encoder + c.cut.decoder))


def profile_score(similarity: Sequence[float], cut: Cut) -> float:
    """The score of any cut, from 0 to 1."""
    angles = [math.acos(min(1.0, max(-1.0, cosine))) / math.pi for cosine in similarity]
    total = _scatter(angles)
    unexplained = sum(_scatter([angles[layer] for layer in run]) for run in cut.runs.values())
    return 1 - unexplained / total if total > 0 else 0.0


def cuts_to_try(
    num_layers: int, encoder: int | None = None, decoder: int | None = None
) -> list[Cut]:
    """The cuts whose losses are measured: ends of one layer, a sixth, a quarter and a third of the
    layers, unless given. All loop at least a third of the layers, unless both ends are given."""
    ends = sorted({max(1, num_layers // share) for share in (num_layers, 6, 4, 3)})
    cuts = [
        Cut(num_layers, first, last)
        for first in (ends if encoder is None else [encoder])
        for last in (ends if decoder is None else [decoder])
        if first + last < num_layers
    ]
    return cuts if None not in (encoder, decoder) else [cut for cut in cuts if cut.loops_enough]


def rank_by_loss(
    similarity: Sequence[float],
    ranked: Sequence[ScoredCut],
    losses: Mapping[Cut, tuple[float, ...]],
) -> list[ScoredCut]:
    """The rule: measured cuts that loop enough by their loss at depth 2, then other measured cuts,
    then the rest of `ranked`.

    Of losses that agree to a hundredth, the cut with more looped layers comes first.
    """
    tried = [ScoredCut(cut, profile_score(similarity, cut), found) for cut, found in losses.items()]

    def order(scored: ScoredCut) -> tuple[bool, float, int]:
        assert scored.losses is not None
        ends = scored.cut.encoder + scored.cut.decoder
        return not scored.cut.loops_enough, round(scored.losses[-1], 2), ends

    return [*sorted(tried, key=order), *(one for one in ranked if one.cut not in losses)]


def _scatter(values: Sequence[float]) -> float:
    """The sum of squared distances from the mean."""
    if not values:
        return 0.0
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values)
