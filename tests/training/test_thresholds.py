"""The suggested threshold is the one that costs least depth for the lowest loss."""

from dataclasses import replace

import torch

from vllm_loopus.modeling.halting import HaltingRule
from vllm_loopus.training.thresholds import THRESHOLDS, ThresholdSums, by_threshold, suggestion

RULE = HaltingRule(
    strategy="threshold",
    exit_threshold=0.6,
    exit_interval=1,
    min_loops=1,
    max_loops=2,
    convergence_epsilon=1e-3,
)


def test_sums_follow_the_models_rule() -> None:
    sums = ThresholdSums(RULE, 3, torch.device("cpu"))
    confidences = torch.tensor([[0.35, 0.75, 0.05], [0.9, 0.9, 0.9]])
    losses = torch.tensor([[3.0, 2.0, 1.0], [30.0, 20.0, 10.0]])
    for depth in (1, 2):
        inputs = {"confidence": confidences[depth - 1], "step_length": torch.ones(3)}
        sums.add(depth, losses[depth - 1], inputs)
    depths, totals = sums.found().values()
    # By hand: at 0.1 the last goes on, at 0.5 the first too, at 0.9 all.
    expected = {0.1: (4, 3 + 2 + 10), 0.5: (5, 30 + 2 + 10), 0.9: (6, 60)}
    for threshold, (depth, total) in expected.items():
        index = THRESHOLDS.index(threshold)
        assert (depths[index], totals[index]) == (depth, total)


def metrics(losses: dict[float, tuple[float, float]]) -> dict[str, float]:
    found = {}
    for threshold, (depth, loss) in losses.items():
        found[f"eval_threshold_depth_{threshold}"] = depth
        found[f"eval_threshold_loss_{threshold}"] = loss
    return found


def test_the_least_depth_within_a_hundredth() -> None:
    measured = {0.3: (1.5, 3.2), 0.5: (2.0, 3.008), 0.7: (3.0, 3.0), 0.9: (4.0, 3.1)}
    assert by_threshold(metrics(measured)) == measured
    told = suggestion(metrics(measured), 4)
    assert told is not None and told.startswith("Suggested exit_threshold: 0.5 ")
    assert "mean exit depth 2.00 of 4, held-out loss 3.008" in told
    assert suggestion({"eval_loss": 3.0}, 0) is None


def test_convergence_has_no_threshold() -> None:
    rule = replace(RULE, strategy="convergence")
    assert ThresholdSums(rule, 3, torch.device("cpu")).found() == {}
