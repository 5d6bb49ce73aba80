"""What looped models for vLLM share."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from vllm_loopus.serving.model.planes import Planes


class LoopedModelBase(nn.Module):
    """The base class of models that satisfy `seam.LoopedModel`.

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

    planes: Planes
    max_loops: int
    reads_depth = False
    reads_seed = False
    is_served = False  # from the start of the engine on; trainers then send weights in parts

    @abstractmethod
    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token ids [T] -> embedded tokens [T, H]; part of vLLM's model interface."""

    @abstractmethod
    def encode(
        self, input_ids: torch.Tensor, positions: torch.Tensor, *seed: torch.Tensor
    ) -> tuple[torch.Tensor, ...]: ...

    @abstractmethod
    def refine(
        self,
        state: torch.Tensor,
        positions: torch.Tensor,
        depth: torch.Tensor | None = None,
        injected: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    @abstractmethod
    def exit_evidence(self, observed: torch.Tensor) -> torch.Tensor: ...

    @abstractmethod
    def decode(
        self, state: torch.Tensor, positions: torch.Tensor, wanted: torch.Tensor | None = None
    ) -> torch.Tensor: ...

    @abstractmethod
    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Hidden states [M, H] -> logits [M, V]; part of vLLM's model interface."""

    @abstractmethod
    def get_top_tokens(self, hidden_states: torch.Tensor) -> torch.Tensor: ...

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
