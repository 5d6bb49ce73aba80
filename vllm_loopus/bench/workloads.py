"""What engines are asked: seeded requests, written once and given to all of them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_loopus.bench.models import FIRST_TOKEN
from vllm_loopus.bench.policy import geometric


@dataclass(frozen=True)
class Request:
    """`prompt`: token ids. `tokens`: how many are generated. `exits`: the depth at which each of
    them is to exit, None where the head decides. `knobs`: further knobs. `arrival`: when it comes,
    in mean gaps between arrivals; 0 at once."""

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
        """The same requests with these knobs; the head decides where tokens exit."""
        return Workload(
            self.name, [replace(request, exits=None, knobs=knobs) for request in self.requests]
        )

    def to_json(self) -> list[dict[str, Any]]:
        return [asdict(request) for request in self.requests]


class Generator:
    """Draws workloads for a model. The law of exit depths is a truncated geometric one."""

    def __init__(self, vocabulary: int, max_loops: int, mean: float) -> None:
        """`mean`: of the law."""
        self._vocabulary, self._max_loops, self._mean = vocabulary, max_loops, mean

    def decode(
        self, seed: int, count: int, prompt: int, tokens: int, mean: float | None = None
    ) -> Workload:
        """Short prompts of one length, answers of one length, all there at once."""
        rng = np.random.default_rng(seed)
        exits = self.exits(rng, (count, tokens), mean).tolist()
        prompts = [self.prompt(rng, prompt) for _ in range(count)]
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
            exits = self.exits(rng, int(answer), None).tolist()
            text = self.prompt(rng, int(prompt))
            requests.append(Request(text, int(answer), exits, arrival=float(time)))
        return Workload("mixed", requests)

    def long(self, seed: int, count: int, shortest: int, longest: int, tokens: int) -> Workload:
        """Long contexts, log-uniform lengths."""
        rng = np.random.default_rng(seed)
        lengths = np.exp(rng.uniform(np.log(shortest), np.log(longest), count)).astype(int)
        requests = []
        for length in lengths:
            exits = self.exits(rng, tokens, None).tolist()
            requests.append(Request(self.prompt(rng, length), tokens, exits))
        return Workload("long", requests)

    def prompt(self, rng: np.random.Generator, length: int) -> list[int]:
        """Random token ids."""
        tokens: list[int] = rng.integers(FIRST_TOKEN, self._vocabulary, length).tolist()
        return tokens

    def exits(
        self, rng: np.random.Generator, shape: int | tuple[int, ...], mean: float | None
    ) -> NDArray[np.int64]:
        """Depths of the law in random order, each as often as the law says: their mean is its.
        `mean`: of the law, None for that of the generator."""
        law = geometric(self._mean if mean is None else mean, self._max_loops)
        count = int(np.prod(shape))
        ranks = (np.arange(count) + 0.5) / count
        depths = np.searchsorted(np.cumsum(law), ranks).clip(max=self._max_loops - 1) + 1
        return rng.permutation(depths).reshape(shape)

    def independent_exits(self, rng: np.random.Generator, count: int) -> list[int]:
        """Depths of the law, each drawn by itself: their mean is the law's within chance."""
        law = geometric(self._mean, self._max_loops)
        depths: list[int] = rng.choice(np.arange(1, self._max_loops + 1), count, p=law).tolist()
        return depths
