"""What guessed positions could reach for given costs, with no host at all: the yardstick of
`benchmarks/host.py --speculate`.

Each sequence has positions in flight at falling depths. In every pass all of them go one depth
deeper. After it, the newest one that has made `draft_depth` passes guesses the next, and those that
have exited give their tokens in order, as far as guesses were right. A wrong guess costs all
positions after it. It shares no code with the engine.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from vllm_loopus.bench.policy import Costs, Simulated


@dataclass
class _Wave:
    """`flight`: depths of the positions in flight, the oldest first, of the tokens from `token`
    on."""

    exits: Sequence[int]
    right: Sequence[int]
    token: int = 0
    flight: list[int] = field(default_factory=lambda: [0])
    done: list[int] = field(default_factory=list)  # positions computed, by depth

    def __post_init__(self) -> None:
        self.done = [0] * (max(self.exits) + 1)

    def exit_of(self, place: int) -> int:
        return self.exits[min(self.token + place, len(self.exits) - 1)]

    def deepen(self) -> int:
        """One pass: the rows that it takes, those of positions that come along included."""
        rows, limit = 0, len(self.done)
        for place, depth in enumerate(self.flight):
            if depth >= self.exit_of(place):
                continue
            if depth < limit:
                self.flight[place] = depth + 1
                rows += self.token + place + 1 - self.done[depth + 1]
                self.done[depth + 1] = self.token + place + 1
            limit = min(limit, depth)
        return rows

    def guess(self, draft_depth: int, lookahead: int) -> bool:
        """Whether the newest position guesses after this pass; then the next one begins."""
        place = len(self.flight) - 1
        leaves = self.flight[0] >= self.exit_of(0)
        if place >= lookahead + leaves or self.token + place + 1 >= len(self.exits):
            return False
        exited = self.flight[-1] >= self.exit_of(place)
        if (self.flight[-1] < draft_depth and not exited) or (exited and place == 0):
            return False
        self.flight.append(0)
        return True

    def emit(self) -> int:
        """How many tokens there are after this pass."""
        first = self.token
        while self.token < len(self.exits) and self.flight[0] >= self.exit_of(0):
            right = self.right[self.token] and len(self.flight) > 1
            self.token += 1
            if right:
                self.flight.pop(0)
                continue
            self.flight = [0]
            self.done = [min(computed, self.token) for computed in self.done]
        return self.token - first


def simulate_waves(
    costs: Costs,
    exits: Sequence[Sequence[int]],
    right: Sequence[Sequence[int]],
    max_seqs: int,
    draft_depth: int,
    lookahead: int,
) -> Simulated:
    """Requests with given exit depths. `right`: whether the guess of each token is right."""
    waiting = [_Wave(*one) for one in zip(exits, right, strict=True)][::-1]
    tokens = sum(map(len, exits))
    running: list[_Wave] = []
    time, passes, rows = 0.0, 0, 0
    while waiting or running:
        while waiting and len(running) < max_seqs:
            running.append(waiting.pop())
        if n := sum(wave.deepen() for wave in running):
            time += costs.c0 + costs.c1 * n
            passes, rows = passes + 1, rows + n
        guessed = sum(wave.guess(draft_depth, lookahead) for wave in running)
        gave = sum(wave.emit() for wave in running)
        if guessed or gave:
            time += costs.d0 + costs.d1 * gave + costs.d2 * (guessed + gave)
        running = [wave for wave in running if wave.token < len(wave.exits)]
    return Simulated(1e3 * tokens / time, passes / tokens, rows / max(passes, 1))
