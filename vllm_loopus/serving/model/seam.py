"""The interface between the engine and a looped model. `worker/` uses nothing else of a model.

Rows are positions of sequences, T in a call, at individual depths. H is the hidden size.
"""

from abc import abstractmethod
from typing import Protocol

import torch

from vllm_loopus.serving.model.planes import Planes


class LoopedModel(Protocol):
    """A looped model over paged attention. `base.py` has what such models share.

    - `planes`: its memory by depth, and the attention layers of encoder, loop and decoder.
    - `reads_depth`: whether a pass needs to know the depth of each row.
    - `reads_seed`: whether the encoder needs the seed of each row's request.
    """

    planes: Planes
    reads_depth: bool
    reads_seed: bool

    def encode(
        self, input_ids: torch.Tensor, positions: torch.Tensor, *seed: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Token ids [T] at positions [T] -> the first state `h^0` [T, H]; and for a model that
        injects it again in every pass, a constant input [T, I].

        `seed` [T], int64: of each row's request, for a model that `reads_seed` and for no other.
        """
        ...

    @abstractmethod
    def refine(
        self,
        state: torch.Tensor,
        positions: torch.Tensor,
        depth: torch.Tensor | None = None,
        injected: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One pass: `h^{r-1}` [T, H] -> `h^r` [T, H], and what the exit rule looks at [T, ...].

        `depth` [T]: r of each row, if the model `reads_depth`. `injected` [T, I]: the constant
        input that `encode` gave for each row, if any.
        """
        ...

    @abstractmethod
    def exit_evidence(self, observed: torch.Tensor) -> torch.Tensor:
        """The evidence of the exit rule (`modeling/exit_rule.py`), float32 [S] or [S, V], of some
        of the rows that `refine` gave to look at, [S, ...]."""
        ...

    @abstractmethod
    def decode(
        self,
        state: torch.Tensor,
        positions: torch.Tensor,
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`h^d` [T, H] -> hidden states [T, H] for the LM head. Only the rows `wanted` [M] are
        used; None for all."""
        ...

    def get_top_tokens(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Hidden states [M, H] -> the most likely tokens [M] (as vLLM calls it in models that are
        drafted with)."""
        ...
