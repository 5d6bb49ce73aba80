"""The V2 runner's hook for our models: gives its forward what the loop has computed."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState


class DecodedRows(Protocol):
    """The hidden states of some requests (`worker/executor.py`)."""

    def in_order(self, request_ids: Sequence[str]) -> torch.Tensor:
        """The hidden states [len(request_ids), H] of these requests, in their order."""
        ...


class LoopedModelState(DefaultModelState):
    """While `decoded` is set, the model's forward returns its rows and attends to nothing. Without
    it, as in vLLM's own profiling, the forward is the fixed loop."""

    decoded: DecodedRows | None = None

    def prepare_attn(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if self.decoded is None:
            return super().prepare_attn(*args, **kwargs)
        return {}

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        if self.decoded is None:
            inputs: dict[str, Any] = super().prepare_inputs(input_batch, req_states)
            return inputs
        return {"decoded": self.decoded.in_order(input_batch.req_ids)}
