"""The exit criteria of the original code (`recpre/raven_modeling_minimal.py`). None is trained.

Latent criteria compare a state with the one a loop before. Output criteria compare the logits:
those of the coda and the LM head after every loop. All look at the position whose token is wanted;
the original's latent criteria average over all positions of a call, so that a prompt's first token
depends on how it was cut.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import log
from typing import Any, Literal

import torch

from vllm_loopus.modeling.exit_rule import ExitRule, Number

# Criterion -> threshold in Huginn's code, and in that of the retrofits.
CRITERIA: dict[str, tuple[float, float]] = {
    "none": (0.0, 0.0),
    "kl": (1e-3, 5e-4),
    "entropy-diff": (1e-3, 1e-3),
    "latent-diff": (0.03, 0.03),
    "cosine": (1e-3, 1e-3),
    "minp-kl": (1e-5, 1e-6),
    "argmax-stability": (5.0, 5.0),
}
LATENT = ("latent-diff", "cosine")
OUTPUT = ("kl", "entropy-diff", "minp-kl", "argmax-stability")
STABILITY = "argmax-stability"
LEAST_SHARE = 0.1  # of the likeliest token's probability, for `minp-kl`
FIRST_ENTROPY = 100.0


def default_threshold(criterion: str, retrofitted: bool) -> float:
    """The threshold in the original's code; 0 for an unknown criterion."""
    return CRITERIA.get(criterion, (0.0, 0.0))[retrofitted]


def reads_logits(criterion: str) -> bool:
    """Whether a criterion needs the logits after every loop."""
    return criterion in OUTPUT


def latent_evidence(criterion: str, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """The value [...] of a latent criterion for states [..., H], in float32.

    `cosine` from a state of zeros is NaN, which is below no threshold.
    """
    before, after = before.float(), after.float()
    size = torch.linalg.vector_norm(after, dim=-1)
    if criterion == "latent-diff":
        return torch.linalg.vector_norm(after - before, dim=-1) / size
    lengths = size * torch.linalg.vector_norm(before, dim=-1)
    return 1 - (before * after).sum(dim=-1) / lengths


def output_value(
    criterion: str, logits: torch.Tensor, carry: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The value [B] of an output criterion for logits [B, V], and the new carry [B, C]: what the
    next logits are compared with (`first_carry`)."""
    if criterion == STABILITY:
        likeliest = logits.argmax(dim=-1).float()
        count = torch.where(likeliest == carry[:, 0], carry[:, 1] + 1, 0.0)
        return count, torch.stack([likeliest, count], dim=1)
    now = torch.log_softmax(logits.float(), dim=-1)
    if criterion == "entropy-diff":
        share = now.exp()
        entropy = -(share * torch.log(share + 1e-10)).sum(dim=-1)
        return (entropy - carry[:, 0]).abs(), entropy[:, None]
    if criterion == "minp-kl":
        now = _levelled(now)
    # Rounding alone makes it negative.
    return (carry.exp() * (carry - now)).sum(dim=-1).clamp(min=0), now


def first_carry(criterion: str, vocab_size: int) -> tuple[float, ...]:
    """The carry before the first loop: log-probabilities of a uniform distribution, an entropy, or
    the likeliest token and for how many loops it has been that."""
    if criterion in ("kl", "minp-kl"):
        return (-log(vocab_size),) * vocab_size
    if criterion == "entropy-diff":
        return (FIRST_ENTROPY,)
    return (-1.0, 0.0) if criterion == STABILITY else ()


@dataclass(frozen=True)
class CriterionRule(ExitRule):
    """The `ExitRule`: exits at the first depth, from `min_loops` on, at which the value is below
    the threshold; for `argmax-stability` at or above it.

    The evidence is the value [B] of a criterion, or for an output criterion logits [B, V]: then the
    rule carries what they are compared with. The reference model gives values, the engine logits.
    """

    vocab_size: int
    cost: str = ""  # in words

    @classmethod
    def from_config(cls, config: Any) -> "CriterionRule":
        """`config`: a `RavenConfig`."""
        return cls(
            config.halting_strategy,
            config.exit_threshold,
            config.min_loops,
            config.max_loops,
            config.padded_vocab_size,
            config.cost_of_exits,
        )

    @property
    def values(self) -> tuple[str, ...]:  # type: ignore[override]
        return (LATENT[0] if self.strategy == "none" else self.strategy,)

    @cached_property
    def first_carry(self) -> tuple[float, ...]:
        return first_carry(self.strategy, self.vocab_size)

    @property
    def comparison(self) -> Literal[">", ">=", "<"]:
        return ">=" if self.strategy == STABILITY else "<"

    def checked_at(self, depth: Number) -> bool | torch.Tensor:
        return self.strategy != "none"

    def evidence(self, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return values[self.values[0]]

    def compared(
        self, depth: Number, evidence: torch.Tensor, carry: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if evidence.dim() == 1:
            return evidence, carry
        return output_value(self.strategy, evidence, carry)

    def predetermined(
        self, depth: int, *, exit_threshold: float, min_loops: int, max_loops: int
    ) -> bool | None:
        if depth >= max_loops:
            return True
        # The likeliest token is that of the loop before in at most `max_loops - 1` loops.
        stable = self.strategy == STABILITY
        never = exit_threshold > max_loops - 1 if stable else exit_threshold <= 0
        if self.strategy == "none" or never or min_loops >= max_loops:
            return False
        if stable:
            return None
        # The first depth that may exit is compared with the one before.
        first = min_loops - 1 if reads_logits(self.strategy) else min_loops
        return False if depth < first else None

    def __str__(self) -> str:
        if self.strategy == "none":
            return "none: every token makes all its loops"
        at = self.exit_threshold
        what = {
            "kl": f"when KL(loop before || this one) of the next token is < {at}",
            "entropy-diff": f"when the entropy of the next token changes by < {at}",
            "latent-diff": f"when a loop moves the state by < {at} of its length",
            "cosine": f"when a loop turns the state by 1 - cos < {at}",
            "minp-kl": f"when KL of the likely next tokens to the loop before is < {at}",
            STABILITY: f"when the likeliest next token is the same for {at} loops",
        }[self.strategy]
        return f"{self.strategy}: exits {what}" + (f"; {self.cost}" if self.cost else "")


def _levelled(log_probs: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [B, V] in which unlikely tokens have one over V, normalised again."""
    share = log_probs.exp()
    least = LEAST_SHARE * share.max(dim=-1, keepdim=True).values
    share = torch.where(share < least, 1 / share.shape[-1], share)
    return torch.log(share / share.sum(dim=-1, keepdim=True))
