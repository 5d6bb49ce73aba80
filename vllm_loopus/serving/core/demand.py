"""How much K/V memory and how many tokens a request will take, learned from those that finished."""


class Demand:
    """The planes that a sequence ends up with, by recursion budget, and its number of new tokens.

    Before any sequence has finished, all planes of the budget are expected, and no new tokens.
    """

    MEMORY = 50  # sequences, roughly

    def __init__(self) -> None:
        self.new_tokens = 0.0
        self.mean_planes: float | None = None  # of all sequences, once one has finished
        self._finished = 0
        self._planes: dict[int, float] = {}
        self._seen: dict[int, int] = {}

    def observe(self, budget: int, planes: float, new_tokens: int) -> None:
        """A sequence has finished with `planes` blocks for each block of depth 1."""
        seen = self._seen[budget] = min(self._seen.get(budget, 1) + 1, self.MEMORY)
        self._planes[budget] = self.planes(budget) + (planes - self.planes(budget)) / seen
        self._finished = min(self._finished + 1, self.MEMORY)
        self.new_tokens += (new_tokens - self.new_tokens) / self._finished
        mean = planes if self.mean_planes is None else self.mean_planes
        self.mean_planes = mean + (planes - mean) / self._finished

    def planes(self, budget: int) -> float:
        """How many blocks a sequence is expected to hold in the end for each block of depth 1."""
        return self._planes.get(budget, float(budget))
