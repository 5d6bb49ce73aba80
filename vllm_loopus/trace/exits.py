"""Exit depths of tokens and their reasons, computed from the values at every depth."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_loopus.architectures import ARCHITECTURES
from vllm_loopus.architectures.loopus import LOOPUS
from vllm_loopus.modeling.exit_rule import ExitRule, new_carry

BUDGET, MIN_LOOPS = "budget", "min_loops"
CERTAIN = 1e-4  # with a smaller margin, rounding may decide


@dataclass(frozen=True)
class Exits:
    """Exit depths, reasons and margins of n tokens.

    - Reason: the halting strategy, `min_loops` (the criterion held at a depth below `min_loops`) or
      `budget` (the criterion did not hold at the last depth).
    - Margin: the least distance of a value that the rule compared from its limit.
    - Compared: what the rule compared with its limit at every depth, [N, n].
    """

    depths: list[int]
    reasons: list[str]
    margins: list[float]
    compared: torch.Tensor = field(compare=False)


def exits(rule: ExitRule, values: Mapping[str, torch.Tensor]) -> Exits:
    """Applies `rule` to what it may read at depths 1..N, [N, n] each. N must be `rule.max_loops`.

    The limits of `rule` are numbers, not tensors.
    """
    num_depths, num_tokens = next(iter(values.values())).shape
    depths, reasons = [0] * num_tokens, [""] * num_tokens
    margins, every = [math.inf] * num_tokens, []
    held_back = [False] * num_tokens
    carry, limit = new_carry(rule, num_tokens), getattr(rule, rule.limit_name)
    for depth in range(1, num_depths + 1):
        evidence = rule.evidence({name: rows[depth - 1] for name, rows in values.items()})
        satisfied, _ = rule.satisfied(depth, evidence, carry)
        compared, _ = rule.compared(depth, evidence, carry)
        exiting, carry = rule.exits(depth, evidence, carry)
        every.append(compared)
        checked = bool(rule.checked_at(depth))
        for token in range(num_tokens):
            if depths[token]:
                continue
            if checked and rule.min_loops <= depth < rule.max_loops:
                margins[token] = min(margins[token], abs(float(compared[token]) - limit))
            if exiting[token]:
                depths[token] = depth
                if not satisfied[token]:
                    reasons[token] = BUDGET
                else:
                    reasons[token] = MIN_LOOPS if held_back[token] else rule.strategy
            # `min_loops` no longer holds back a token that could have exited here and did not.
            free = bool(depth >= rule.min_loops) and checked
            held_back[token] = (held_back[token] or bool(satisfied[token])) and not free
    return Exits(depths, reasons, margins, torch.stack(every))


def rule_of(document: Mapping[str, Any], **changed: Any) -> ExitRule:
    """The exit rule of a JSON trace, with some fields `changed`."""
    named = document.get("architecture", LOOPUS.name)  # traces of old versions have no name
    rule = next(one.exit_rule for one in ARCHITECTURES if one.name == named)
    return rule(**{**document["halting"], **changed})


def exits_of(trace: Mapping[str, Any], rule: ExitRule) -> Exits:
    """The exits of the tokens of a JSON trace by `rule`."""
    columns = {
        name: torch.tensor(
            [
                [math.nan if depth[name] is None else depth[name] for depth in token["depths"]]
                for token in trace["tokens"]
            ],
            dtype=torch.float32,
        ).T
        for name in rule.values
    }
    return exits(rule, columns)
