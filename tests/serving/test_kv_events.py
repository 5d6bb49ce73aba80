"""K/V events, as a router follows them that knows nothing of depths."""

from typing import Any

from tests.conftest import GOLDEN, kv_manager


class PlainRouter:
    """The blocks that it believes to be in the prefix cache."""

    def __init__(self) -> None:
        self.blocks: set[Any] = set()
        self.removed = 0

    def publish(self, batch: Any) -> None:
        from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored

        for event in batch.events:
            match event:
                case BlockStored():
                    assert not self.blocks.intersection(event.block_hashes), "announced twice"
                    assert len(event.token_ids) == len(event.block_hashes) * event.block_size
                    self.blocks.update(event.block_hashes)
                case BlockRemoved():
                    self.blocks.difference_update(event.block_hashes)
                    self.removed += 1
                case AllBlocksCleared():
                    self.blocks.clear()


def cached(manager: Any) -> dict[int, set[Any]]:
    """Depth -> the hashes of the blocks that are in the prefix cache there."""
    from vllm.v1.core.kv_cache_utils import (
        get_block_hash,
        get_group_id,
        maybe_convert_block_hash,
    )

    found: dict[int, set[Any]] = {}
    for block in manager.block_pool.blocks:
        if block.block_hash is not None:
            of_depth = found.setdefault(get_group_id(block.block_hash) + 1, set())
            of_depth.add(maybe_convert_block_hash(get_block_hash(block.block_hash)))
    return found


def test_a_plain_router_counts_right(make_llm: Any) -> None:
    """Also while deep planes are evicted and those of depth 1 stay."""
    from vllm import SamplingParams

    llm = make_llm(
        GOLDEN / "qwen3",
        skip_tokenizer_init=True,
        num_gpu_blocks_override=6 * 8,
        kv_events_config={"enable_kv_cache_events": True, "publisher": "null"},
    )
    router = PlainRouter()
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    scheduler.kv_event_publisher.publish = router.publish
    manager = kv_manager(llm)
    deeper = 0
    for number, loops in enumerate([8, 8, 1, 1, 8, 2, 1, 1]):
        prompt = [(7 * number + position) % 500 for position in range(100)]
        params = SamplingParams(
            temperature=0, max_tokens=2, ignore_eos=True, detokenize=False,
            extra_args={"min_loops": loops, "max_loops": loops},
        )  # fmt: skip
        llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
        by_depth = cached(manager)
        assert router.blocks == by_depth[1]
        deeper += len(by_depth[1]) > len(by_depth.get(8, ())) > 0
    assert deeper and router.removed
    llm.reset_prefix_cache()
    llm.generate([{"prompt_token_ids": [5]}], params, use_tqdm=False)
    assert not router.blocks
