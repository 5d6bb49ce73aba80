"""How many bytes of K/V and state a position takes, item by item.

Pure arithmetic over the layout that `planes.py` sets up: a test holds it against what vLLM
allocates, and the start-up line prints it.
"""

from dataclasses import dataclass

from vllm.utils.math_utils import cdiv

from vllm_loopus.config import LoopUSConfig


@dataclass(frozen=True)
class KVLayout:
    """Bytes on one rank for one position (or, times `block_size`, for one block).

    A block of the pool is as wide as the widest plane, that of depth 1, which also holds the
    encoder: `block_bytes_per_token`. A position that reached depth d takes d such blocks' worth.
    """

    max_loops: int
    encoder: int  # K/V of the encoder layers, once
    reasoning: int  # K/V of the reasoning layers at one depth
    decoder: int  # K/V of the decoder layers at one depth
    state: int  # the state h^r at one depth
    state_rows: int  # K/V-sized rows that hold one state: all groups share one page size
    state_padding: int  # what rounds a state up to whole rows

    @classmethod
    def of(cls, config: LoopUSConfig, kv_bytes_per_token: int, state_bytes: int) -> "KVLayout":
        """`kv_bytes_per_token`: K and V of one token in one layer; `state_bytes`: one state."""
        rows = cdiv(state_bytes, kv_bytes_per_token)
        return cls(
            max_loops=config.max_loops,
            encoder=len(config.encoder_layer_indices) * kv_bytes_per_token,
            reasoning=len(config.reasoning_layer_indices) * kv_bytes_per_token,
            decoder=len(config.decoder_layer_indices) * kv_bytes_per_token,
            state=state_bytes,
            state_rows=rows,
            state_padding=rows * kv_bytes_per_token - state_bytes,
        )

    @property
    def plane(self) -> int:
        """One plane without the encoder: reasoning, decoder, state and its padding."""
        return self.reasoning + self.decoder + self.state + self.state_padding

    @property
    def block_bytes_per_token(self) -> int:
        """The width of a block of the pool, divided by its tokens."""
        return self.plane + self.encoder

    def used(self, depth: int) -> int:
        """Bytes that a position at `depth` has a use for, padding left out."""
        return self.encoder + depth * (self.reasoning + self.decoder + self.state)

    def allocated(self, depth: int) -> int:
        """Bytes that a position at `depth` occupies in the pool."""
        return depth * self.block_bytes_per_token

    def items(self) -> dict[str, int]:
        """Bytes of a position at full depth by item; they add up to `allocated(max_loops)`."""
        deep = self.max_loops
        return {
            "encoder": self.encoder,
            "reasoning": deep * self.reasoning,
            "decoder": deep * self.decoder,
            "states": deep * self.state,
            "padding": deep * self.state_padding + (deep - 1) * self.encoder,
        }

    def __str__(self) -> str:
        kib = ", ".join(f"{name} {size / 1024:.2f}" for name, size in self.items().items())
        total = self.allocated(self.max_loops) / 1024
        return f"{total:.2f} KiB a token at depth {self.max_loops} ({kib})"


def sequences_that_fit(num_blocks: int, block_size: int, length: int, planes: float) -> float:
    """How many sequences of `length` tokens a pool holds, each of whose blocks of depth 1 stands
    for `planes` blocks. One block of the pool is vLLM's null block."""
    return max(num_blocks - 1, 0) / (cdiv(length, block_size) * planes)
