"""`RavenForCausalLM` in transformers: the uncached reference model that defines the answers."""

import copy
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from vllm_loopus.architectures.raven import initial_state as first
from vllm_loopus.architectures.raven.config import RavenConfig
from vllm_loopus.architectures.raven.criteria import (
    LATENT,
    OUTPUT,
    CriterionRule,
    first_carry,
    latent_evidence,
    output_value,
)
from vllm_loopus.modeling.looped_model import LoopedOutput, LoopedReference, Pass, position_ids_of

ROTARY_TABLE = "freqs_cis"  # in checkpoints; computed here


@dataclass(frozen=True)
class Rows:
    """Positions [B, T], their rotary tables [B, T, 1, D/2] and the attention mask [B, 1, T, T]."""

    positions: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    mask: torch.Tensor


class Norm(nn.Module):
    """RMSNorm, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return wide.to(x.dtype) * self.weight


class Attention(nn.Module):
    def __init__(self, config: RavenConfig) -> None:
        super().__init__()
        heads, kv_heads, size = config.n_heads, config.num_key_value_heads, config.head_dim
        assert kv_heads is not None and size is not None
        self.family, self.size = config.family, size
        self.widths = [heads * size, kv_heads * size, kv_heads * size]
        self.Wqkv = nn.Linear(config.n_embd, sum(self.widths), bias=False)
        self.proj = nn.Linear(heads * size, config.n_embd, bias=False)
        if config.qk_bias:
            self.qk_bias = nn.Parameter(torch.zeros(2, 1, heads, size))
        if self.family.norms_qk:
            self.q_norm = Norm(self.widths[0], config.norm_eps)
            self.k_norm = Norm(self.widths[1], config.norm_eps)

    def forward(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        q, k, v = self.Wqkv(x).split(self.widths, dim=-1)
        if self.family.norms_qk:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.unflatten(-1, (-1, self.size)) for part in (q, k, v))
        if hasattr(self, "qk_bias"):
            q, k = q + self.qk_bias[0], k + self.qk_bias[1]
        q, k = (rotated(part, rows, self.family.interleaved) for part in (q, k))
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, rows.mask, enable_gqa=True)
        return self.proj(mixed.transpose(1, 2).flatten(2))


def rotated(x: torch.Tensor, rows: Rows, interleaved: bool) -> torch.Tensor:
    """Heads [B, T, N, D], rotated in float32 by pairs of neighbours, or of halves."""
    wide = x.float()
    a, b = (wide[..., 0::2], wide[..., 1::2]) if interleaved else wide.chunk(2, dim=-1)
    parts = a * rows.cos - b * rows.sin, b * rows.cos + a * rows.sin
    turned = torch.stack(parts, dim=-1).flatten(-2) if interleaved else torch.cat(parts, dim=-1)
    return turned.to(x.dtype)


class MLP(nn.Module):
    def __init__(self, config: RavenConfig) -> None:
        super().__init__()
        self.fc = nn.Linear(config.n_embd, 2 * config.intermediate_size, bias=False)
        self.proj = nn.Linear(config.intermediate_size, config.n_embd, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.fc(x).chunk(2, dim=-1)
        return self.proj(F.silu(gate) * up)


class Block(nn.Module):
    """A block; where its norms are depends on the family."""

    norm_1: Norm
    norm_2: Norm
    norm_3: Norm
    norm_4: Norm

    def __init__(self, config: RavenConfig) -> None:
        super().__init__()
        self.placed = config.family.placed
        for number in range(1, config.family.norms + 1):
            self.add_module(f"norm_{number}", Norm(config.n_embd, config.norm_eps))
        self.attn = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        if self.placed == "sum":
            x = self.norm_2(x + self.attn(self.norm_1(x), rows))
            return self.norm_4(x + self.mlp(self.norm_3(x)))
        if self.placed == "input":
            x = x + self.attn(self.norm_1(x), rows)
            return x + self.mlp(self.norm_2(x))
        x = x + self.norm_1(self.attn(x, rows))
        return x + self.norm_2(self.mlp(x))


class Transformer(nn.Module):
    """What the checkpoint has under `transformer.`"""

    def __init__(self, config: RavenConfig) -> None:
        super().__init__()

        def blocks(count: int) -> nn.ModuleList:
            return nn.ModuleList(Block(config) for _ in range(count))

        size = config.n_embd
        assert config.padded_vocab_size is not None
        self.wte: nn.Module = nn.Embedding(config.padded_vocab_size, size)
        self.prelude = blocks(config.n_layers_in_prelude)
        self.adapter = nn.Linear(2 * size, size, bias=False)
        self.core_block = blocks(config.n_layers_in_recurrent_block)
        self.coda = blocks(config.n_layers_in_coda)
        self.ln_f = Norm(size, config.norm_eps)


class Outputs:
    """The values of output criteria, loop by loop, of the same positions in each."""

    def __init__(self) -> None:
        self._carry: dict[str, torch.Tensor] = {}

    def value(self, criterion: str, logits: torch.Tensor) -> torch.Tensor:
        """The value [n] for the logits [n, V] after the next loop."""
        carry = self._carry.get(criterion)
        if carry is None:
            carry = torch.tensor(first_carry(criterion, logits.shape[-1]), device=logits.device)
            carry = carry.expand(len(logits), -1)
        value, self._carry[criterion] = output_value(criterion, logits, carry)
        return value


@dataclass(frozen=True)
class RavenPass(Pass):
    """A loop; `outputs` are those of the loops before."""

    outputs: Outputs


class RavenForCausalLM(LoopedReference):
    """`logits_t = head(coda(s_d)_t)` with `s_r = core(adapter([s_{r-1}, e]))`, `e` the output of
    the prelude. Module names are those of the checkpoint.

    `initial_state`: as the engine's option, or a table [positions, H]. `seed`: of noise. `forward`
    and `generate` take both too.
    """

    config_class = RavenConfig
    config: RavenConfig
    exit_rule_class = CriterionRule
    initial_state: str | torch.Tensor = first.NOISE
    seed: int = 0
    _supports_sdpa = True
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "transformer.wte.weight"}
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [ROTARY_TABLE]

    def __init__(self, config: RavenConfig) -> None:
        config.check()
        super().__init__(config)
        assert config.padded_vocab_size is not None
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers. Raises `ValueError` for tensors that fit no family, and that names
        missing, unexpected or misshapen ones."""
        source, config = str(pretrained_model_name_or_path), kwargs.pop("config", None)
        if not isinstance(config, RavenConfig):
            config = RavenConfig.from_pretrained(source, revision=kwargs.get("revision"))
        config.settle(source, kwargs.get("revision"))
        return super().from_pretrained(source, *args, config=config, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer.wte

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.transformer.wte = value

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Norm):
            init.ones_(module.weight)
        elif isinstance(module, Attention) and hasattr(module, "qk_bias"):
            init.zeros_(module.qk_bias)
        elif isinstance(module, nn.Linear | nn.Embedding):
            init.normal_(module.weight, std=self.config.state_std)

    def positions(
        self,
        hidden: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> Rows:
        """Of hidden states [B, T, H]. Those valid by `attention_mask` [B, T] are attended to."""
        if position_ids is None:
            position_ids = position_ids_of(hidden, attention_mask)
        positions = position_ids.expand(hidden.shape[:2])
        settings, size = self.config.rope_settings, self.config.head_dim
        assert size is not None
        every = torch.arange(0, size, 2, dtype=torch.float32, device=positions.device) / size
        if settings["rope_type"] == "default":
            turns = 1.0 / (settings["rope_theta"] ** every)
        else:
            turns = self._scaled(settings, positions.device)
        angles = positions[..., None].float() * turns
        order = torch.arange(positions.shape[1], device=positions.device)
        mask = (order[:, None] >= order)[None, None]
        if attention_mask is not None:
            # Rows that pad attend to themselves, so that no row is NaN.
            mask = mask & (attention_mask[:, None, None].bool() | (order[:, None] == order))
        return Rows(positions, angles.cos()[:, :, None], angles.sin()[:, :, None], mask)

    def _scaled(self, settings: dict[str, Any], device: torch.device) -> torch.Tensor:
        """The frequencies of a scaled RoPE [D/2], as transformers computes them."""
        config = copy.copy(self.config)
        config.rope_parameters = settings
        turns, factor = ROPE_INIT_FUNCTIONS[settings["rope_type"]](config, device)
        assert factor == 1.0, f"rope_type={settings['rope_type']!r} scales attention"
        return turns

    def first_state(self, positions: torch.Tensor) -> torch.Tensor:
        """`s_0` [B, T, H] of `positions` [B, T]. Raises `ValueError` for those beyond a table."""
        initial_state, seed = self.initial_state, self.seed
        config = self.config
        shape = (*positions.shape, config.n_embd)
        if isinstance(initial_state, str) and initial_state == first.ZEROS:
            return torch.zeros(shape, device=positions.device, dtype=self.dtype)
        if isinstance(initial_state, str) and initial_state == first.NOISE:
            flat = positions.flatten()
            seeds = torch.full_like(flat, first.signed(seed))
            drawn = first.noise(seeds, flat, config.n_embd, config.state_std)
            return (drawn * config.embed_scale).to(self.dtype).view(shape)
        table = (
            initial_state
            if isinstance(initial_state, torch.Tensor)
            else first.load_table(initial_state, config.n_embd)
        )
        if int(positions.max()) >= len(table):
            raise ValueError(
                f"position {int(positions.max())} is beyond the {len(table)} of initial_state; "
                "give a longer table or a shorter sequence"
            )
        return table.to(positions.device, self.dtype)[positions]

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        return super().embed(input_ids) * self.config.embed_scale

    def encode(self, embedded: torch.Tensor, rows: Rows) -> torch.Tensor:
        """Embedded tokens [B, T, H] -> the constant input `e` [B, T, H]."""
        for block in self.transformer.prelude:
            embedded = block(embedded, rows)
        return embedded

    def refine(self, state: torch.Tensor, injected: torch.Tensor, rows: Rows) -> torch.Tensor:
        """One loop: `s_{r-1}` -> `s_r`, [B, T, H]."""
        hidden = self.transformer.adapter(torch.cat([state, injected], dim=-1))
        for block in self.transformer.core_block:
            hidden = block(hidden, rows)
        return hidden

    def loop(self, embedded: torch.Tensor, positions: Rows) -> Iterator[RavenPass]:
        injected, outputs = self.encode(embedded, positions), Outputs()
        state = self.first_state(positions.positions)
        for depth in range(1, self.config.max_loops + 1):
            refined = self.refine(state, injected, positions)
            yield RavenPass(depth, state, refined, outputs)
            state = refined

    def exit_values(
        self, loop_pass: RavenPass, positions: Rows, where: Any
    ) -> dict[str, torch.Tensor]:
        """The values of the latent criteria, and that of the config if it is an output one. To be
        asked once after each loop, about the same positions."""
        own = (self.config.halting_strategy,)
        return self._values(loop_pass, positions, where, set(own) & set(OUTPUT))

    def traced_values(
        self, loop_pass: RavenPass, positions: Rows, where: Any
    ) -> dict[str, torch.Tensor]:
        """The values of all criteria."""
        return self._values(loop_pass, positions, where, OUTPUT)

    def _values(
        self, loop_pass: RavenPass, positions: Rows, where: Any, outputs: Collection[str]
    ) -> dict[str, torch.Tensor]:
        before, after = loop_pass.before[where], loop_pass.state[where]
        values = {"step_length": loop_pass.step_length(where)}
        values |= {name: latent_evidence(name, before, after) for name in LATENT}
        if outputs:
            logits = self.head(self.decode_hidden(loop_pass.state, positions)[where]).float()
            values |= {name: loop_pass.outputs.value(name, logits) for name in outputs}
        return values

    def decode_hidden(self, state: torch.Tensor, positions: Rows) -> torch.Tensor:
        if self.config.family.norms_state:
            state = self.transformer.ln_f(state)
        for block in self.transformer.coda:
            state = block(state, positions)
        hidden: torch.Tensor = self.transformer.ln_f(state)
        return hidden

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.lm_head(hidden)
        return logits

    def forward(
        self,
        *args: Any,
        initial_state: str | torch.Tensor | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> LoopedOutput:
        """As in the base, with a first state of this call."""
        usual = self.initial_state, self.seed
        self.initial_state = usual[0] if initial_state is None else initial_state
        self.seed = usual[1] if seed is None else seed
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.initial_state, self.seed = usual

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        initial_state: str | torch.Tensor | None = None,
        seed: int | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(input_ids, attention_mask)
        return {**inputs, "initial_state": initial_state, "seed": seed}
