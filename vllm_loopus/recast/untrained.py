"""The loss of untrained cuts: what is left of a base model after passes that nobody trained.

A loop has to write what it reads. Where the reasoning block of a cut returns states of the kind
that it takes, the untrained model is still close to its base; where it does not, the gate mixes
states that have nothing in common, and training begins with repairing that.

All cuts are measured in one forward of the base: after each of its layers, that layer runs on the
states of every cut that needs it there.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

from vllm_loopus.modeling.gate import SelectiveGate
from vllm_loopus.recast.base import HEAD, Base
from vllm_loopus.recast.cut import Cut
from vllm_loopus.recast.hidden_states import HiddenStates, Run
from vllm_loopus.recast.representation import logit_slices

DEPTHS = 2
TOKENS_AT_ONCE = 2048  # that a layer runs on


@dataclass(frozen=True)
class UntrainedLosses:
    """Mean next-token losses in nats over `tokens` tokens, of the base and of each cut.

    `by_cut`: the losses at depths 1 and 2 of the cut with the gate that `recast` gives it.
    """

    tokens: int
    base: float
    by_cut: dict[Cut, tuple[float, ...]]


@torch.inference_mode()
def untrained_losses(
    base: Base,
    cuts: Sequence[Cut],
    sequences: Sequence[torch.Tensor],
    model: HiddenStates,
    seed: int,
) -> UntrainedLosses:
    """Measures the cuts on token sequences [T], and shows a progress bar.

    `seed`: of the gate, as in `recast`. Raises `ValueError` if a loss is not finite.
    """
    gate = SelectiveGate(int(base.config.hidden_size))
    gate.reset_parameters(torch.Generator().manual_seed(seed))
    gate.to(model.device)
    cap = getattr(base.config, "final_logit_softcapping", None)
    sums = {cut: torch.zeros(DEPTHS, dtype=torch.float64) for cut in cuts}
    head = base.tensors[HEAD].load()
    of_base, tokens = 0.0, 0
    for ids in tqdm(sequences, desc="try cuts", unit="seq"):
        targets = ids[1:].to(model.device)
        sweep = Sweep(cuts, gate, base.num_layers)
        for depth in range(1, DEPTHS + 1):
            last = model.visit(ids[None], sweep.after)
            if depth == 1:
                of_base += loss(model.norm(last), head, targets, cap)
            for cut, state in sweep.decoding.items():
                sums[cut][depth - 1] += loss(model.norm(state), head, targets, cap)
            sweep.next_pass()
        tokens += len(targets)
    found = {cut: tuple((total / tokens).tolist()) for cut, total in sums.items()}
    if not all(math.isfinite(value) for values in found.values() for value in values):
        raise ValueError("the losses of untrained cuts are not finite; try --dtype float32")
    return UntrainedLosses(tokens, of_base / tokens, found)


class Sweep:
    """The states [1, T, H] of all cuts along forwards of the base, one for each pass.

    `before`: the state before the pass, after its gate. `passing`: in the reasoning block;
    `decoding`: in the decoder. The update of the first pass is a state of the base itself.
    """

    def __init__(self, cuts: Sequence[Cut], gate: SelectiveGate, num_layers: int) -> None:
        self.cuts, self.gate = cuts, gate
        self.ends = {cut: num_layers - cut.decoder for cut in cuts}
        self.first = True
        self.before: dict[Cut, torch.Tensor] = {}
        self.passing: dict[Cut, torch.Tensor] = {}
        self.decoding: dict[Cut, torch.Tensor] = {}

    def next_pass(self) -> None:
        """Begins another pass: another forward of the base."""
        self.first = False
        self.decoding = {}

    def after(self, layer: int, taken: torch.Tensor, given: torch.Tensor, run: Run) -> None:
        """Takes the input and output [1, T, H] of a layer of the base; `run` is that layer."""
        for cut in self.cuts:
            if cut.encoder == layer:
                if self.first:
                    self.before[cut] = taken
                else:
                    self.passing[cut] = self.before[cut]
        self.passing = run_all(run, self.passing)
        self.decoding = run_all(run, self.decoding)
        for cut in self.cuts:
            if self.ends[cut] == layer + 1:
                update = given if self.first else self.passing.pop(cut)
                place = self.gate.A_log.device
                self.before[cut] = self.gate(update.to(place), self.before[cut].to(place))
                self.decoding[cut] = self.before[cut]


def run_all(run: Run, states: dict[Cut, torch.Tensor]) -> dict[Cut, torch.Tensor]:
    """Runs a layer on the states of several cuts, a limited number of tokens at a time."""
    cuts = list(states)
    found: dict[Cut, torch.Tensor] = {}
    if not cuts:
        return found
    count = max(1, TOKENS_AT_ONCE // states[cuts[0]].shape[1])
    for start in range(0, len(cuts), count):
        part = cuts[start : start + count]
        output = run(torch.cat([states[cut] for cut in part]))
        found.update(zip(part, output.split(1), strict=True))
    return found


def loss(
    rows: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, softcap: float | None
) -> float:
    """The summed next-token loss of normed states [1, T, H] with the LM head [V, H], by slices of
    the vocabulary."""
    rows = rows[0, :-1].float()
    parts, wanted, left = [], torch.zeros(len(rows), device=rows.device), targets
    for logits in logit_slices(rows, head, softcap):
        size = logits.shape[1]
        index = left.clamp(0, size - 1)
        wanted += logits.gather(1, index[:, None]).squeeze(1) * (index == left)
        left = left - size
        parts.append(logits.logsumexp(-1))
    return float((torch.stack(parts).logsumexp(0) - wanted).sum())
