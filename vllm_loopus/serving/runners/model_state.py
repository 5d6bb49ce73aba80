"""The V2 runner's hook for our model: gives its forward what the loop has computed."""

from typing import Any

from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from vllm_loopus.serving.passes import Decoded


class LoopUSModelState(DefaultModelState):
    """While `decoded` is set, the model's forward returns its rows and attends to nothing; without
    it, as in vLLM's own profiling, the forward is the fixed loop."""

    decoded: Decoded | None = None

    def prepare_attn(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if self.decoded is None:
            return super().prepare_attn(*args, **kwargs)
        return {}

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        if self.decoded is None:
            inputs: dict[str, Any] = super().prepare_inputs(input_batch, req_states)
            return inputs
        return {"decoded": self.decoded.in_order(input_batch.req_ids)}
