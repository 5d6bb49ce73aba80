"""No call waits for the device. What is read is one copy for a call of passes that decides, and one
for a decoding, queued with the call.

On a CPU nothing waits; what is counted is whatever would on a GPU.
"""

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import GOLDEN, golden_cases
from vllm_loopus.serving.worker import transfer
from vllm_loopus.serving.worker.executor import PagedExecutor

WAITING = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__")
PREPARING = ("prepare_pass", "prepare_decoder", "prepare_encoder")
WAITING_OPS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")


class Waits(TorchDispatchMode):
    """Counts operations whose result the host has to wait for."""

    def __init__(self, seen: Counter[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        if name in WAITING_OPS or (
            name.startswith("index")
            and any(
                isinstance(index, torch.Tensor) and index.dtype == torch.bool
                for index in (args[1] if isinstance(args[1], list | tuple) else ())
            )
        ):
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


def test_the_mode_sees_what_waits() -> None:
    seen: Counter[str] = Counter()
    values = torch.arange(4.0)
    with Waits(seen):
        values[values > 1]
        values.nonzero()
        values[1].item()
        values[torch.tensor([1, 2])] * 2
    assert seen == {"index": 1, "nonzero": 1, "_local_scalar_dense": 1}


@pytest.mark.parametrize("overlap", ["on", "off"])
@pytest.mark.parametrize("strategy", ["threshold", "cdf"])
def test_no_call_waits_and_one_copy_is_read(
    make_llm: Any, monkeypatch: pytest.MonkeyPatch, strategy: str, overlap: str
) -> None:
    from vllm import SamplingParams

    cases = [
        c
        for c in golden_cases("qwen3")
        if c["halting_strategy"] == strategy and c["q_threshold"] < 1 and c["N"] == 8
    ][:4]
    llm = make_llm(
        GOLDEN / "qwen3",
        skip_tokenizer_init=True,
        hf_overrides={"halting_strategy": strategy, "exit_threshold": cases[0]["q_threshold"]},
        additional_config={"loopus": {"overlap": overlap}},
    )
    waits: Counter[str] = Counter()
    calls: list[tuple[str, bool, Counter[str]]] = []
    reading = False

    def counted(name: str, original: Any) -> Any:
        def method(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if not reading:
                waits[name] += 1
            return original(self, *args, **kwargs)

        return method

    class HostCopy(transfer.HostCopy):
        def __init__(self, values: torch.Tensor) -> None:
            nonlocal reading
            waits["queued"] += 1
            reading = True
            try:
                super().__init__(values)
            finally:
                reading = False

    def watched(name: str, original: Any) -> Any:
        def call(self: Any, rows: Any, *rest: Any) -> Any:
            waits.clear()
            with pytest.MonkeyPatch.context() as patch, Waits(waits):
                for method in WAITING:
                    patch.setattr(
                        torch.Tensor, method, counted(method, getattr(torch.Tensor, method))
                    )
                result = original(self, rows, *rest)
            calls.append((name, result is not None, Counter(waits)))
            return result

        return call

    monkeypatch.setattr(transfer, "HostCopy", HostCopy)
    for name in ("encode", "run_passes", "decode", *PREPARING):
        monkeypatch.setattr(PagedExecutor, name, watched(name, getattr(PagedExecutor, name)))
    outputs = llm.generate(
        [{"prompt_token_ids": c["prompt"]} for c in cases],
        SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, detokenize=False),
        use_tqdm=False,
    )
    for case, output in zip(cases, outputs, strict=True):
        assert list(output.outputs[0].token_ids) == case["tokens"]
    expected = {"encode", "run_passes", "decode", *(PREPARING if overlap == "on" else ())}
    assert {name for name, *_ in calls} == expected
    for name, reads, seen in calls:
        queues = name == "decode" or (name == "run_passes" and reads)
        assert seen == ({"queued": 1} if queues else {}), (name, reads)
