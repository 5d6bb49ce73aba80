"""`LoopUSForCausalLM` in transformers: the uncached reference model that defines the answers."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from vllm_loopus.backbones import load_class
from vllm_loopus.config import LoopUSConfig
from vllm_loopus.modeling.checkpoint import (
    IGNORED_SUFFIXES,
    LEGACY_WEIGHTS,
    RENAMED,
    current_name,
    raise_if_wrong,
)
from vllm_loopus.modeling.confidence import ConfidenceHead, head_input
from vllm_loopus.modeling.exit_rule import ExitTracker
from vllm_loopus.modeling.gate import SelectiveGate
from vllm_loopus.modeling.halting import HaltingRule
from vllm_loopus.modeling.layers import Decoder, Encoder, Positions, ReasoningBlock


@dataclass
class LoopUSOutput(ModelOutput):
    """Result of one forward pass. T' is T, or `logits_to_keep` if given.

    - `logits` [B, T', V]: all positions, decoded at the exit depth of their sequence.
    - `exit_depths` [B]: the exit depth of the last valid position of each sequence.
    - `loss`: next-token cross-entropy, if labels were given.
    - `states`: with `output_states`, `h^0 .. h^d` of all positions, [B, T, H] each.
    - `confidences`: with `output_states`, `q` [B] of the last valid position at depths 1..d.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    exit_depths: torch.Tensor | None = None
    states: tuple[torch.Tensor, ...] | None = None
    confidences: tuple[torch.Tensor, ...] | None = None


@dataclass(frozen=True)
class Pass:
    """Pass r of the reasoning block over all positions: `h^{r-1}`, `u^r`, `h^r`, [B, T, H] each."""

    depth: int
    before: torch.Tensor
    update: torch.Tensor
    state: torch.Tensor


class LoopUSForCausalLM(PreTrainedModel, GenerationMixin):
    """Runs all positions of a sequence to the exit depth of its last position.

    This is depth-consistent decoding: `logits_t = D(h^d_{1..t})_t` with `h^r = G(R(h^{r-1}),
    h^{r-1})`. Sequences of a batch are independent. There is no K/V cache: `generate` recomputes
    the whole sequence for every token.
    """

    config_class = LoopUSConfig
    config: LoopUSConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: LoopUSConfig) -> None:
        config.check()
        # SDPA does not support a cap on attention scores and would ignore it silently.
        self._supports_sdpa = config.attention.softcap is None
        super().__init__(config)
        # The layers read the attention implementation from the config they are built with.
        config.base._attn_implementation = config._attn_implementation
        self.encoder = Encoder(config)
        self.reasoning = ReasoningBlock(config)
        self.decoder = Decoder(config)
        self.q_head = ConfidenceHead(config.hidden_size)
        self.rotary_emb = load_class(config.backbone.hf_rotary)(config=config.base)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, for all checkpoint formats and old tensor names.

        Raises `ValueError` that names missing, unexpected or misshapen tensors.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs.setdefault("key_mapping", RENAMED)
        kwargs["ignore_mismatched_sizes"] = True  # reported below with all other wrong tensors
        source = pretrained_model_name_or_path
        if (state_dict := _legacy_state_dict(source)) is not None:
            if not isinstance(kwargs.get("config"), LoopUSConfig):
                kwargs["config"] = LoopUSConfig.from_pretrained(source)
            kwargs["state_dict"] = state_dict
            source = None
        model, info = super().from_pretrained(source, *args, output_loading_info=True, **kwargs)
        raise_if_wrong(
            str(pretrained_model_name_or_path),
            missing=sorted(info["missing_keys"]),
            unexpected=sorted(
                k for k in info["unexpected_keys"] if not k.endswith(IGNORED_SUFFIXES)
            ),
            misshapen=sorted(str(key) for key in info["mismatched_keys"]),
        )
        return (model, info) if wants_info else model

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.encoder.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.decoder.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.decoder.lm_head = new_embeddings

    def _init_weights(self, module: nn.Module) -> None:
        backbone = self.config.backbone
        norm_class, rotary_class = load_class(backbone.hf_norm), load_class(backbone.hf_rotary)
        # Norms of a base model may scale by `1 + weight`, and the buffers of its rotary tables have
        # model-specific names, so copy the initial values from a new instance of its classes.
        if isinstance(module, norm_class):
            init.copy_(module.weight, norm_class(module.weight.numel()).weight)
        elif isinstance(module, rotary_class):
            with torch.device("cpu"):
                fresh = rotary_class(config=self.config.base)
            for name, table in fresh.named_buffers():
                init.copy_(module.get_buffer(name), table)
        else:
            super()._init_weights(module)
        if isinstance(module, SelectiveGate):
            module.reset_parameters()

    def positions(
        self,
        hidden: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> Positions:
        """Rotary tables and mask for hidden states [B, T, H]."""
        return Positions.build(self.config, self.rotary_emb, hidden, attention_mask, position_ids)

    def encode(self, embedded: torch.Tensor, positions: Positions) -> torch.Tensor:
        """`h^0` [B, T, H] from embedded tokens [B, T, H]."""
        return self.encoder.run_layers(embedded, positions)

    def refine(
        self, state: torch.Tensor, positions: Positions
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One pass: `h^{r-1}` -> the update `u^r` and the gated state `h^r`, [B, T, H] each."""
        update = self.reasoning.run_layers(state, positions)
        return update, self.reasoning.gate(update, state)

    def passes(self, state: torch.Tensor, positions: Positions) -> Iterator[Pass]:
        """Runs `max_loops` passes over all positions from `h^0` [B, T, H], one at a time."""
        for depth in range(1, self.config.max_loops + 1):
            update, refined = self.refine(state, positions)
            yield Pass(depth, state, update, refined)
            state = refined

    def halting_inputs(self, loop_pass: Pass, where: Any) -> dict[str, torch.Tensor]:
        """The inputs of the halting rule after a pass, in float32: the `confidence` `q` and the
        `step_length` `||h^r - h^{r-1}||_2` of the positions `where`, an index of [B, T]."""
        before, after = loop_pass.before[where], loop_pass.state[where]
        update = loop_pass.update[where]
        read = head_input(self.config.confidence_input, update, before, after)
        return {
            "confidence": self.confidence(read),
            "step_length": torch.linalg.vector_norm((after - before).float(), dim=-1),
        }

    def decode(
        self, state: torch.Tensor, positions: Positions, logits_to_keep: int | torch.Tensor = 0
    ) -> torch.Tensor:
        """Logits [B, T', V] from states [B, T, H], all at the same depth within a sequence."""
        hidden = self.decoder.norm(self.decoder.run_layers(state, positions))
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return self.decoder.logits(hidden[:, keep])

    def confidence(self, head_input: torch.Tensor) -> torch.Tensor:
        """The confidence `q` [B] for inputs of the head [B, H], in float32."""
        return torch.sigmoid(self.q_head(head_input))

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_states: bool = False,
        **_: Any,
    ) -> LoopUSOutput:
        """Token ids [B, T] (or embeddings [B, T, H]) -> `LoopUSOutput`.

        `attention_mask` [B, T] marks valid tokens; padding may be on either side. Raises
        `ValueError` unless exactly one of `input_ids` and `inputs_embeds` is given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        embedded = self.encoder.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        positions = self.positions(embedded, attention_mask, position_ids)
        state = self.encode(embedded, positions)

        rows = torch.arange(state.shape[0], device=state.device)
        last = _last_valid(attention_mask, state)
        rule = HaltingRule.from_config(self.config)
        exits = ExitTracker(rule, len(rows), state.device)
        exit_state = state
        states, confidences = [state], []
        for loop_pass in self.passes(state, positions):
            halting_inputs = self.halting_inputs(loop_pass, (rows, last))
            now = exits.update(loop_pass.depth, rule.evidence(**halting_inputs))
            exit_state = torch.where(now[:, None, None], loop_pass.state, exit_state)
            if output_states:
                states.append(loop_pass.state)
                confidences.append(halting_inputs["confidence"])
            if not exits.running.any():
                break

        logits = self.decode(exit_state, positions, logits_to_keep)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return LoopUSOutput(
            loss=loss,
            logits=logits,
            exit_depths=exits.depths,
            states=tuple(states) if output_states else None,
            confidences=tuple(confidences) if output_states else None,
        )

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any
    ) -> dict[str, Any]:
        """The whole sequence in every step, because there is no cache."""
        return {"input_ids": input_ids, "attention_mask": attention_mask, "logits_to_keep": 1}

    def _prepare_cache_for_generation(self, *_: Any, **__: Any) -> bool:
        return False


def expected_shapes(config: LoopUSConfig) -> dict[str, torch.Size]:
    """Name and shape of every tensor that a checkpoint with this config must contain."""
    with torch.device("meta"):
        model = LoopUSForCausalLM(copy.deepcopy(config))  # the model modifies its config
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _last_valid(attention_mask: torch.Tensor | None, state: torch.Tensor) -> torch.Tensor:
    batch, length = state.shape[:2]
    if attention_mask is None:
        return torch.full((batch,), length - 1, device=state.device)
    order = torch.arange(length, device=state.device)
    return (attention_mask.bool() * order).argmax(-1)


def _legacy_state_dict(source: Any) -> dict[str, torch.Tensor] | None:
    """The tensors of an old checkpoint folder (`combined_model.pt`); None for other sources."""
    folder = Path(str(source))
    file = folder / LEGACY_WEIGHTS
    if not file.is_file() or any(folder.glob("*.safetensors")):
        return None
    state_dict = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return {current_name(name): tensor for name, tensor in state_dict.items()}
