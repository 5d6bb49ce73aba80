"""What the layout says it takes is what vLLM allocates, item by item."""

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.conftest import GOLDEN, runner_of
from vllm_loopus.serving.model.kv_dtype import KV_DTYPES, kv_bytes
from vllm_loopus.serving.model.kv_layout import KVLayout, sequences_that_fit
from vllm_loopus.serving.model.planes import depth_of, layer_name_at

BLOCK = 32
BLOCKS = 50


ENGINES = [("qwen3", 8, "auto"), ("phi3", 3, "auto"), ("llama", 1, "auto"), ("qwen3", 8, "fp8")]


@pytest.fixture(params=ENGINES, ids=lambda p: "{}-{}-{}".format(*p))
def engine(make_llm: Any, request: pytest.FixtureRequest) -> tuple[Any, Any, KVLayout]:
    """The worker's model, the scheduler's KV cache config and the layout of a small engine."""
    backbone, max_loops, kv_dtype = request.param
    llm = make_llm(
        GOLDEN / backbone,
        dtype="bfloat16",
        hf_overrides={"max_loops": max_loops},
        skip_tokenizer_init=True,
        block_size=BLOCK,
        num_gpu_blocks_override=BLOCKS,
        kv_cache_dtype=kv_dtype,
    )
    core = llm.llm_engine.engine_core.engine_core
    model = runner_of(llm).model
    return core, model, model.planes.layout


def test_items_add_up_to_the_pool(engine: tuple[Any, Any, KVLayout]) -> None:
    core, model, layout = engine
    config = model.config
    heads, head_dim = config.base.num_key_value_heads, config.hidden_size // 4
    number = 1 if model.planes.kv_dtype == "fp8" else 2
    row = 2 * heads * head_dim * number  # K and V of one token in one layer
    loops = config.max_loops
    items = layout.items()
    assert items["encoder"] == len(config.encoder_layer_indices) * row
    assert items["reasoning"] == loops * len(config.reasoning_layer_indices) * row
    assert items["decoder"] == loops * len(config.decoder_layer_indices) * row
    assert items["states"] == loops * config.hidden_size * 2
    assert sum(items.values()) == layout.allocated(loops)
    assert layout.used(loops) == layout.allocated(loops) - items["padding"]

    from vllm.v1.core.kv_cache_utils import _pool_bytes_per_block

    kv_config = core.scheduler.kv_cache_config
    assert kv_config.num_blocks == BLOCKS
    offered = {"vllm_config": core.vllm_config, "kv_cache_groups": kv_config.kv_cache_groups}
    taken = inspect.signature(_pool_bytes_per_block).parameters  # not the same in all releases
    per_block = _pool_bytes_per_block(**{name: offered[name] for name in taken})
    assert per_block == layout.block_bytes_per_token * BLOCK
    assert {t.size for t in kv_config.kv_cache_tensors} == {per_block * BLOCKS}
    assert len(kv_config.kv_cache_groups) == loops


def test_all_depths_share_one_allocation(engine: tuple[Any, Any, KVLayout]) -> None:
    core, model, layout = engine
    context = core.vllm_config.compilation_config.static_forward_context
    storages = {layer.kv_cache.untyped_storage().data_ptr() for layer in context.values()}
    assert len(storages) == 1
    (storage,) = {layer.kv_cache.untyped_storage().nbytes() for layer in context.values()}
    assert storage == layout.block_bytes_per_token * BLOCK * BLOCKS
    # A layer is the same memory at every depth: a row's depth is its block table alone.
    for name in (*model.planes.layer_names, *model.planes.state_names):
        views = [
            context[layer_name_at(name, depth)].kv_cache
            for depth in range(1, model.config.max_loops + 1)
        ]
        assert len({(v.data_ptr(), v.shape, v.stride()) for v in views}) == 1
    names = [group.layer_names for group in core.scheduler.kv_cache_config.kv_cache_groups]
    shallow = [name for name in names[0] if not name.startswith("encoder.")]
    for depth, deep in enumerate(names[1:], start=2):
        assert deep == [layer_name_at(name, depth) for name in shallow]
        assert {depth_of(name) for name in deep} == {depth}


def test_a_state_fits_its_rows(engine: tuple[Any, Any, KVLayout]) -> None:
    core, model, layout = engine
    context = core.vllm_config.compilation_config.static_forward_context
    rows = [context[name].kv_cache for name in model.planes.state_names]
    room = sum(r[0, :, 0].numel() * r.element_size() for r in rows)
    assert room == layout.state + layout.state_padding
    assert layout.state == model.config.hidden_size * torch.bfloat16.itemsize


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_bytes_of_each_dtype(kv_dtype: str) -> None:
    """As vLLM's specs have them, with the scales that its Triton backend stores."""
    from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
    from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend
    from vllm.v1.kv_cache_interface import FullAttentionSpec, get_kv_quant_mode

    heads, head_size = 3, 64
    spec = FullAttentionSpec(
        block_size=BLOCK,
        num_kv_heads=heads,
        head_size=head_size,
        dtype=kv_cache_dtype_str_to_dtype(kv_dtype, SimpleNamespace(dtype=torch.bfloat16)),
        kv_quant_mode=get_kv_quant_mode(kv_dtype),
    )
    expected = TritonAttentionBackend.customize_spec(spec).page_size_bytes // BLOCK
    assert kv_bytes(heads, head_size, kv_dtype, model_dtype_bytes=2) == expected


def test_published_cuts() -> None:
    """Bytes a token of Qwen3-4B at 8 loops, by hand: 36 layers, 8 KV heads of 128, hidden 2560."""
    row, state = 2 * 8 * 128 * 2, 2560 * 2
    layout = KVLayout.of(
        max_loops=8, encoder=2, reasoning=33, decoder=1, kv_bytes=row, state_bytes=state
    )
    assert (layout.state_rows, layout.state_padding) == (2, 2 * row - state)
    assert layout.allocated(8) == 8 * (33 + 1 + 2 + 2) * row
    assert layout.items()["padding"] == 8 * 3072 + 7 * 2 * row
    # 1000 blocks of 16 besides the null block; 100 tokens take 7 blocks a plane.
    assert sequences_that_fit(1001, 16, 100, planes=8) == pytest.approx(1000 / 56)
    assert sequences_that_fit(1001, 16, 100, planes=2.5) == pytest.approx(1000 / 17.5)
