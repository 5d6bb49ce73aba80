"""`LoopUSForCausalLM` in transformers: the uncached reference model that defines the answers."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vllm_loopus.config import LoopUSConfig
from vllm_loopus.modeling.checkpoint import (
    LEGACY_WEIGHTS,
    RENAMED,
    current_name,
)
from vllm_loopus.modeling.confidence import ConfidenceHead, head_input
from vllm_loopus.modeling.gate import SelectiveGate
from vllm_loopus.modeling.halting import HaltingRule
from vllm_loopus.modeling.layers import Decoder, Encoder, Positions, ReasoningBlock
from vllm_loopus.modeling.looped_model import Pass
from vllm_loopus.modeling.reference_with_base import ReferenceWithBase


@dataclass(frozen=True)
class LoopUSPass(Pass):
    """A pass, with the update `u^r` [B, T, H] that the gate mixes into the state."""

    update: torch.Tensor


class LoopUSForCausalLM(ReferenceWithBase):
    """A LoopUS model: `logits_t = D(h^d_{1..t})_t` with `h^r = G(R(h^{r-1}), h^{r-1})`."""

    config_class = LoopUSConfig
    config: LoopUSConfig
    exit_rule_class = HaltingRule

    def __init__(self, config: LoopUSConfig) -> None:
        super().__init__(config)
        self.encoder = Encoder(config)
        self.reasoning = ReasoningBlock(config)
        self.decoder = Decoder(config)
        self.q_head = ConfidenceHead(config.hidden_size)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, for all checkpoint formats and old tensor names.

        Raises `ValueError` that names missing, unexpected or misshapen tensors.
        """
        kwargs.setdefault("key_mapping", RENAMED)
        source = pretrained_model_name_or_path
        if (state_dict := _legacy_state_dict(source)) is not None:
            if not isinstance(kwargs.get("config"), LoopUSConfig):
                kwargs["config"] = LoopUSConfig.from_pretrained(source)
            kwargs["state_dict"] = state_dict
            return super().from_pretrained(None, *args, checkpoint_name=str(source), **kwargs)
        return super().from_pretrained(source, *args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.encoder.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.decoder.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.decoder.lm_head = new_embeddings

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SelectiveGate):
            module.reset_parameters()

    def encode(self, embedded: torch.Tensor, positions: Positions) -> torch.Tensor:
        """`h^0` [B, T, H] from embedded tokens [B, T, H]."""
        return self.encoder.run_layers(embedded, positions)

    def refine(
        self, state: torch.Tensor, positions: Positions
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One pass: `h^{r-1}` -> the update `u^r` and the gated state `h^r`, [B, T, H] each."""
        update = self.reasoning.run_layers(state, positions)
        return update, self.reasoning.gate(update, state)

    def passes(self, state: torch.Tensor, positions: Positions) -> Iterator[LoopUSPass]:
        """Runs `max_loops` passes over all positions from `h^0` [B, T, H], one at a time."""
        for depth in range(1, self.config.max_loops + 1):
            update, refined = self.refine(state, positions)
            yield LoopUSPass(depth, state, refined, update)
            state = refined

    def loop(self, embedded: torch.Tensor, positions: Positions) -> Iterator[LoopUSPass]:
        return self.passes(self.encode(embedded, positions), positions)

    def exit_values(
        self, loop_pass: LoopUSPass, positions: Positions, where: Any
    ) -> dict[str, torch.Tensor]:
        """The `confidence` `q`, and the `step_length`."""
        return self.halting_inputs(loop_pass, where)

    def traced_values(
        self, loop_pass: LoopUSPass, positions: Positions, where: Any
    ) -> dict[str, torch.Tensor]:
        """`gate_mean` besides: the gate's coefficient, mean over channels."""
        coefficient = self.reasoning.gate.coefficient(
            loop_pass.update[where], loop_pass.before[where]
        )
        gate_mean = coefficient.float().mean(-1)
        read = self.halting_inputs(loop_pass, where)
        return {"confidence": read["confidence"], "gate_mean": gate_mean, **read}

    def halting_inputs(self, loop_pass: LoopUSPass, where: Any) -> dict[str, torch.Tensor]:
        """The inputs of the halting rule after a pass, in float32: the `confidence` `q` and the
        `step_length` `||h^r - h^{r-1}||_2` of the positions `where`, an index of [B, T]."""
        before, after = loop_pass.before[where], loop_pass.state[where]
        update = loop_pass.update[where]
        read = head_input(self.config.confidence_input, update, before, after)
        return {"confidence": self.confidence(read), "step_length": loop_pass.step_length(where)}

    def decode_hidden(self, state: torch.Tensor, positions: Positions) -> torch.Tensor:
        hidden: torch.Tensor = self.decoder.norm(self.decoder.run_layers(state, positions))
        return hidden

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.decoder.logits(hidden)

    def confidence(self, head_input: torch.Tensor) -> torch.Tensor:
        """The confidence `q` [B] for inputs of the head [B, H], in float32."""
        return torch.sigmoid(self.q_head(head_input))


def _legacy_state_dict(source: Any) -> dict[str, torch.Tensor] | None:
    """The tensors of an old checkpoint folder (`combined_model.pt`); None for other sources."""
    folder = Path(str(source))
    file = folder / LEGACY_WEIGHTS
    if not file.is_file() or any(folder.glob("*.safetensors")):
        return None
    state_dict = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return {current_name(name): tensor for name, tensor in state_dict.items()}
