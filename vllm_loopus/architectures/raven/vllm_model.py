"""`RavenForCausalLM` as vLLM runs it, made of vLLM's own layers."""

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.utils import maybe_prefix

from vllm_loopus.architectures.raven import initial_state as first
from vllm_loopus.architectures.raven.config import RavenConfig
from vllm_loopus.architectures.raven.criteria import latent_evidence, reads_logits
from vllm_loopus.architectures.raven.reference import ROTARY_TABLE
from vllm_loopus.architectures.raven.reference import RavenForCausalLM as Reference
from vllm_loopus.serving.knobs.engine import EngineOptions
from vllm_loopus.serving.model.base import LoopedModelBase
from vllm_loopus.serving.model.loading import load_checked
from vllm_loopus.serving.model.padded_heads import pad_heads
from vllm_loopus.serving.model.planes import Planes


def _config(vllm_config: VllmConfig) -> RavenConfig:
    config: RavenConfig = vllm_config.model_config.hf_config
    return config


class WholeNorm(nn.Module):
    """RMSNorm over all heads of a query or key, of which this rank has some (OLMo-2)."""

    def __init__(self, heads: int, size: int, eps: float) -> None:
        """`heads`: of all ranks, of `size` numbers each."""
        super().__init__()
        ranks = get_tensor_model_parallel_world_size()
        self.copies = max(ranks // heads, 1)  # ranks with the same heads
        self.total, self.eps, self.ranks = heads * size, eps, ranks
        self.weight = nn.Parameter(torch.ones(max(heads // ranks, 1) * size))
        self.weight.weight_loader = self._load  # type: ignore[attr-defined]

    def _load(self, param: nn.Parameter, loaded: torch.Tensor) -> None:
        place = get_tensor_model_parallel_rank() // self.copies
        param.data.copy_(loaded.narrow(0, place * len(param), len(param)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        squares = wide.square().sum(-1, keepdim=True)
        if self.ranks > 1:
            squares = tensor_model_parallel_all_reduce(squares) / self.copies
        wide = wide * torch.rsqrt(squares / self.total + self.eps)
        return wide.to(x.dtype) * self.weight


class RavenAttention(nn.Module):
    """Fused q, k, v with the bias, norm and rotation of the family."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config, quant = _config(vllm_config), vllm_config.quant_config
        family, heads = config.family, config.n_heads
        kv_heads, self.head_dim = config.num_key_value_heads, config.head_dim or 0
        assert kv_heads is not None
        ranks = get_tensor_model_parallel_world_size()
        self.num_heads, self.num_kv_heads = heads // ranks, max(kv_heads // ranks, 1)
        self.Wqkv = QKVParallelLinear(
            config.n_embd,
            self.head_dim,
            heads,
            kv_heads,
            bias=False,
            quant_config=quant,
            prefix=f"{prefix}.Wqkv",
        )
        self.proj = RowParallelLinear(
            heads * self.head_dim,
            config.n_embd,
            bias=False,
            quant_config=quant,
            prefix=f"{prefix}.proj",
        )
        if config.qk_bias:
            self.qk_bias = nn.Parameter(torch.zeros(2, 1, self.num_heads, self.head_dim))
            self.qk_bias.weight_loader = _load_heads  # type: ignore[attr-defined]
        if family.norms_qk:
            self.q_norm = WholeNorm(heads, self.head_dim, config.norm_eps)
            self.k_norm = WholeNorm(kv_heads, self.head_dim, config.norm_eps)
        # The original rotates in float32, but for the Llama layout.
        self.rotates_wide = family.placed != "input"
        self.rotary_emb = get_rope(
            self.head_dim,
            max_position=config.max_position_embeddings or config.block_size,
            is_neox_style=not family.interleaved,
            rope_parameters=config.rope_settings,
            dtype=torch.float32 if self.rotates_wide else None,
        )
        self.scaling = self.head_dim**-0.5
        self.attn = Attention(
            self.num_heads,
            self.head_dim,
            self.scaling,
            num_kv_heads=self.num_kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=quant,
            prefix=f"{prefix}.attn",
        )
        pad_heads(self, vllm_config)

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Normed hidden states [T, H] at `positions` [T] -> what the branch adds [T, H]."""
        size = self.head_dim
        widths = [self.num_heads * size, self.num_kv_heads * size, self.num_kv_heads * size]
        qkv, _ = self.Wqkv(x)
        q, k, v = qkv.split(widths, dim=-1)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        if hasattr(self, "qk_bias"):
            q = (q.unflatten(-1, (-1, size)) + self.qk_bias[0]).flatten(1)
            k = (k.unflatten(-1, (-1, size)) + self.qk_bias[1]).flatten(1)
        if self.rotates_wide:
            wide_q, wide_k = self.rotary_emb(positions, q.float(), k.float())
            q, k = wide_q.to(x.dtype), wide_k.to(x.dtype)
        else:
            q, k = self.rotary_emb(positions, q.contiguous(), k.contiguous())
        output: torch.Tensor = self.proj(self.attn(q, k, v))[0]
        return output


def _load_heads(param: nn.Parameter, loaded: torch.Tensor) -> None:
    """The bias [2, 1, heads, size] of this rank's heads."""
    heads = param.shape[2]
    param.data.copy_(loaded.narrow(2, get_tensor_model_parallel_rank() * heads, heads))


class RavenMLP(nn.Module):
    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config, quant = _config(vllm_config), vllm_config.quant_config
        self.fc = MergedColumnParallelLinear(
            config.n_embd,
            [config.intermediate_size] * 2,
            bias=False,
            quant_config=quant,
            prefix=f"{prefix}.fc",
        )
        self.proj = RowParallelLinear(
            config.intermediate_size,
            config.n_embd,
            bias=False,
            quant_config=quant,
            prefix=f"{prefix}.proj",
        )
        self.act_fn = SiluAndMul()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.proj(self.act_fn(self.fc(x)[0]))[0]
        return output


class RavenBlock(nn.Module):
    """A block: `attend`, then `finish`. `forward` does both, and may overwrite its input."""

    norm_1: RMSNorm
    norm_2: RMSNorm
    norm_3: RMSNorm
    norm_4: RMSNorm

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config = _config(vllm_config)
        self.placed = config.family.placed
        for number in range(1, config.family.norms + 1):
            self.add_module(f"norm_{number}", RMSNorm(config.n_embd, config.norm_eps))
        self.attn = RavenAttention(vllm_config, f"{prefix}.attn")
        self.mlp = RavenMLP(vllm_config, f"{prefix}.mlp")

    def attend(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The attention branch, [T, H] -> [T, H]."""
        if self.placed == "output":
            return x + self.norm_1(self.attn(x, positions))
        x = x + self.attn(self.norm_1(x), positions)
        return self.norm_2(x) if self.placed == "sum" else x

    def finish(self, x: torch.Tensor) -> torch.Tensor:
        """The MLP branch, [M, H] -> [M, H], of any rows."""
        if self.placed == "output":
            return x + self.norm_2(self.mlp(x))
        if self.placed == "input":
            return x + self.mlp(self.norm_2(x))
        return self.norm_4(x + self.mlp(self.norm_3(x)))

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        if self.placed == "output":
            return self.finish(self.attend(x, positions))
        # vLLM's norms add and norm in one kernel, in place.
        normed, x = self.norm_2(self.attn(self.norm_1(x), positions), x)
        if self.placed == "input":
            return x + self.mlp(normed)
        finished: torch.Tensor = self.norm_4(self.mlp(self.norm_3(normed)), normed)[0]
        return finished


class Transformer(nn.Module):
    """What the checkpoint has under `transformer.`"""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config, quant = _config(vllm_config), vllm_config.quant_config

        def blocks(part: str, count: int) -> nn.ModuleList:
            names = (f"{prefix}.{part}.{number}" for number in range(count))
            return nn.ModuleList(RavenBlock(vllm_config, name) for name in names)

        assert config.padded_vocab_size is not None
        self.wte = VocabParallelEmbedding(
            config.padded_vocab_size, config.n_embd, quant_config=quant, prefix=f"{prefix}.wte"
        )
        self.prelude = blocks("prelude", config.n_layers_in_prelude)
        self.adapter = ColumnParallelLinear(
            2 * config.n_embd,
            config.n_embd,
            bias=False,
            gather_output=True,
            quant_config=quant,
            prefix=f"{prefix}.adapter",
        )
        self.core_block = blocks("core_block", config.n_layers_in_recurrent_block)
        self.coda = blocks("coda", config.n_layers_in_coda)
        self.ln_f = RMSNorm(config.n_embd, config.norm_eps)


class RavenForCausalLM(LoopedModelBase):
    """Huginn and retrofitted recurrence for vLLM (`seam.LoopedModel`).

    With an output criterion, every pass also runs the coda, at the depth of its rows: so the coda's
    K/V is there wherever the core's is, and the rule can look at the logits after every pass. The
    MLP of the last block runs only on the rows that the rule is asked about (`exit_evidence`).
    """

    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {"Wqkv": ["Wqkv"], "fc": ["fc"]}

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config)
        config: RavenConfig = self.config
        self.transformer = body = Transformer(vllm_config, maybe_prefix(prefix, "transformer"))
        assert config.padded_vocab_size is not None
        self.lm_head = ParallelLMHead(
            config.padded_vocab_size,
            config.n_embd,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if config.tie_embeddings:
            self.lm_head = self.lm_head.tie_weights(body.wte)
        self.logits_processor = LogitsProcessor(config.padded_vocab_size)
        self.criterion = config.halting_strategy
        self.planes = Planes(
            body.prelude,
            body.core_block,
            body.coda,
            vllm_config=vllm_config,
            state_size=config.n_embd,
            injected_size=config.n_embd,
            decodes_in_passes=reads_logits(self.criterion),
        )
        chosen = EngineOptions.of(vllm_config.additional_config).initial_state
        self.reads_seed = chosen in (None, first.NOISE)
        self.table: torch.Tensor | None
        table = None
        if chosen not in (None, first.NOISE, first.ZEROS):
            table = first.load_table(chosen, config.n_embd)
            table = table.to(torch.get_default_device(), torch.get_default_dtype())
        self.register_buffer("table", table, persistent=False)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        embedded: torch.Tensor = self.transformer.wte(input_ids)
        scale = self.config.embed_scale
        return embedded if scale == 1 else embedded * scale

    def encode(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        *seed: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Token ids [T] -> the first state and the constant input, [T, H] each."""
        hidden = self.embed_input_ids(input_ids)
        for block in self.transformer.prelude:
            hidden = block(hidden, positions)
        return self._first_state(hidden, positions, *seed), hidden

    def _first_state(
        self, like: torch.Tensor, positions: torch.Tensor, seed: torch.Tensor | None = None
    ) -> torch.Tensor:
        config = self.config
        if self.table is not None:
            # Requests end before the table does; vLLM's profiling does not.
            return self.table.index_select(0, positions.clamp(max=len(self.table) - 1))
        if seed is None:
            return torch.zeros_like(like)
        drawn = first.noise(seed, positions, config.n_embd, config.state_std)
        return (drawn * config.embed_scale).to(like.dtype)

    def refine(
        self,
        state: torch.Tensor,
        positions: torch.Tensor,
        depth: torch.Tensor | None = None,
        injected: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`s_{r-1}` -> `s_r`, [T, H], and what the rule looks at: the value of a latent criterion
        [T], or for an output criterion what comes before the last MLP of the coda [T, H]."""
        assert injected is not None
        refined: torch.Tensor = self.transformer.adapter(torch.cat([state, injected], dim=-1))[0]
        for block in self.transformer.core_block:
            refined = block(refined, positions)
        if reads_logits(self.criterion):
            return refined, self._attend_in_coda(refined, positions)
        if self.criterion == "none":
            return refined, refined
        return refined, latent_evidence(self.criterion, state, refined)

    def _attend_in_coda(self, state: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The coda without its last MLP, [T, H] -> [T, H]."""
        body = self.transformer
        hidden = body.ln_f(state) if self.config.family.norms_state else state.clone()
        *before, last = [*body.coda] or [None]
        for block in before:
            hidden = block(hidden, positions)
        return last.attend(hidden, positions) if isinstance(last, RavenBlock) else hidden

    def _finish_coda(self, attended: torch.Tensor) -> torch.Tensor:
        body = self.transformer
        for block in body.coda[-1:]:
            assert isinstance(block, RavenBlock)
            attended = block.finish(attended)
        normed: torch.Tensor = body.ln_f(attended)
        return normed

    def exit_evidence(self, observed: torch.Tensor) -> torch.Tensor:
        """The value of a latent criterion [S], or logits [S, V]."""
        if reads_logits(self.criterion):
            logits = self.compute_logits(self._finish_coda(observed))
            assert logits is not None
            return logits.float()
        return observed if observed.dim() == 1 else observed.new_zeros(len(observed)).float()

    def decode(
        self, state: torch.Tensor, positions: torch.Tensor, wanted: torch.Tensor | None = None
    ) -> torch.Tensor:
        attended = self._attend_in_coda(state, positions)
        if wanted is None:
            return self._finish_coda(attended)
        finished = self._finish_coda(attended.index_select(0, wanted))
        return torch.zeros_like(attended).index_copy_(0, wanted, finished)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """See `load_checked`. What the checkpoint has twice is left out: the head of a tied one,
        and the rotary table."""
        tied = self.config.tie_embeddings
        left_out = (ROTARY_TABLE, "lm_head.weight") if tied else (ROTARY_TABLE,)
        return load_checked(
            self,
            ((name, tensor) for name, tensor in weights if name not in left_out),
            Reference,
            mapper=None,
        )
