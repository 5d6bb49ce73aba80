"""How often the host waits for the device in a step: once a call of passes that decides, once
a decoding.

On a CPU nothing waits; what is counted is whatever would on a GPU.
"""

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import GOLDEN, golden_cases
from vllm_loopus.serving.worker import verdicts
from vllm_loopus.serving.worker.executor import PagedExecutor

WAITING = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__")
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


@pytest.mark.parametrize("strategy", ["threshold", "cdf"])
def test_one_wait_a_pass(make_llm: Any, monkeypatch: pytest.MonkeyPatch, strategy: str) -> None:
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

    def to_host(values: torch.Tensor) -> Any:
        nonlocal reading
        waits["to_host"] += 1
        reading = True
        try:
            return original_to_host(values)
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
            calls.append((name, bool(rest and rest[1]), Counter(waits)))
            return result

        return call

    original_to_host = verdicts.to_host
    monkeypatch.setattr(verdicts, "to_host", to_host)
    for name in ("encode", "run_passes", "decode"):
        monkeypatch.setattr(PagedExecutor, name, watched(name, getattr(PagedExecutor, name)))
    outputs = llm.generate(
        [{"prompt_token_ids": c["prompt"]} for c in cases],
        SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, detokenize=False),
        use_tqdm=False,
    )
    for case, output in zip(cases, outputs, strict=True):
        assert list(output.outputs[0].token_ids) == case["tokens"]
    assert {name for name, *_ in calls} == {"encode", "run_passes", "decode"}
    for name, decides, seen in calls:
        waiting = name == "decode" or (name == "run_passes" and decides)
        assert seen == ({"to_host": 1} if waiting else {}), (name, decides)
