"""vLLM's block managers, one for each depth, and its prefix cache over all depths.

KV cache groups are depths. Depth 1 is allocated as in vLLM; deeper planes get their blocks when the
worker has taken them. A prefix hit is a staircase: at every depth a prefix of the request, no
longer than at the depth before.
"""

from collections.abc import Sequence
from typing import Any

from vllm.v1.core.kv_cache_coordinator import HybridKVCacheCoordinator
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from vllm_loopus.serving.compat import REPLAY_BOUNDARIES

# Sliding windows may cache only some positions; our planes cache all.
NO_REPLAY: dict[str, Any] = {REPLAY_BOUNDARIES.name: ()} if REPLAY_BOUNDARIES.is_there else {}


class PlaneManager(FullAttentionManager):
    """Blocks of depth 1, and what all depths share."""

    in_use: int  # blocks that sequences hold, shared ones counted once

    def add_local_computed_blocks(
        self, request_id: str, new_computed_blocks: Sequence[KVCacheBlock], *args: Any
    ) -> None:
        self.in_use += self._get_num_evictable_blocks(new_computed_blocks)
        super().add_local_computed_blocks(request_id, new_computed_blocks, *args)

    def allocate_new_blocks(self, *args: Any, **kwargs: Any) -> list[KVCacheBlock]:
        blocks = super().allocate_new_blocks(*args, **kwargs)
        self.in_use += len(blocks)
        return blocks

    def free(self, request_id: str) -> None:
        blocks = self.req_to_blocks.get(request_id, ())
        self.in_use -= sum(block.ref_cnt == 1 and not block.is_null for block in blocks)
        super().free(request_id)


class DeepPlaneManager(PlaneManager):
    """Blocks of a depth from 2 on: none is allocated ahead."""

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        *args: Any,
        **kwargs: Any,
    ) -> int:
        return self._get_num_evictable_blocks(new_computed_blocks)

    def allocate_new_blocks(self, *args: Any, **kwargs: Any) -> list[KVCacheBlock]:
        return []

    def place(self, request_id: str, column: int, block: KVCacheBlock) -> None:
        """The sequence has taken `block`, a free one, for `column` of its block table."""
        blocks = self.req_to_blocks[request_id]
        # In `last_exited`, prompt blocks may come after those of generated positions.
        blocks.extend([self._null_block] * (column + 1 - len(blocks)))
        assert blocks[column].is_null and block.ref_cnt == 0
        self.block_pool.touch([block])
        blocks[column] = block
        self.in_use += 1


class StaircaseCoordinator(HybridKVCacheCoordinator):
    """Looks a prefix up depth by depth."""

    def find_longest_cache_hit(
        self, block_hashes: Any, max_cache_hit_length: int
    ) -> tuple[tuple[list[KVCacheBlock], ...], int, int]:
        """As in vLLM. The length is that of depth 1; those of deeper depths follow from their
        blocks."""
        found = []
        length = max_cache_hit_length
        for depth, manager in enumerate(self.single_type_managers):
            (blocks,), length = manager.find_longest_cache_hit(
                block_hashes=block_hashes,
                max_length=length,
                kv_cache_group_ids=[depth],
                block_pool=self.block_pool,
                kv_cache_spec=manager.kv_cache_spec,
                drop_eagle_block=False,
                alignment_tokens=manager.block_size,
            )
            found.append(blocks)
        return tuple(found), len(found[0]) * self.single_type_managers[0].block_size, 0


def adopt_coordinator(coordinator: Any) -> None:
    """Replaces the managers of a coordinator that vLLM has just built by ours, one for each depth.

    vLLM's scheduler builds them itself; changing their classes avoids a copy of that code.
    """
    for depth, manager in enumerate(coordinator.single_type_managers):
        assert type(manager) is FullAttentionManager
        manager.__class__ = DeepPlaneManager if depth else PlaneManager
        manager.in_use = 0
    if isinstance(coordinator, HybridKVCacheCoordinator):  # not with a single depth
        coordinator.__class__ = StaircaseCoordinator
