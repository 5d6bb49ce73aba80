"""Random deep supervision: which steps of a batch are supervised, and the loss of one step.

Of the `n_reasoning_steps` steps of a batch, `n_supervision` are drawn. The others run without
gradient. The state is detached before each step, so that only the graph of one step is in memory.
Steps after the last drawn one are not run, because they have no effect.
"""

from dataclasses import dataclass, field

import numpy as np
import torch

from vllm_loopus.modeling.confidence import head_input
from vllm_loopus.modeling.exit_rule import ExitTracker
from vllm_loopus.modeling.halting import HaltingRule
from vllm_loopus.modeling.layers import Positions
from vllm_loopus.modeling.model import LoopUSForCausalLM
from vllm_loopus.training.objective import (
    Counts,
    Labelled,
    language_modelling_loss,
    monotonicity_loss,
    sequence_confidence_loss,
    token_confidence_loss,
)
from vllm_loopus.training.settings import Supervision
from vllm_loopus.training.thresholds import ThresholdSums
from vllm_loopus.training.trainable import Trainable
from vllm_loopus.training.vocabulary import token_scores


class TrainableLoopUS(Trainable, LoopUSForCausalLM):
    """A LoopUS model that can be trained."""


def draw_steps(seed: int, batch: int, supervision: Supervision) -> list[int]:
    """The supervised steps (0-based, ascending) of a batch, determined by seed and batch number."""
    random = np.random.default_rng([seed, batch])
    steps = random.choice(
        supervision.n_reasoning_steps, size=supervision.n_supervision, replace=False
    )
    return sorted(int(step) for step in steps)


@dataclass
class Carried:
    """The data of a micro-batch between its supervised steps.

    `state` [B, T, H]: detached; None before the encoder has run. `losses` [n]: the token losses of
    `state`, detached; None if they are not known, or an update has changed them.
    """

    labelled: Labelled
    state: torch.Tensor | None = None
    losses: torch.Tensor | None = None
    positions: Positions | None = None
    steps_done: int = field(default=0)


def supervised_step(
    model: LoopUSForCausalLM,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    carried: Carried,
    step: int,
    supervision: Supervision,
    counts: Counts,
) -> dict[str, torch.Tensor]:
    """Runs a micro-batch [B, T] up to and including the supervised `step`, and computes its loss.

    `L = L_LM + beta L_Mono + L_Q`. Returns `loss` with its graph and, without graph, its terms and
    `right`, the number of right tokens. Updates `carried` to the state after the step.
    """
    labelled = carried.labelled
    unsupervised = step - carried.steps_done
    state = _state_before(model, input_ids, position_ids, carried, unsupervised, supervision)
    positions = carried.positions
    assert positions is not None

    losses_before = carried.losses if unsupervised == 0 else None
    if supervision.beta and losses_before is None:
        with torch.no_grad():
            losses_before, _ = scores_at(model, state, positions, labelled)
    previous = update = state
    for _ in range(supervision.supervised_passes):
        previous = state
        update, state = model.refine(state, positions)
    losses, right = scores_at(model, state, positions, labelled)
    carried.state, carried.steps_done = state.detach(), step + 1
    carried.losses = losses.detach() if supervision.update == "batch" else None

    terms = {"lm_loss": language_modelling_loss(losses, counts)}
    loss = terms["lm_loss"]
    if supervision.beta:
        assert losses_before is not None
        by_document = labelled if supervision.monotonicity == "document" else None
        terms["mono_loss"] = monotonicity_loss(losses, losses_before, counts, by_document)
        loss = loss + supervision.beta * terms["mono_loss"]
    read = head_input(supervision.confidence_input, update, previous, state)
    if supervision.confidence_gradient == "head":
        read = read.detach()
    by_token = supervision.confidence_target == "token"
    q_logits = model.q_head(read.flatten(0, 1)[labelled.where if by_token else labelled.last])
    terms["confidence_loss"] = (
        token_confidence_loss(q_logits, right, counts)
        if by_token
        else sequence_confidence_loss(q_logits, right, labelled, counts)
    )
    loss = loss + supervision.confidence_weight * terms["confidence_loss"]
    detached = {name: term.detach() for name, term in terms.items()}
    return {"loss": loss, "right": right.sum(), **detached}


