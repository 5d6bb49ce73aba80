"""Streaming statistics of how hidden states change from layer to layer, over a text sample.

The paper calls this staged representation dynamics: states change abruptly in the first layers,
slowly in the middle, and towards the vocabulary in the last layers. State `l` is the input of layer
`l` (0-based); state L is the output of the last layer, before the final norm. The first position of
each sequence is excluded, because attention sinks give it a norm of another order of magnitude.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from tqdm import tqdm

from vllm_loopus.recast.base import HEAD, Base
from vllm_loopus.recast.hidden_states import HiddenStates
from vllm_loopus.recast.tensors import TensorSource

STATE_BYTES = 64 * 2**20  # maximum size of the states of a batch, unless one sequence needs more
SLICE = 128  # tokens per update of the statistics
VOCABULARY_SLICE = 8192  # tokens of the vocabulary for which logits exist at a time
LENS_POSITIONS = 64  # evenly spaced positions of each batch for the logit lens


@dataclass(frozen=True)
class Representation:
    """Means over the tokens of the sample. L layers have L + 1 states.

    - `cosine` [L+1][L+1]: cosine similarity of each pair of states.
    - `norm` [L+1]: Euclidean norm. `step` [L]: norm of a layer update over that of its input.
    - `angle_to_final` [L+1]: angle to the last state, in degrees.
    - `lens_entropy`, `lens_kl` [L+1], in nats: entropy of the distribution p that final norm and LM
      head give for a state, and the divergence KL(p_final || p).
    """

    num_tokens: int
    lens_tokens: int
    cosine: list[list[float]]
    norm: list[float]
    step: list[float]
    angle_to_final: list[float]
    lens_entropy: list[float]
    lens_kl: list[float]

    @property
    def similarity(self) -> list[float]:
        """Cosine similarity [L] between the input and the output of each layer."""
        return [self.cosine[layer][layer + 1] for layer in range(len(self.cosine) - 1)]


@dataclass
class Sums:
    """Sums over tokens, from which the means are computed."""

    num_states: int
    tokens: int = 0
    lens_tokens: int = 0
    cosine: torch.Tensor = field(init=False)
    rows: dict[str, torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        n = self.num_states
        self.cosine = torch.zeros(n, n, dtype=torch.float64)
        names = ("norm", "step", "angle", "entropy", "kl")
        self.rows = {name: torch.zeros(n, dtype=torch.float64) for name in names}

    def add_states(self, states: torch.Tensor) -> None:
        """Adds states [L+1, T, H] in float32."""
        norms = states.norm(dim=-1)
        self.rows["norm"] += norms.sum(-1).cpu().double()
        steps = (states[1:] - states[:-1]).norm(dim=-1) / norms[:-1].clamp(min=1e-12)
        self.rows["step"][:-1] += steps.sum(-1).cpu().double()
        directions = states / norms.clamp(min=1e-12).unsqueeze(-1)
        to_final = (directions * directions[-1]).sum(-1).clamp(-1, 1)
        self.rows["angle"] += torch.rad2deg(torch.acos(to_final)).sum(-1).cpu().double()
        flat = directions.flatten(1)
        self.cosine += (flat @ flat.T).cpu().double()
        self.tokens += states.shape[1]

    def add_lens(self, entropy: torch.Tensor, divergence: torch.Tensor) -> None:
        """Adds entropy and KL [L+1, T] of the logit lens."""
        self.rows["entropy"] += entropy.sum(-1).cpu().double()
        self.rows["kl"] += divergence.sum(-1).cpu().double()
        self.lens_tokens += entropy.shape[1]

    def means(self) -> Representation:
        """The means. Raises `ValueError` if a state was not finite."""
        lens = max(1, self.lens_tokens)
        mean = {
            name: (total / (lens if name in ("entropy", "kl") else self.tokens)).tolist()
            for name, total in self.rows.items()
        }
        cosine = self.cosine / self.tokens
        finite = torch.isfinite(cosine).all() and all(
            math.isfinite(value) for values in mean.values() for value in values
        )
        if not finite:
            raise ValueError(
                "the model's hidden states or logits are not finite; check its weights, or try "
                "--dtype float32 against overflow"
            )
        return Representation(
            num_tokens=self.tokens,
            lens_tokens=self.lens_tokens,
            cosine=cosine.clamp(-1, 1).tolist(),
            norm=mean["norm"],
            step=mean["step"][:-1],
            angle_to_final=mean["angle"],
            lens_entropy=mean["entropy"],
            lens_kl=mean["kl"],
        )


def lens(
    states: torch.Tensor, norm: nn.Module, head: TensorSource, soft_cap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Entropy and KL to the last state's distribution for states [L+1, T, H]: [L+1, T] each.

    Processes the LM head [V, H] in slices with running maxima, so that the logits of the whole
    vocabulary are never in memory.
    """
    rows = norm(states).float()
    shape = rows.shape[:-1]
    peak = torch.full(shape, -torch.inf, device=rows.device)
    total, weighted, crossed = (torch.zeros(shape, device=rows.device) for _ in range(3))
    for logits in logit_slices(rows, head.load(), soft_cap):
        new_peak = torch.maximum(peak, logits.amax(-1))
        rescale = torch.exp(peak - new_peak)
        share = torch.exp(logits - new_peak.unsqueeze(-1))
        total = total * rescale + share.sum(-1)
        weighted = weighted * rescale + (share * logits).sum(-1)
        # sum of exp(final logit) * this state's logit: the cross term of the divergence
        crossed = crossed * rescale[-1] + (share[-1] * logits).sum(-1)
        peak = new_peak
    log_total = peak + total.log()
    entropy = log_total - weighted / total
    divergence = (weighted[-1] - crossed) / total[-1] - log_total[-1] + log_total
    return entropy, divergence.clamp(min=0)


