"""Scores of models on the synthetic tasks, by depth and with early exit.

An answer is one character. It is right if that is the most probable next token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vllm_loopus.modeling.exit_rule import ExitTracker
from vllm_loopus.modeling.halting import HaltingRule
from vllm_loopus.modeling.model import LoopUSForCausalLM
from vllm_loopus.tiny.tasks import Item

BATCH_SIZE = 200


@dataclass(frozen=True)
class Scores:
    """The scores of one model on M items at depths 1..N; N is 1 for a plain model.

    - `right` [N, M]: whether the answer is right.
    - `losses` [N, M]: negative log-likelihood of the right answer, in nats.
    - `confidences`, `step_lengths` [N, M]: inputs of the halting rule; zeros for a plain model.
    """

    items: Sequence[Item]
    right: torch.Tensor
    losses: torch.Tensor
    confidences: torch.Tensor
    step_lengths: torch.Tensor

    def exit_depths(self, rule: HaltingRule) -> torch.Tensor:
        """The exit depths [M] of the answers by `rule`."""
        exits = ExitTracker(rule, len(self.items))
        inputs = zip(self.confidences, self.step_lengths, strict=True)
        for depth, (confidence, step_length) in enumerate(inputs, start=1):
            exits.update(
                depth, rule.evidence({"confidence": confidence, "step_length": step_length})
            )
        return exits.depths

    def at(self, depths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`right` and `losses` [M] at the given depth of each item [M]."""
        index = (depths - 1)[None]
        return self.right.gather(0, index)[0], self.losses.gather(0, index)[0]

    def of(self, task: str | None = None, difficulty: int | None = None) -> torch.Tensor:
        """Mask [M] of the items with this task and difficulty; None selects all."""
        return torch.tensor(
            [
                task in (None, item.task) and difficulty in (None, item.difficulty)
                for item in self.items
            ]
        )


@torch.no_grad()
def score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item]
) -> Scores:
    """Scores `model`, a LoopUS or a plain model, on `items` as raw questions."""
    batches: list[list[tuple[torch.Tensor, ...]]] = []
    for start in range(0, len(items), BATCH_SIZE):
        batch = items[start : start + BATCH_SIZE]
        encoded = [torch.tensor(tokenizer.encode(item.question)) for item in batch]
        ids = pad_sequence(encoded, batch_first=True, padding_value=tokenizer.pad_token_id)
        last = torch.tensor([len(one) - 1 for one in encoded])
        answers = torch.tensor([tokenizer.encode(item.answer)[0] for item in batch])
        batches.append(
            [
                (
                    (logits.argmax(-1) == answers).float(),
                    F.cross_entropy(logits.float(), answers, reduction="none"),
                    *halting_inputs,
                )
                for logits, *halting_inputs in _depths(model, ids, last)
            ]
        )
    by_depth = [
        tuple(map(torch.cat, zip(*parts, strict=True))) for parts in zip(*batches, strict=True)
    ]
    right, losses, confidences, step_lengths = map(torch.stack, zip(*by_depth, strict=True))
    return Scores(items, right, losses, confidences, step_lengths)


def _depths(
    model: PreTrainedModel, ids: torch.Tensor, last: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Logits, confidence and step length of the positions `last` [B] at every depth.

    Padding on the right has no effect on them, because attention is causal.
    """
    rows = torch.arange(len(ids))
    if not isinstance(model, LoopUSForCausalLM):
        nothing = torch.zeros(len(ids))
        yield model(ids).logits[rows, last], nothing, nothing
        return
    embedded = model.get_input_embeddings()(ids)
    positions = model.positions(embedded)
    for loop_pass in model.passes(model.encode(embedded, positions), positions):
        halting_inputs = model.halting_inputs(loop_pass, (rows, last))
        logits = model.decode(loop_pass.state, positions)[rows, last]
        yield logits, halting_inputs["confidence"], halting_inputs["step_length"]
