"""What engines are asked: seeded requests, written once and given to all of them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from vllm_loopus.bench.models import FIRST_TOKEN
from vllm_loopus.bench.policy import geometric


@dataclass(frozen=True)
class Request:
    """`exits`: the depth at which each token is to leave, or None for the head's own choice.
    `knobs`: further knobs. `arrival`: when it comes, in mean gaps between arrivals; 0 at once."""

    prompt: list[int]
    tokens: int
    exits: list[int] | None = None
    knobs: dict[str, Any] = field(default_factory=dict)
    arrival: float = 0.0


@dataclass(frozen=True)
class Workload:
    """Requests in the order in which they come."""

    name: str
    requests: list[Request]

    @property
    def tokens(self) -> int:
        return sum(request.tokens for request in self.requests)

    @property
    def longest(self) -> int:
        return max(len(request.prompt) + request.tokens for request in self.requests)

    @property
    def mean_depth(self) -> float | None:
        """Of exits that are given."""
        exits = [depth for request in self.requests for depth in request.exits or ()]
        return float(np.mean(exits)) if exits else None

    def at_depth(self, depth: int) -> "Workload":
        """The same requests, every token at one depth, and known to go there: early exit off at the
        deepest (`fixed`)."""
        return Workload(
            self.name,
            [
                replace(r, exits=[depth] * r.tokens, knobs={**r.knobs, "min_loops": depth})
                for r in self.requests
            ],
        )

    def with_exits(self, exits: Sequence[list[int]]) -> "Workload":
        """The same requests with other depths, such as a recorded trace's."""
        pairs = zip(self.requests, exits, strict=True)
        return Workload(self.name, [replace(request, exits=depths) for request, depths in pairs])

    def without_exits(self, **knobs: Any) -> "Workload":
        """The same requests; where tokens leave is the model's own affair, by these knobs."""
        return Workload(
            self.name, [replace(request, exits=None, knobs=knobs) for request in self.requests]
        )

    def to_json(self) -> list[dict[str, Any]]:
        return [asdict(request) for request in self.requests]


class Generator:
    """Draws workloads for a model. `mean`: of the depths' law, a truncated geometric one."""

    def __init__(self, vocabulary: int, max_loops: int, mean: float) -> None:
        self._vocabulary, self._max_loops, self._mean = vocabulary, max_loops, mean

    def decode(
        self, seed: int, count: int, prompt: int, tokens: int, mean: float | None = None
    ) -> Workload:
        """Short prompts of one length, answers of one length, all there at once."""
        rng = np.random.default_rng(seed)
        exits = self._exits(rng, (count, tokens), mean).tolist()
        prompts = [self._prompt(rng, prompt) for _ in range(count)]
        pairs = zip(prompts, exits, strict=True)
        return Workload("decode", [Request(text, tokens, depths) for text, depths in pairs])

    def mixed(
        self, seed: int, count: int, longest_prompt: int, longest_answer: int, load: float
    ) -> Workload:
        """Long-tailed lengths, Poisson arrivals; `load`: arrivals in the time that an engine with
        early exit off needs for one request when it is busy (see `arrivals` of the worker)."""
        rng = np.random.default_rng(seed)
        prompts = np.clip(rng.lognormal(np.log(longest_prompt / 8), 0.9, count), 4, longest_prompt)
        answers = np.clip(rng.lognormal(np.log(longest_answer / 4), 0.6, count), 2, longest_answer)
        times = np.cumsum(rng.exponential(1 / load, count))
        requests = []
        for prompt, answer, time in zip(prompts, answers, times, strict=True):
            exits = self._exits(rng, int(answer), None).tolist()
            text = self._prompt(rng, int(prompt))
            requests.append(Request(text, int(answer), exits, arrival=float(time)))
        return Workload("mixed", requests)

    def long(self, seed: int, count: int, shortest: int, longest: int, tokens: int) -> Workload:
        """Long contexts, log-uniform lengths."""
        rng = np.random.default_rng(seed)
        lengths = np.exp(rng.uniform(np.log(shortest), np.log(longest), count)).astype(int)
        requests = []
        for length in lengths:
            exits = self._exits(rng, tokens, None).tolist()
            requests.append(Request(self._prompt(rng, length), tokens, exits))
        return Workload("long", requests)

    def _prompt(self, rng: Any, length: int) -> list[int]:
        tokens: list[int] = rng.integers(FIRST_TOKEN, self._vocabulary, length).tolist()
        return tokens

    def _exits(self, rng: Any, shape: Any, mean: float | None) -> Any:
        """Depths of the law in random order, each as often as the law says: their mean is its."""
        law = geometric(self._mean if mean is None else mean, self._max_loops)
        count = int(np.prod(shape))
        ranks = (np.arange(count) + 0.5) / count
        depths = np.searchsorted(np.cumsum(law), ranks).clip(max=self._max_loops - 1) + 1
        return rng.permutation(depths).reshape(shape)
