"""Processes under test, and the cached loop beside the reference."""

from pathlib import Path

import pytest
import torch

from vllm_loopus.bench.cached_loop import generate_cached
from vllm_loopus.bench.models import SIZES
from vllm_loopus.bench.process import Worker, WorkerError, script_worker
from vllm_loopus.bench.workers.transformers_worker import Reference
from vllm_loopus.bench.workloads import Generator
from vllm_loopus.modeling.model import LoopUSForCausalLM


def test_workloads_are_seeded() -> None:
    generator = Generator(vocabulary=512, max_loops=8, mean=3.0)
    again = Generator(vocabulary=512, max_loops=8, mean=3.0)
    for draw in (
        lambda g, seed: g.decode(seed, 64, 4, 32),
        lambda g, seed: g.mixed(seed, 64, 64, 32, load=2.0),
        lambda g, seed: g.long(seed, 4, 64, 256, 8),
    ):
        work = draw(generator, 1)
        assert work == draw(again, 1) != draw(generator, 2)
        assert all(len(r.exits) == r.tokens for r in work.requests)
    assert generator.decode(1, 64, 4, 32).mean_depth == pytest.approx(3, abs=0.2)
    mixed = generator.mixed(1, 64, 64, 32, load=2.0)
    arrivals = [request.arrival for request in mixed.requests]
    assert arrivals == sorted(arrivals)
    assert arrivals[-1] == pytest.approx(64 / 2, rel=0.4)
    assert mixed.at_depth(8).mean_depth == 8


@pytest.mark.parametrize("prompts", [[[11, 12, 13]], [[11, 12, 13, 14], [15], [16, 17]]])
def test_the_cached_loop_says_what_the_uncached_model_says(
    looped: tuple[Path, float], prompts: list[list[int]]
) -> None:
    model = LoopUSForCausalLM.from_pretrained(looped[0], dtype=torch.float32).eval()
    found = generate_cached(model, prompts, [5] * len(prompts), fixed=True)
    assert found["depths"] == [8] * 5
    for prompt, answer in zip(prompts, found["answers"], strict=True):
        ids = torch.tensor([prompt])
        for token in answer:
            with torch.inference_mode():
                assert int(model(ids).logits[0, -1].argmax()) == token
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)


def test_verify_finds_what_the_reference_would_not_say(looped: tuple[Path, float]) -> None:
    folder, threshold = looped
    side = Reference()
    side.start(str(folder), "float32", "cpu")
    side._model.config.exit_threshold = threshold
    prompts = torch.randint(10, SIZES["tiny"].vocabulary, (4, 6), generator=torch.manual_seed(3))
    depths = set()
    for prompt in prompts.tolist():
        ids = torch.tensor([prompt])
        answer, exits = [], []
        for _ in range(6):
            with torch.inference_mode():
                output = side._model(ids)
            answer.append(int(output.logits[0, -1].argmax()))
            exits.append(int(output.exit_depths))
            ids = torch.cat([ids, torch.tensor([answer[-1:]])], dim=1)
        found = side.verify(prompt, answer, threshold)
        assert (found["same"], found["different_and_sure"]) == (6, 0)
        assert found["exit_depths"] == exits
        depths.update(exits)
        wrong = side.verify(prompt, [*answer[:-1], (answer[-1] + 1) % 512], threshold)
        assert wrong["same"] == 5
    assert len(depths) > 1


@pytest.mark.engine
def test_a_worker_that_fails_says_why(tmp_path: Path, checkout: Path) -> None:
    import sys

    command = script_worker(sys.executable, "original_worker.py", str(checkout))
    worker = Worker("original", command, tmp_path / "log")
    try:
        with pytest.raises(WorkerError, match="No such file or directory"):
            worker.call("start", model=str(tmp_path), dtype="float32", device="cpu")
        with pytest.raises(WorkerError, match="KeyError"):
            worker.call("unknown")
    finally:
        worker.close()
    dead = Worker("dead", [sys.executable, "-c", "raise SystemExit('no luck')"], tmp_path / "dead")
    with pytest.raises(WorkerError, match=r"exit code 1:\nno luck"):
        dead.call("start")
    dead.close()
