"""Answers in company against answers alone."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.load.client import TIE, Answer, Client
from tests.load.items import Item
from tests.load.outcome import Outcome

Answered = list[tuple[Item, Answer]]


@dataclass
class Comparison:
    """`different`: requests whose answer alone is another one, for no reason of rounding."""

    checked: int = 0
    ties: int = 0  # other answers where the two best tokens are as good as equal
    different: list[str] = field(default_factory=list)

    def tell(self, outcome: Outcome, least: int) -> None:
        outcome.seen["answers checked against their answers alone"] = self.checked
        outcome.seen["different"] = f"{len(self.different)} ({self.ties} more by rounding)"
        outcome.require(self.checked >= least, f"at least {least} answers are checked")
        outcome.require(not self.different, f"answers equal those alone: {self.different[:3]}")


async def compare(
    address: str, answered: Sequence[tuple[Item, Answer]], count: int, seed: int
) -> Comparison:
    """Asks `count` of them again, one after the other, each with a prefix cache of its own."""
    chosen = random.Random(seed).sample(list(answered), min(count, len(answered)))
    found = Comparison()
    async with Client.to(address) as client:
        for number, (item, answer) in enumerate(chosen):
            by_itself = item.with_fields(cache_salt=f"alone {seed} {number}")
            alone = await client.ask(by_itself)
            if alone is None:
                found.different.append(f"{item.body}: no answer alone: {client.tally}")
                continue
            found.checked += 1
            if alone.same(answer):
                continue
            if await _is_tie(client, by_itself):
                found.ties += 1
            else:
                found.different.append(f"{item.body}: {answer} but alone {alone}")
    return found


async def _is_tie(client: Client, item: Item) -> bool:
    """Whether a greedy answer has two best tokens that are as good as equal."""
    if item.fields["temperature"]:
        return False
    chat = item.endpoint.startswith("chat")
    options = {"logprobs": True, "top_logprobs": 2} if chat else {"logprobs": 2}
    answer = await client.ask(item.with_fields(**options))
    return answer is not None and any(
        gap < TIE for choice in answer.choices.values() for gap in choice.gaps
    )
