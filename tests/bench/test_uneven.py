"""Answers of an engine against a checkout of the original, with stand-ins for both."""

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_loopus.bench.sections import uneven
from vllm_loopus.bench.setup import TINY, Setup
from vllm_loopus.bench.workers.transformers_worker import Reference
from vllm_loopus.bench.workloads import Workload
from vllm_loopus.modeling.model import LoopUSForCausalLM

pytestmark = pytest.mark.slow


class InProcess:
    """The reference's worker without a process."""

    def __init__(self, *_: Any) -> None:
        self._side = Reference()

    def call(self, command: str, **arguments: Any) -> Any:
        return getattr(self._side, command)(**arguments)

    def close(self) -> None:
        pass


class UncachedFleet:
    """Answers as an exact engine does; `wrong`: but for the last token of each request."""

    wrong = False

    def __init__(self, specs: list[Any], _: Path) -> None:
        folder = specs[0].model
        self._model = LoopUSForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def __enter__(self) -> "UncachedFleet":
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def warm_up(self, workload: Workload) -> None:
        pass

    @torch.inference_mode()
    def run(self, engine: str, workload: Workload, answers: bool) -> dict[str, Any]:
        told: list[list[int]] = []
        depths: Counter[str] = Counter()
        for request in workload.requests:
            self._model.config.exit_threshold = request.knobs["exit_threshold"]
            ids = torch.tensor([request.prompt])
            for _ in range(request.tokens):
                output = self._model(ids)
                ids = torch.cat([ids, output.logits[:, -1:].argmax(-1)], dim=1)
                depths[str(output.exit_depths.item())] += 1
            told.append(ids[0, len(request.prompt) :].tolist())
            if self.wrong:
                told[-1][-1] = (told[-1][-1] + 1) % 512
        return {
            "answers": told,
            "tokens": workload.tokens,
            "seconds": 1.0,
            "exit_depths": dict(depths),
        }


@pytest.mark.parametrize(("with_checkout", "wrong"), [(True, False), (False, False), (False, True)])
def test_answers_are_held_against_the_uncached_forward(
    tmp_path: Path,
    checkout: Path,
    monkeypatch: pytest.MonkeyPatch,
    with_checkout: bool,
    wrong: bool,
) -> None:
    original = (checkout, sys.executable) if with_checkout else None
    worker = uneven.Worker
    monkeypatch.setattr(
        uneven, "Worker", lambda *a: InProcess() if a[0] == "reference" else worker(*a)
    )
    monkeypatch.setattr(uneven, "Fleet", UncachedFleet)
    monkeypatch.setattr(UncachedFleet, "wrong", wrong)
    plan = replace(TINY, uneven_requests=5)
    setup = Setup(plan, tmp_path, "float32", "cpu", print, original)
    found = uneven.measure(setup)
    answers = found["answers"]
    assert found["against"] == (uneven.ORIGINAL if with_checkout else uneven.STAND_IN)
    assert answers["tokens"] == found["tokens"]
    assert answers["different_and_sure"] == (5 if wrong else 0)
    assert answers["same_as_uncached"] == answers["tokens"] - (5 if wrong else 0)
    assert answers["same_depths"]
    assert found["ours_over_theirs"]["rounds"] == plan.rounds
    by_original = answers["same_as_originals_uncached"]
    if with_checkout:
        assert by_original["same"] == by_original["tokens"] > 0
    else:
        assert by_original is None