def logit_slices(
    rows: torch.Tensor, head: torch.Tensor, soft_cap: float | None
) -> Iterator[torch.Tensor]:
    """The logits of normed states [..., H] in float32 with the LM head [V, H], by slices of the
    vocabulary."""
    for part in head.split(VOCABULARY_SLICE):
        logits = rows @ part.to(rows.device, torch.float32).T
        yield logits if soft_cap is None else torch.tanh(logits / soft_cap) * soft_cap


@torch.inference_mode()
def analyse(
    base: Base,
    sequences: Iterable[torch.Tensor],
    model: HiddenStates,
    *,
    expected_tokens: int | None = None,
) -> Representation:
    """Computes the statistics of `base` over token sequences [T], and shows a progress bar.

    Raises `ValueError` if a state is not finite.
    """
    sums = Sums(base.num_layers + 1)
    soft_cap = getattr(base.config, "final_logit_softcapping", None)
    with tqdm(total=expected_tokens, unit="tok", desc="analyse") as progress:
        for batch in _batches(sequences, model.bytes_per_token):
            states = model.states(batch)[:, :, 1:].flatten(1, 2)
            for part in states.split(SLICE, dim=1):
                sums.add_states(part)
            chosen = torch.linspace(0, states.shape[1] - 1, LENS_POSITIONS).long().unique()
            looked_at = states[:, chosen.to(states.device)]
            sums.add_lens(*lens(looked_at, model.norm, base.tensors[HEAD], soft_cap))
            progress.update(batch.numel())
    return sums.means()


def _batches(sequences: Iterable[torch.Tensor], bytes_per_token: int) -> Iterable[torch.Tensor]:
    """Stacks sequences of equal length into batches [B, T] of at most `STATE_BYTES` of states."""
    waiting: list[torch.Tensor] = []
    for sequence in sequences:
        size = (len(waiting) + 1) * len(sequence) * bytes_per_token
        if waiting and (len(sequence) != len(waiting[0]) or size > STATE_BYTES):
            yield torch.stack(waiting)
            waiting = []
        waiting.append(sequence)
    if waiting:
        yield torch.stack(waiting)
