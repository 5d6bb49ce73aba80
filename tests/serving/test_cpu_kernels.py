"""The C norms give what vLLM's own give, and run where a LoopUS model runs eagerly on a CPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from vllm import EngineArgs, ir
from vllm.platforms import current_platform

from tests.conftest import GOLDEN, KV_BYTES
from vllm_loopus.plugin import register
from vllm_loopus.serving.model.cpu_kernels import PROVIDER

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="norms of the CPU build")


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    register()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [32, 64, 72])
def test_the_same_as_the_native_norms(dtype: torch.dtype, width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    wide = torch.randn(7, 3, 2 * width, generator=generator).to(dtype)
    x, residual = wide[..., :width], torch.randn(7, width, generator=generator).to(dtype)
    weight = torch.randn(width, generator=generator).to(dtype)
    norm, fused = ir.ops.rms_norm.impls, ir.ops.fused_add_rms_norm.impls
    rounding = 2**-20 if dtype == torch.float32 else 2**-6
    same = {"atol": rounding, "rtol": rounding}
    torch.testing.assert_close(
        norm[PROVIDER].impl_fn(x, weight, 1e-6), norm["native"].impl_fn(x, weight, 1e-6), **same
    )
    flat = wide[:, 0, :width].contiguous()
    expected = fused["native"].impl_fn(flat, residual, weight, 1e-6)
    found = fused[PROVIDER].impl_fn(flat.clone(), residual.clone(), weight, 1e-6)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **same)
    alone = fused[PROVIDER].impl_fn(flat[2:3].clone(), residual[2:3].clone(), weight, 1e-6)
    assert torch.equal(alone[0], found[0][2:3])  # a row does not see its neighbours


def test_what_the_kernels_cannot_do_is_left_to_vllm() -> None:
    norm, fused = ir.ops.rms_norm.impls[PROVIDER], ir.ops.fused_add_rms_norm.impls[PROVIDER]
    x, weight = torch.randn(3, 64), torch.randn(64)
    assert norm.supports_args(x, weight, 1e-6)
    assert not norm.supports_args(x[:, :33], weight[:33], 1e-6)  # not whole vectors
    assert not norm.supports_args(x.bfloat16(), weight, 1e-6)  # as Gemma's
    assert not norm.supports_args(x, None, 1e-6)
    assert not norm.supports_args(x, weight, 1e-6, 32)
    assert not fused.supports_args(x.T.contiguous().T, x, weight, 1e-6)  # changed in place


def test_preferred_unless_the_user_chose() -> None:
    def priority(**options: Any) -> list[str]:
        folder = str(GOLDEN / "qwen3")
        args = EngineArgs(model=folder, skip_tokenizer_init=True, **options)
        return args.create_engine_config().kernel_config.ir_op_priority.rms_norm

    assert priority() == [PROVIDER, "native"]
    assert priority(ir_op_priority={"rms_norm": ["native", PROVIDER]}) == ["native", PROVIDER]


def answer_to_a_short_prompt() -> int:
    """Tokens of the first answer of a process, which has done nothing larger before."""
    from vllm import LLM, SamplingParams

    llm = LLM("loopus-tiny", dtype="bfloat16", max_model_len=64, kv_cache_memory_bytes=KV_BYTES)
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    (output,) = llm.generate([{"prompt_token_ids": [5, 6]}], params, use_tqdm=False)
    return len(output.outputs[0].token_ids)


def test_a_short_prompt_comes_first(in_fork: Callable[[Callable[[], int]], int]) -> None:
    """On a CPU with AMX it ended the process: nobody had asked for leave to use the tiles."""
    assert in_fork(answer_to_a_short_prompt) == 2
