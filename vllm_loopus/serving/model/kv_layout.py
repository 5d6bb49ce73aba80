"""How many bytes of K/V and state a position takes, item by item.

Pure arithmetic over the layout that `planes.py` sets up. A test compares it with what vLLM
allocates; `info`, the start-up summary and the metrics show it.
"""

from dataclasses import dataclass

from vllm.utils.math_utils import cdiv


@dataclass(frozen=True)
class KVLayout:
    """Bytes on one rank for one position (or, times `block_size`, for one block).

    A block of the pool is as wide as the widest plane, that of depth 1, which also holds the
    encoder and the injected input: `block_bytes_per_token`. A position that reached depth d takes d
    such blocks, at most `planes`.
    """

    max_loops: int
    planes: int  # depths that have K/V of their own, from 1
    encoder: int  # K/V of the encoder layers, once
    reasoning: int  # K/V of the reasoning layers at one depth
    decoder: int  # K/V of the decoder layers at one depth
    state: int  # the state h^r at one depth
    injected: int  # the constant input, once
    kv_bytes: int  # K and V of one layer; states are stored in rows of this size

    @classmethod
    def of(
        cls,
        *,
        max_loops: int,
        encoder: int,
        reasoning: int,
        decoder: int,
        kv_bytes: int,
        state_bytes: int,
        injected_bytes: int = 0,
        planes: int | None = None,
    ) -> "KVLayout":
        """`encoder`, `reasoning`, `decoder`: numbers of layers. `kv_bytes`: K and V of one token in
        one layer. `state_bytes`, `injected_bytes`: of one position. `planes`: all depths by
        default."""
        return cls(
            max_loops=max_loops,
            planes=max_loops if planes is None else planes,
            encoder=encoder * kv_bytes,
            reasoning=reasoning * kv_bytes,
            decoder=decoder * kv_bytes,
            state=state_bytes,
            injected=injected_bytes,
            kv_bytes=kv_bytes,
        )

    @property
    def state_rows(self) -> int:
        """How many rows of the size of a layer's K/V hold one state: all groups share one page
        size."""
        return cdiv(self.state, self.kv_bytes)

    @property
    def injected_rows(self) -> int:
        """The same of the constant input."""
        return cdiv(self.injected, self.kv_bytes)

    @property
    def state_padding(self) -> int:
        """What rounds a state up to whole rows."""
        return self.state_rows * self.kv_bytes - self.state

    @property
    def plane(self) -> int:
        """A plane from depth 2 on: reasoning, decoder, state and its padding."""
        return self.reasoning + self.decoder + self.state + self.state_padding

    @property
    def first_only(self) -> int:
        """What the plane of depth 1 has besides: encoder, injected input and its padding."""
        return self.encoder + self.injected_rows * self.kv_bytes

    @property
    def block_bytes_per_token(self) -> int:
        """The width of a block of the pool, divided by its tokens."""
        return self.plane + self.first_only

    def used(self, depth: int) -> int:
        """Bytes that a position at `depth` makes use of, without padding."""
        once = self.encoder + self.injected
        return once + min(depth, self.planes) * (self.reasoning + self.decoder + self.state)

    def allocated(self, depth: int) -> int:
        """Bytes that a position at `depth` occupies in the pool."""
        return min(depth, self.planes) * self.block_bytes_per_token

    def items(self) -> dict[str, int]:
        """Bytes of a position at full depth by item; they add up to `allocated(max_loops)`."""
        deep = self.planes
        injected = {"injected": self.injected} if self.injected else {}
        return {
            "encoder": self.encoder,
            "reasoning": deep * self.reasoning,
            "decoder": deep * self.decoder,
            "states": deep * self.state,
            **injected,
            "padding": self.allocated(deep) - self.used(deep),
        }

    def __str__(self) -> str:
        kib = ", ".join(f"{name} {size / 1024:.2f}" for name, size in self.items().items())
        total = self.allocated(self.max_loops) / 1024
        return f"{total:.2f} KiB per token at depth {self.max_loops} ({kib})"


def sequences_that_fit(num_blocks: int, block_size: int, length: int, planes: float) -> float:
    """How many sequences of `length` tokens fit in a pool if they hold `planes` blocks for each
    block of depth 1. One block of the pool is vLLM's null block."""
    return max(num_blocks - 1, 0) / (cdiv(length, block_size) * planes)
