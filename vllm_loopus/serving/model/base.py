"""What looped models for vLLM share."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from vllm_loopus.serving.model.seam import LoopedModel


class LoopedModelBase(nn.Module, LoopedModel):
    """The base class of models for the engine.

    The engine calls `encode`, `refine`, `exit_evidence` and `decode` as a step needs them. vLLM's
    own runner calls `forward`, which takes all rows to full depth: it is what memory profiling
    measures.
    """

    # vLLM loads what the first pattern with a match finds: a folder may hold other tensors.
    allow_patterns_overrides: ClassVar[Sequence[str]] = (
        "model*.safetensors",
        "*.safetensors",
        "*.bin",
    )

    # Read by quantisation methods; a checkpoint may store these merged already.
    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    lm_head: ParallelLMHead
    logits_processor: LogitsProcessor
    reads_depth = False
    reads_seed = False
    is_served = False  # from the start of the engine on; trainers then send weights in parts

    def __init__(self, vllm_config: VllmConfig) -> None:
        """A subclass sets `planes`, `logits_processor`, and `lm_head` unless `head` is another."""
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        self.max_loops: int = self.config.max_loops
        self.model_name = vllm_config.model_config.model
        self.quant_config = vllm_config.quant_config

    @abstractmethod
    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token ids [T] -> embedded tokens [T, H]; part of vLLM's model interface."""

    def encode(
        self, input_ids: torch.Tensor, positions: torch.Tensor, *seed: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """The embedded tokens, for a model without layers before the loop."""
        return (self.embed_input_ids(input_ids),)

    @property
    def head(self) -> nn.Module:
        """What `compute_logits` multiplies with."""
        return self.lm_head

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Hidden states [M, H] -> logits [M, V]; part of vLLM's model interface."""
        return self.logits_processor(self.head, hidden_states)

    def get_top_tokens(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.logits_processor.get_top_tokens(self.head, hidden_states)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: object = None,
        inputs_embeds: torch.Tensor | None = None,
        decoded: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Token ids [T] at positions [T] -> hidden states [T, H] at full depth.

        `decoded`: these hidden states, if the engine has computed them. `inputs_embeds` is vLLM's;
        prompts given as embeddings are refused at start.
        """
        if decoded is not None:
            return decoded
        assert inputs_embeds is None
        seed = (torch.zeros_like(positions),) if self.reads_seed else ()
        state, *injected = self.encode(input_ids, positions, *seed)
        for depth in range(1, self.max_loops + 1):
            depths = torch.full_like(positions, depth) if self.reads_depth else None
            with self.planes.at_depth(depth):
                state, _ = self.refine(state, positions, depths, *injected)
        with self.planes.at_depth(self.max_loops):
            return self.decode(state, positions)

    @staticmethod
    def get_model_state_cls() -> type[Any]:
        """vLLM's hook: what its V2 model runner asks for inputs and attention metadata."""
        from vllm_loopus.serving.model.model_state import LoopedModelState

        return LoopedModelState
