"""Log-probabilities of prompts on the V1 runner, part by part.

All positions of a prompt are scored at the exit depth of the last one, so their hidden states come
when that is known: before vLLM's runner has seen the request. vLLM's own function is called as for
a prompt in chunks, with stand-ins for what it reads about the request. Only the scores are stored.
"""

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch


class _RunnerOfOne:
    """A runner as vLLM's function sees it: with a single request, all else is the real runner's."""

    def __init__(self, runner: Any, request_id: str, tokens: list[int], count: int) -> None:
        """`count`: how many candidates are wanted at each position."""
        self._runner = runner
        self.request = SimpleNamespace(
            prompt_token_ids=tokens, in_progress_prompt_logprobs_cpu=None, num_computed_tokens=0
        )
        self.requests = {request_id: self.request}
        self.num_prompt_logprobs = {request_id: count}
        self.input_batch = SimpleNamespace(req_id_to_index={request_id: 0})
        self.query_start_loc = SimpleNamespace(np=np.zeros(1, dtype=np.int32))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)


class V1PromptScores:
    """`PromptScorer` for the V1 runner."""

    def __init__(self, runner: Any, function: Callable[..., dict[str, Any]]) -> None:
        """`function`: vLLM's `GPUModelRunner._get_prompt_logprobs_dict`, for any runner."""
        self._runner = runner
        self._function = function
        self._open: dict[str, _RunnerOfOne] = {}
        self._complete: dict[str, Any] = {}

    def begin(self, request_id: str, tokens: list[int], params: Any) -> None:
        """A prompt is to be scored, from its first position on."""
        count = params.prompt_logprobs
        if count == -1:  # all of the vocabulary
            count = self._runner.model_config.get_vocab_size()
        self._open[request_id] = _RunnerOfOne(self._runner, request_id, tokens, count)

    def wants(self, request_id: str) -> bool:
        return request_id in self._open

    def score(self, request_id: str, start: int, hidden: torch.Tensor) -> None:
        runner = self._open[request_id]
        runner.request.num_computed_tokens = start
        found = self._function(runner, hidden, {request_id: len(hidden)})
        if request_id in found:
            del self._open[request_id]
            self._complete[request_id] = found[request_id]

    def take(self, request_ids: Iterable[str]) -> dict[str, Any]:
        """The complete scores of these requests, once."""
        names = [name for name in request_ids if name in self._complete]
        return {name: self._complete.pop(name) for name in names}

    def forget(self, request_id: str) -> None:
        """The request has ended or was preempted."""
        self._open.pop(request_id, None)
        self._complete.pop(request_id, None)