def _state_before(
    model: LoopUSForCausalLM,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    carried: Carried,
    unsupervised: int,
    supervision: Supervision,
) -> torch.Tensor:
    """The state [B, T, H] before a supervised step, after `unsupervised` steps without gradient.

    It has a graph only if it is the output of a trained encoder.
    """
    if carried.state is None:
        with torch.set_grad_enabled(supervision.train_encoder and unsupervised == 0):
            embedded = model.encoder.embed_tokens(input_ids)
            carried.positions = model.positions(embedded, None, position_ids)
            return _unsupervised(
                model, model.encode(embedded, carried.positions), carried, unsupervised
            )
    return _unsupervised(model, carried.state, carried, unsupervised)


def _unsupervised(
    model: LoopUSForCausalLM, state: torch.Tensor, carried: Carried, steps: int
) -> torch.Tensor:
    assert carried.positions is not None
    with torch.no_grad():
        for _ in range(steps):
            _, state = model.refine(state, carried.positions)
    return state


def scores_at(
    model: LoopUSForCausalLM, state: torch.Tensor, positions: Positions, labelled: Labelled
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token losses [n] and right tokens [n] of states [B, T, H] at the labelled positions."""
    decoder = model.decoder
    hidden = decoder.norm(decoder.run_layers(state, positions).flatten(0, 1)[labelled.where])
    return token_scores(decoder.lm_head, hidden, labelled.targets, decoder.logit_softcap)


@torch.no_grad()
def measure_by_depth(
    model: LoopUSForCausalLM,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    labelled: Labelled,
) -> dict[str, torch.Tensor]:
    """Sums over the labelled tokens of a micro-batch [B, T].

    At depths 1..N (`max_loops`): `loss`, `accuracy` (right tokens) and `confidence`, [N] each. At
    the exit depths by the config's halting rule, as in serving: `exit_depth`, `exit_accuracy` and
    `exit_loss`, scalars. By threshold: see `ThresholdSums`.
    """
    embedded = model.encoder.embed_tokens(input_ids)
    positions = model.positions(embedded, None, position_ids)
    where = labelled.where
    row, column = where // input_ids.shape[1], where % input_ids.shape[1]
    rule = HaltingRule.from_config(model.config)
    exits = ExitTracker(rule, len(where), where.device)
    at_exit = {
        name: torch.zeros((), device=where.device)
        for name in ("exit_depth", "exit_accuracy", "exit_loss")
    }
    thresholds = ThresholdSums(rule, len(where), where.device)
    by_depth: dict[str, list[torch.Tensor]] = {"loss": [], "accuracy": [], "confidence": []}
    for loop_pass in model.passes(model.encode(embedded, positions), positions):
        halting_inputs = model.halting_inputs(loop_pass, (row, column))
        losses, hits = scores_at(model, loop_pass.state, positions, labelled)
        right = hits.float()
        thresholds.add(loop_pass.depth, losses, halting_inputs)
        now = exits.update(loop_pass.depth, rule.evidence(halting_inputs))
        at_exit["exit_depth"] += loop_pass.depth * now.sum()
        at_exit["exit_accuracy"] += (right * now).sum()
        at_exit["exit_loss"] += (losses * now).sum()
        found = {"loss": losses, "accuracy": right, "confidence": halting_inputs["confidence"]}
        for name, values in found.items():
            by_depth[name].append(values.sum())
    means = {name: torch.stack(sums) for name, sums in by_depth.items()}
    return {**means, **at_exit, **thresholds.found()}
