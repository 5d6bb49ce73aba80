"""Padded regions, as a CUDA graph would see them: the answers are the golden ones.

`CheckedGraph` stands for the graph. It insists that everything lies where it lay at the capture,
spoils what comes out for padded rows, and spoils its last outputs when any region runs again.
"""

from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from vllm.forward_context import get_forward_context

from tests.conftest import GOLDEN, golden_cases, runner_of, spy_on_steps
from vllm_loopus import exit_depths
from vllm_loopus.serving.worker import regions

SIZES = "1,2,4,8,16,24"
BUDGET = 40  # more than the greatest size: some batches run as they are


class CheckedGraph:
    captured: ClassVar[dict[Any, Any]] = {}
    replays: ClassVar[list[tuple[int, int]]] = []  # rows, padded rows
    last: ClassVar[list[torch.Tensor]] = []

    def __init__(self, run: Any) -> None:
        self.run = run

    def __call__(self, *arguments: torch.Tensor) -> Any:
        context = get_forward_context()
        seen = [fingerprint(argument) for argument in arguments]
        for name, metadata in context.attn_metadata.items():
            fields = dict(vars(metadata))
            fields.pop("scheduler_metadata")  # CPUs: made anew; GPU backends keep it in a buffer
            seen += [(name, key, fingerprint(value)) for key, value in fields.items()]
        seen += [(name, fingerprint(slots)) for name, slots in context.slot_mapping.items()]
        key = (self.run, context.batch_descriptor)
        assert self.captured.setdefault(key, seen) == seen
        (metadata, *_) = [*context.attn_metadata.values(), None]
        padded = len(arguments[0])
        rows = int(metadata.query_start_loc[-1]) if metadata is not None else padded
        assert (next(iter(context.slot_mapping.values()))[rows:padded] == -1).all()
        outputs = self.run(*arguments)
        for output in self.last:
            output.fill_(torch.nan)
        self.last[:] = outputs if isinstance(outputs, tuple) else (outputs,)
        for output in self.last:
            output[rows:] = torch.nan
        self.replays.append((rows, padded))
        return outputs


def fingerprint(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.data_ptr(), value.shape, value.stride(), value.dtype
    return value


@pytest.mark.parametrize("policy", ["exact", "last_exited"])
def test_golden(make_llm: Any, monkeypatch: pytest.MonkeyPatch, policy: str) -> None:
    from vllm import SamplingParams

    monkeypatch.setenv(regions.PADDED_ROWS, SIZES)
    monkeypatch.setattr(regions, "uncaptured", CheckedGraph)
    CheckedGraph.captured.clear(), CheckedGraph.replays.clear(), CheckedGraph.last.clear()
    llm = make_llm(
        GOLDEN / "qwen3",
        skip_tokenizer_init=True,
        max_num_batched_tokens=BUDGET,
        max_num_seqs=12,
        additional_config={"loopus": {"kv_policy": policy}},
    )
    runner = runner_of(llm)
    planes = runner.get_model().planes
    before = [cache.clone() for cache in planes.floats()]
    runner.capture_model()
    assert len(CheckedGraph.captured) == 3 * len(SIZES.split(","))
    for cache, was in zip(planes.floats(), before, strict=True):
        assert torch.equal(cache, was), "capturing writes nothing"
    CheckedGraph.replays.clear()
    cases = [
        c
        for c in golden_cases("qwen3")
        if c["halting_strategy"] == "threshold" and c["q_eval_interval"] == 1
    ]
    if policy == "last_exited":  # nothing is taken over that would have been computed otherwise
        cases = [c for c in cases if len(set(c["depths"])) == 1]
    cases = cases[:24]
    sampling = [
        SamplingParams(
            temperature=0,
            max_tokens=20,
            ignore_eos=True,
            detokenize=False,
            prompt_logprobs=0 if index == 5 else None,
            extra_args={"max_loops": c["N"], "exit_threshold": c["q_threshold"]},
        )
        for index, c in enumerate(cases)
    ]
    steps = spy_on_steps(llm)
    outputs = llm.generate(
        [{"prompt_token_ids": c["prompt"]} for c in cases], sampling, use_tqdm=False
    )
    for case, output in zip(cases, outputs, strict=True):
        assert exit_depths(output) == case["depths"]
        assert list(output.outputs[0].token_ids) == case["tokens"]
    assert outputs[5].prompt_logprobs is not None
    rows, padded = np.array(CheckedGraph.replays).T
    assert (rows < padded).any() and (rows == padded).any()
    assert len(CheckedGraph.captured) == 3 * len(SIZES.split(",")), "one set for all depths"
    assert any(n > 24 for step in steps for n in step.passes), "and some ran as they were"
    # Padded rows are nobody's: not counted, and not written, not even to the null block.
    assert all(n <= BUDGET for step in steps for n in step.passes)
    of_passes = [n for step in steps for n in step.passes]
    assert set(of_passes) - {1, 2, 4, 8, 16, 24}
    for cache in planes.floats():
        assert not cache[0].any()
    padding = runner._sequences._executor._regions.decoder._padding
    size = min(padding.descriptors(), key=lambda descriptor: descriptor.num_tokens)
    assert padding.write_wanted(size, np.zeros(size.num_reqs, np.int64)).numel() == size.num_reqs
    with pytest.raises(ValueError, match="wanted rows"):
        padding.write_wanted(size, np.zeros(size.num_reqs + 1, np.int64))
