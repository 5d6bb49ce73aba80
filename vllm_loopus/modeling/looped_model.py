"""What the reference models of all looped architectures share: they define the right answers."""

import copy
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from vllm_loopus.modeling.checkpoint import IGNORED_SUFFIXES, raise_if_wrong
from vllm_loopus.modeling.exit_rule import ExitRule, ExitTracker


@dataclass
class LoopedOutput(ModelOutput):
    """Result of one forward pass. T' is T, or `logits_to_keep` if given.

    - `logits` [B, T', V]: all positions, decoded at the exit depth of their sequence.
    - `exit_depths` [B]: the exit depth of the last valid position of each sequence.
    - `loss`: next-token cross-entropy, if labels were given.
    - `states`: with `output_states`, `h^0 .. h^d` of all positions, [B, T, H] each.
    - `confidences`: with `output_states`, the evidence [B] of the exit rule for the last valid
      position at depths 1..d; in LoopUS the confidence `q`, whatever the rule.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    exit_depths: torch.Tensor | None = None
    states: tuple[torch.Tensor, ...] | None = None
    confidences: tuple[torch.Tensor, ...] | None = None


@dataclass(frozen=True)
class Pass:
    """Pass r of the loop over all positions: `h^{r-1}`, `h^r`, [B, T, H] each."""

    depth: int
    before: torch.Tensor
    state: torch.Tensor

    def step_length(self, where: Any) -> torch.Tensor:
        """`||h^r - h^{r-1}||_2` of the positions `where`, an index of [B, T]: the difference in the
        model's dtype, its norm in float32."""
        step = self.state[where] - self.before[where]
        return torch.linalg.vector_norm(step.float(), dim=-1)


