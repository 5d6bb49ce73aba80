"""Log-probabilities of prompts on the V2 runner, part by part.

As `v1_prompt_scores.py`. vLLM's own worker for them is called as for a batch of one prompt in
chunks, one worker for each prompt; this class replaces it in the runner.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker

from vllm_loopus.serving.compat import PROMPT_WORKER_DEVICE


@dataclass
class _Prompt:
    """A prompt under way, or scored."""

    worker: PromptLogprobsWorker
    tokens: torch.Tensor  # [1, P + 1]; vLLM's kernel reads one token past the prompt
    length: int
    complete: bool = False
    scores: Any = None
    token_id_scores: Any = None


class V2PromptScores:
    """`PromptScorer` for the V2 runner, and its `prompt_logprobs_worker`."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._prompts: dict[str, _Prompt] = {}

    def begin(self, request_id: str, tokens: list[int], params: Any) -> None:
        """A prompt is to be scored, from its first position on."""
        device = self._runner.device
        options = {"logprobs_mode": self._runner.model_config.logprobs_mode}
        if PROMPT_WORKER_DEVICE.is_there:
            options["device"] = device
        worker = PromptLogprobsWorker(1, **options)
        worker.add_request(request_id, 0, params)
        padded = torch.tensor([[*tokens, 0]], dtype=torch.int32, device=device)
        self._prompts[request_id] = _Prompt(worker, padded, len(tokens))

    def wants(self, request_id: str) -> bool:
        return request_id in self._prompts and not self._prompts[request_id].complete

    def score(self, request_id: str, start: int, hidden: torch.Tensor) -> None:
        prompt = self._prompts[request_id]
        batch = _batch_of(request_id, prompt.length, start, hidden)
        lengths = np.array([prompt.length], dtype=np.int32)
        logits_of: Callable[..., Any] = self._runner.model.compute_logits
        computed = torch.tensor([start], dtype=torch.int32, device=hidden.device)
        found = prompt.worker.compute_prompt_logprobs(
            logits_of, hidden, batch, prompt.tokens, computed, lengths
        )
        prompt.scores = found.get(request_id)
        compute_ids = getattr(prompt.worker, "compute_prompt_token_id_logprobs", None)
        if compute_ids is not None:  # not in every release of the range
            of_ids = compute_ids(logits_of, hidden, batch, lengths)
            prompt.token_id_scores = of_ids.get(request_id)
        prompt.complete = start + len(hidden) == prompt.length

    def forget(self, request_id: str) -> None:
        """The request has ended or was preempted."""
        self._prompts.pop(request_id, None)

    # What the runner asks of its `PromptLogprobsWorker`.

    def add_request(self, *_args: Any) -> None:
        """`begin` was called before."""

    def remove_request(self, request_id: str) -> None:
        """`forget` is called for the loop's own reasons."""

    def compute_prompt_logprobs(
        self, logits_fn: Any, hidden_states: Any, input_batch: Any, *_args: Any
    ) -> dict[str, Any]:
        """The complete scores of the requests of a batch, once."""
        result = {}
        for request_id in input_batch.req_ids:
            prompt = self._prompts.get(request_id)
            if prompt is not None and prompt.scores is not None:
                result[request_id], prompt.scores = prompt.scores, None
        return result

    def compute_prompt_token_id_logprobs(
        self, logits_fn: Any, hidden_states: Any, input_batch: Any, *_args: Any
    ) -> dict[str, Any]:
        """The same for scores of given token ids."""
        result = {}
        for request_id in input_batch.req_ids:
            prompt = self._prompts.get(request_id)
            if prompt is not None and prompt.token_id_scores is not None:
                result[request_id], prompt.token_id_scores = prompt.token_id_scores, None
        return result


def _batch_of(request_id: str, length: int, start: int, hidden: torch.Tensor) -> Any:
    """A batch of one request, of whose prompt a chunk is computed."""
    count, device = len(hidden), hidden.device
    return SimpleNamespace(
        req_ids=[request_id],
        num_tokens=count,
        idx_mapping=torch.zeros(1, dtype=torch.int32, device=device),
        idx_mapping_np=np.zeros(1, dtype=np.int32),
        prefill_len_np=np.array([length], dtype=np.int32),
        num_computed_prefill_tokens_np=np.array([start], dtype=np.int32),
        num_scheduled_tokens=np.array([count], dtype=np.int32),
        query_start_loc_np=np.array([0, count], dtype=np.int32),
        query_start_loc=torch.tensor([0, count], dtype=torch.int32, device=device),
    )
