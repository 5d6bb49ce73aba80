"""Exit depths of tokens and their reasons, computed from the values at every depth."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vllm_loopus.modeling.exit_rule import new_carry
from vllm_loopus.modeling.halting import HaltingRule

BUDGET, MIN_LOOPS = "budget", "min_loops"
CERTAIN = 1e-4  # with a smaller margin, rounding may decide


@dataclass(frozen=True)
class Exits:
    """Exit depths, reasons and margins of n tokens.

    - Reason: the halting strategy, `min_loops` (the criterion held at a depth below `min_loops`) or
      `budget` (the criterion did not hold at the last depth).
    - Margin: the least distance of a value that the rule compared from its limit.
    """

    depths: list[int]
    reasons: list[str]
    margins: list[float]


def exits(rule: HaltingRule, confidence: torch.Tensor, step_length: torch.Tensor) -> Exits:
    """Applies `rule` to the confidence `q` and the step length at depths 1..N, [N, n] each.

    N must be `rule.max_loops`.
    """
    num_tokens = confidence.shape[1]
    depths, reasons = [0] * num_tokens, [""] * num_tokens
    margins = [math.inf] * num_tokens
    held_back = [False] * num_tokens
    carry = new_carry(rule, num_tokens)
    for depth, (q, length) in enumerate(zip(confidence, step_length, strict=True), 1):
        evidence = rule.evidence(q, length)
        satisfied, _ = rule.satisfied(depth, evidence, carry)
        exiting, carry = rule.exits(depth, evidence, carry)
        distance = _margin(rule, depth, evidence, carry)
        for token in range(num_tokens):
            if depths[token]:
                continue
            if rule.min_loops <= depth < rule.max_loops:
                margins[token] = min(margins[token], float(distance[token]))
            if exiting[token]:
                depths[token] = depth
                if not satisfied[token]:
                    reasons[token] = BUDGET
                else:
                    reasons[token] = MIN_LOOPS if held_back[token] else rule.strategy
            # `min_loops` no longer holds back a token that could have exited here and did not.
            free = bool(depth >= rule.min_loops) and _evaluated(rule, depth)
            held_back[token] = (held_back[token] or bool(satisfied[token])) and not free
    return Exits(depths, reasons, margins)


def rule_of(document: Mapping[str, Any], **changed: Any) -> HaltingRule:
    """The halting rule of a JSON trace, with some fields `changed`."""
    return HaltingRule(**{**document["halting"], **changed})


def exits_of(trace: Mapping[str, Any], rule: HaltingRule) -> Exits:
    """The exits of the tokens of a JSON trace by `rule`."""
    columns = {
        name: torch.tensor(
            [
                [math.nan if depth[name] is None else depth[name] for depth in token["depths"]]
                for token in trace["tokens"]
            ],
            dtype=torch.float32,
        ).T
        for name in ("confidence", "step_length")
    }
    return exits(rule, columns["confidence"], columns["step_length"])


def _evaluated(rule: HaltingRule, depth: int) -> bool:
    return rule.strategy == "convergence" or depth % rule.exit_interval == 0


def _margin(
    rule: HaltingRule, depth: int, evidence: torch.Tensor, carry: torch.Tensor
) -> torch.Tensor:
    """The distance [n] between the value that the rule compares at `depth` and its limit."""
    if not _evaluated(rule, depth):
        return torch.full_like(evidence, math.inf)
    if rule.strategy == "convergence":
        return (evidence - rule.convergence_epsilon).abs()
    compared = 1 - carry[:, 0] if rule.strategy == "cdf" else evidence
    return (compared - rule.exit_threshold).abs()
