"""Training of recursive transformers: next tokens at full depth, and at every depth below.

With a loss at full depth alone (`intermediate_weight: 0`), tied weights and LoRA learn to be the
base again, and only full depth is useful. A small weight of the depths below makes their states
readable by the LM head, which tokens with a budget need (arXiv 2410.20672 on early exits).
"""

from typing import Any

import torch
from torch import nn

from vllm_loopus.architectures.recursive.config import RecursiveConfig
from vllm_loopus.architectures.recursive.reference import RecursiveForCausalLM
from vllm_loopus.modeling.looped_model import Pass
from vllm_loopus.training.objective import (
    Counts,
    Labelled,
    language_modelling_loss,
    token_losses,
)
from vllm_loopus.training.settings import Recursion, SettingsError
from vllm_loopus.training.trainable import Trainable
from vllm_loopus.training.trainer import PackedTrainer

LORA = (".lora_A.", ".lora_B.")


class TrainableRecursive(Trainable, RecursiveForCausalLM):
    """A recursive transformer that can be trained."""

    def train_only(self, recursion: Recursion) -> None:
        """Freezes what `recursion` leaves as it is. Raises `SettingsError` if nothing is left."""
        if recursion.train == "all":
            return
        if not self.config.lora_rank:
            raise SettingsError(
                "recursion.train=lora, but the model has lora_rank=0; set recursion.train: all"
            )
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(any(part in name for part in LORA))


def check_recursive(config: RecursiveConfig, served: dict[str, Any]) -> None:
    """Raises `SettingsError` for fields of a checkpoint that training would not honour."""
    if served:
        raise SettingsError(
            f"served.{next(iter(served))} has no effect with objective: recursive, which trains "
            f"all {config.loops} loops; leave it out, and serve fewer loops with hf_overrides"
        )
    config.max_loops = config.loops


def recursive_loss(
    model: RecursiveForCausalLM,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    labelled: Labelled,
    weight: float,
    counts: Counts,
) -> dict[str, torch.Tensor]:
    """`L = L_LM(h^B) + weight * sum of L_LM(h^b), b < B`, of a micro-batch [B, T].

    Returns `loss` with its graph and, without graph, its terms `lm_loss` and `depth_loss`, and
    `right`, the number of right tokens at full depth.
    """
    embedded = model.embed(input_ids)
    positions = model.positions(embedded, None, position_ids)
    below = embedded.new_zeros((), dtype=torch.float32)
    for loop_pass in model.loop(embedded, positions):
        if loop_pass.depth < model.config.max_loops and weight:
            logits = _logits(model, loop_pass, positions, labelled)
            losses = token_losses(logits, labelled.targets)
            below = below + language_modelling_loss(losses, counts)
    logits = _logits(model, loop_pass, positions, labelled)
    last = language_modelling_loss(token_losses(logits, labelled.targets), counts)
    return {
        "loss": last + weight * below,
        "lm_loss": last.detach(),
        "depth_loss": below.detach(),
        "right": (logits.detach().argmax(-1) == labelled.targets).sum(),
    }


@torch.no_grad()
def measure_by_depth(
    model: RecursiveForCausalLM,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    labelled: Labelled,
) -> dict[str, torch.Tensor]:
    """Sums over the labelled tokens of a micro-batch [B, T]: `loss` and `accuracy` (right tokens)
    at depths 1..B, [B] each."""
    embedded = model.embed(input_ids)
    positions = model.positions(embedded, None, position_ids)
    losses, right = [], []
    for loop_pass in model.loop(embedded, positions):
        logits = _logits(model, loop_pass, positions, labelled)
        losses.append(token_losses(logits, labelled.targets).sum())
        right.append((logits.argmax(-1) == labelled.targets).float().sum())
    return {"loss": torch.stack(losses), "accuracy": torch.stack(right)}


def _logits(
    model: RecursiveForCausalLM, loop_pass: Pass, positions: Any, labelled: Labelled
) -> torch.Tensor:
    """Logits [n, V] at the labelled positions."""
    hidden = model.decode_hidden(loop_pass.state, positions)
    return model.head(hidden.flatten(0, 1)[labelled.where])


class RecursiveTrainer(PackedTrainer):
    """Trains a `TrainableRecursive`."""

    def micro_batch_loss(
        self, model: nn.Module, inputs: dict[str, Any], counts: Counts
    ) -> dict[str, torch.Tensor]:
        result: dict[str, torch.Tensor] = model(
            recursive_loss,
            inputs["input_ids"],
            inputs["position_ids"],
            inputs["carried"].labelled,
            self.settings.recursion.intermediate_weight,
            counts,
        )
        return result

    def measure(
        self,
        model: nn.Module,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        labelled: Labelled,
    ) -> dict[str, torch.Tensor]:
        measured: dict[str, torch.Tensor] = model(
            measure_by_depth, input_ids, position_ids, labelled
        )
        return measured
