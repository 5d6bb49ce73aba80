"""The free blocks offered for a step, as they are taken."""

from collections import deque

from vllm_loopus.serving.messages.blocks import BlockOffer


class StepBlocks:
    """One offer, as it is used up."""

    def __init__(self, offer: BlockOffer) -> None:
        self._free = deque(offer.free)
        self._promised = dict(offer.promised)
        self._common = len(self._free) - sum(self._promised.values())
        assert self._common >= 0, "more blocks promised than offered"

    def available(self, request_id: str) -> int:
        """How many blocks the sequence may take."""
        return self._promised.get(request_id, 0) + self._common

    def take(self, request_id: str) -> int:
        """The id of a block; one that was promised to the sequence, while there is any."""
        if self._promised.get(request_id):
            self._promised[request_id] -= 1
        else:
            assert self._common, "no block left"
            self._common -= 1
        return self._free.popleft()