class LoopedReference(PreTrainedModel, GenerationMixin):
    """Runs all positions of a sequence to the exit depth of its last position.

    This is depth-consistent decoding: `logits_t = D(h^d_{1..t})_t`, where `h^r` is the state after
    r passes over all positions. Sequences of a batch are independent. There is no K/V cache:
    `generate` recomputes the whole sequence for every token. Attention is causal, so the states of
    a position are the same whatever follows, and however deep other positions are decoded.
    """

    base_model_prefix = ""
    exit_rule_class: type[ExitRule]

    # A subclass has these five.

    @abstractmethod
    def positions(
        self,
        hidden: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> Any:
        """Position inputs of the layers for hidden states [B, T, H] and an optional mask [B, T]."""

    @abstractmethod
    def loop(self, embedded: torch.Tensor, positions: Any) -> Iterator[Pass]:
        """Runs `max_loops` passes from embedded tokens [B, T, H], one at a time. `before` of the
        first pass is `h^0`."""

    @abstractmethod
    def exit_values(self, loop_pass: Any, positions: Any, where: Any) -> dict[str, torch.Tensor]:
        """What exit rules may read after a pass, by name, float32: `step_length`
        `||h^r - h^{r-1}||_2` in any case, of the positions `where`, an index of [B, T]."""

    def traced_values(self, loop_pass: Any, positions: Any, where: Any) -> dict[str, torch.Tensor]:
        """What a trace shows of a pass: `exit_values`, and what only this architecture has."""
        return self.exit_values(loop_pass, positions, where)

    @abstractmethod
    def decode_hidden(self, state: torch.Tensor, positions: Any) -> torch.Tensor:
        """Hidden states [B, T, H] for `head` from states [B, T, H], all at the same depth within a
        sequence."""

    @abstractmethod
    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] from hidden states [..., H]."""

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token ids [B, T] -> embedded tokens [B, T, H]."""
        embedded: torch.Tensor = self.get_input_embeddings()(input_ids)
        return embedded

    def embedded(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None
    ) -> torch.Tensor:
        """The one of both that is given, embedded [B, T, H]. Raises `ValueError` otherwise."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is not None:
            return inputs_embeds
        assert input_ids is not None
        return self.embed(input_ids)

    @property
    def exit_rule(self) -> ExitRule:
        """The exit rule of the config, as it is now."""
        return self.exit_rule_class.from_config(self.config)

    def decode(
        self, state: torch.Tensor, positions: Any, logits_to_keep: int | torch.Tensor = 0
    ) -> torch.Tensor:
        """Logits [B, T', V] from states [B, T, H], all at the same depth within a sequence."""
        hidden = self.decode_hidden(state, positions)
        return self.head(hidden[:, kept(logits_to_keep)])

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
    ) -> LoopedOutput:
        """Token ids [B, T] (or embeddings [B, T, H]) -> `LoopedOutput`.

        `attention_mask` [B, T] marks valid tokens; padding may be on either side. Raises
        `ValueError` unless exactly one of `input_ids` and `inputs_embeds` is given.
        """
        inputs_embeds = self.embedded(input_ids, inputs_embeds)
        positions = self.positions(inputs_embeds, attention_mask, position_ids)
        rows = torch.arange(len(inputs_embeds), device=inputs_embeds.device)
        last = _last_valid(attention_mask, inputs_embeds)
        rule = self.exit_rule
        exits = ExitTracker(rule, len(rows), inputs_embeds.device)
        exit_state: torch.Tensor | None = None
        states: list[torch.Tensor] = []
        confidences: list[torch.Tensor] = []
        for loop_pass in self.loop(inputs_embeds, positions):
            values = self.exit_values(loop_pass, positions, (rows, last))
            evidence = rule.evidence(values)
            now = exits.update(loop_pass.depth, evidence)
            before = loop_pass.before if exit_state is None else exit_state
            exit_state = torch.where(now[:, None, None], loop_pass.state, before)
            if output_states:
                states += [loop_pass.before] if not states else []
                states.append(loop_pass.state)
                confidences.append(values.get("confidence", evidence))
            if not exits.running.any():
                break
        assert exit_state is not None
        logits = self.decode(exit_state, positions, logits_to_keep)
        return LoopedOutput(
            loss=loss_of(logits, labels),
            logits=logits,
            exit_depths=exits.depths,
            states=tuple(states) if output_states else None,
            confidences=tuple(confidences) if output_states else None,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers. Raises `ValueError` that names missing, unexpected or misshapen
        tensors. `checkpoint_name`: of a checkpoint that is given as a `state_dict`."""
        wants_info = kwargs.pop("output_loading_info", False)
        name = kwargs.pop("checkpoint_name", str(pretrained_model_name_or_path))
        kwargs["ignore_mismatched_sizes"] = True  # reported below with all other wrong tensors
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        raise_if_wrong(
            name,
            missing=sorted(info["missing_keys"]),
            unexpected=sorted(
                k for k in info["unexpected_keys"] if not k.endswith(IGNORED_SUFFIXES)
            ),
            misshapen=sorted(str(key) for key in info["mismatched_keys"]),
        )
        return (model, info) if wants_info else model

    @classmethod
    def expected_shapes(cls, config: PreTrainedConfig) -> dict[str, torch.Size]:
        """Name and shape of every tensor that a checkpoint with this config must contain; not
        those that are tied to others."""
        with torch.device("meta"):
            model = cls(copy.deepcopy(config))  # the model modifies its config
        tied = cls._tied_weights_keys if config.tie_word_embeddings else None
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        return {name: shape for name, shape in shapes.items() if name not in (tied or ())}

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any
    ) -> dict[str, Any]:
        """The whole sequence in every step, because there is no cache."""
        return {"input_ids": input_ids, "attention_mask": attention_mask, "logits_to_keep": 1}

    def _prepare_cache_for_generation(self, *_: Any, **__: Any) -> bool:
        return False


def kept(logits_to_keep: int | torch.Tensor) -> Any:
    """Index of the positions whose logits are wanted: as many last ones (0: all), or these."""
    return slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep


def position_ids_of(hidden: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Positions [1, T] or [B, T] of hidden states [B, T, H]. Those that a mask [B, T] leaves out do
    not count."""
    if attention_mask is None:
        return torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def loss_of(logits: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor | None:
    """Next-token cross-entropy of logits [B, T, V] and labels [B, T]; None without labels."""
    if labels is None:
        return None
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def _last_valid(attention_mask: torch.Tensor | None, hidden: torch.Tensor) -> torch.Tensor:
    batch, length = hidden.shape[:2]
    if attention_mask is None:
        return torch.full((batch,), length - 1, device=hidden.device)
    order = torch.arange(length, device=hidden.device)
    return (attention_mask.bool() * order).argmax(-1)
