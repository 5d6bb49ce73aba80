"""Which `exit_threshold` suits a trained model: mean depth and loss of its exits at several."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from vllm_loopus.modeling.exit_rule import ExitTracker
from vllm_loopus.modeling.halting import HaltingRule

THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
DEPTH, LOSS = "threshold_depth", "threshold_loss"
TOLERANCE = 0.01  # nats that a suggestion may lose against the best threshold


class ThresholdSums:
    """Sums over n tokens of exit depth and loss, for each of `THRESHOLDS`; the rule is the model's.

    Empty for a rule that has no threshold on the confidence.
    """

    def __init__(self, rule: HaltingRule, count: int, device: torch.device) -> None:
        by_confidence = rule.limit_name == "exit_threshold"
        self.rules = [
            replace(rule, exit_threshold=threshold) for threshold in THRESHOLDS if by_confidence
        ]
        self.exits = [ExitTracker(rule, count, device) for rule in self.rules]
        self.sums = torch.zeros(2, len(self.rules), device=device)

    def add(self, depth: int, losses: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> None:
        """Adds the tokens that exit at `depth`, given their losses [n] there."""
        for index, (rule, exits) in enumerate(zip(self.rules, self.exits, strict=True)):
            now = exits.update(depth, rule.evidence(inputs))
            self.sums[0, index] += depth * now.sum()
            self.sums[1, index] += (losses * now).sum()

    def found(self) -> dict[str, torch.Tensor]:
        """The sums by name, one value for each threshold."""
        return {DEPTH: self.sums[0], LOSS: self.sums[1]} if self.rules else {}


def by_threshold(
    metrics: Mapping[str, float], prefix: str = "eval"
) -> dict[float, tuple[float, float]]:
    """Threshold -> mean exit depth and loss, from the metrics of an evaluation."""
    return {
        threshold: (
            metrics[f"{prefix}_{DEPTH}_{threshold}"],
            metrics[f"{prefix}_{LOSS}_{threshold}"],
        )
        for threshold in THRESHOLDS
        if f"{prefix}_{LOSS}_{threshold}" in metrics
    }


def suggestion(metrics: Mapping[str, float], max_loops: int) -> str | None:
    """A sentence that suggests a threshold; None if there are no metrics by threshold."""
    found = by_threshold(metrics)
    if not found:
        return None
    best = min(loss for _, loss in found.values())
    depth, loss, threshold = min(
        (depth, loss, threshold)
        for threshold, (depth, loss) in found.items()
        if loss <= best + TOLERANCE
    )
    return (
        f"Suggested exit_threshold: {threshold:g} (mean exit depth {depth:.2f} of {max_loops}, "
        f"held-out loss {loss:.3f}; the lowest at any threshold tried: {best:.3f})"
    )
