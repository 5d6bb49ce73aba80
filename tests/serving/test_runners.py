"""Both adapters describe the same steps to the loop in the same words, and come to the same end.

Fakes of vLLM's runners with its own data classes; the scheduler is the real one, and sends each
runner what it sends the real one. `test_runner_v2.py` runs vLLM's own V2 runner.
"""

import pickle
from dataclasses import asdict, fields
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.core.sched.output import GrammarOutput
from vllm.v1.request import RequestStatus

from tests.serving.fake_executor import answer
from tests.serving.fakes import Engine
from vllm_loopus.serving.runners import selection
from vllm_loopus.serving.runners.v2 import _of
from vllm_loopus.serving.runners.v2_prompt_scores import V2PromptScores
from vllm_loopus.serving.worker.decoded import Decoded

PROMPTS = {f"r{i}": [i, 3, *range(i)] for i in range(6)}


def scripted(runner: str, **options: Any) -> Engine:
    """A run with chunks, early exits at many depths, preemptions and an abort."""
    engine = Engine(
        runner_kind=runner,
        num_blocks=4 * 12 + 1,
        max_num_batched_tokens=8,
        quorum=0.3,
        **options,
    )
    requests = {
        name: engine.add(name, prompt, 20, max_loops=2 + index % 3)
        for index, (name, prompt) in enumerate(PROMPTS.items())
    }
    for step in range(10_000):
        if not engine.scheduler.has_requests():
            break
        if step == 20:
            engine.scheduler.finish_requests("r5", RequestStatus.FINISHED_ABORTED)
        engine.step()
    engine.preemptions = sum(request.num_preemptions for request in requests.values())
    return engine


@pytest.mark.parametrize("policy", ["exact", "last_exited"])
def test_same_description_and_same_outcome(policy: str) -> None:
    v1, v2 = (scripted(runner, kv_policy=policy) for runner in ("v1", "v2"))
    assert v1.preemptions == v2.preemptions > 0
    assert v1.outputs == v2.outputs and v1.depths == v2.depths and v1.reasons == v2.reasons
    assert len(v1.runner.described) == len(v2.runner.described) > 50
    for one, other in zip(v1.runner.described, v2.runner.described, strict=True):
        one, other = asdict(one), asdict(other)
        for name in ("costs", "seconds"):  # measured
            one.pop(name), other.pop(name)
        for new in one["new"] + other["new"]:
            new.pop("greedy")  # the V2 runner takes one token a step
        assert one == other
    resumed = [new for step in v2.runner.described for new in step.new if new.num_generated]
    assert resumed, "somebody was preempted after a token"
    if policy == "exact":
        for index, (name, prompt) in enumerate(list(PROMPTS.items())[:5]):
            assert (v2.outputs[name], v2.depths[name]) == answer(prompt, 20, 4, 2 + index % 3)


def test_the_v2_runner_keeps_nobody() -> None:
    engine = scripted("v2")
    engine.add("last", [1], 1)  # brings the news of those that finished
    engine.run()
    assert set(engine.runner.requests) <= {"last"}
    assert engine.runner._unseen == {}


def test_the_grammar_of_those_who_stay_is_left_out() -> None:
    bitmask = np.arange(6, dtype=np.int32).reshape(3, 2)
    drafts = "num_acceptable_drafts" in {field.name for field in fields(GrammarOutput)}
    given = GrammarOutput(["a", "b", "c"], bitmask, *([[1, 2, 3]] if drafts else []))
    kept = _of(given, ["c", "a", "d"])
    assert kept.structured_output_request_ids == ["a", "c"]
    assert kept.grammar_bitmask.tolist() == [[0, 1], [4, 5]]
    assert not drafts or kept.num_acceptable_drafts == [1, 3]
    assert _of(given, ["d"]) is None and _of(None, ["a"]) is None


def test_rows_in_another_order() -> None:
    decoded = Decoded(torch.tensor([[1.0], [2.0], [3.0]]), ["a", "b", "c"])
    assert decoded.in_order(["a", "b", "c"]) is decoded.hidden
    assert decoded.in_order(["c", "a", "b"]).flatten().tolist() == [3, 1, 2]
    assert decoded.in_order(["d", "c", "a", "e", "b"]).flatten().tolist() == [0, 3, 1, 0, 2]
    sampled = torch.tensor([7, 8, 9, 5])
    assert decoded.of(sampled, ["c", "d", "b", "a"]).tolist() == [5, 9, 7]


def test_prompts_are_scored_part_by_part_on_v2(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's worker sees a prompt in chunks; the runner gets all of its scores at once."""
    from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker

    seen = []

    def compute(
        self: Any, fn: Any, hidden: Any, batch: Any, tokens: Any, computed: Any, lengths: Any
    ) -> dict[str, str]:
        start, count = int(batch.num_computed_prefill_tokens_np[0]), batch.num_tokens
        seen.append((start, count, len(hidden), computed.tolist(), tokens.tolist(), lengths[0]))
        return {batch.req_ids[0]: "scores"} if start + count == lengths[0] else {}

    monkeypatch.setattr(PromptLogprobsWorker, "compute_prompt_logprobs", compute)
    runner = SimpleNamespace(
        device=torch.device("cpu"),
        model_config=SimpleNamespace(logprobs_mode="raw_logprobs"),
        model=SimpleNamespace(compute_logits=None),
    )
    scores = V2PromptScores(runner)
    batch = SimpleNamespace(req_ids=["a", "b"])
    scores.begin("b", [5, 6, 7, 8, 9], SamplingParams(prompt_logprobs=1))
    for start, end in ((0, 3), (3, 5)):
        assert scores.wants("b") and not scores.wants("a")
        assert scores.compute_prompt_logprobs(None, None, batch) == {}
        scores.score("b", start, torch.ones(end - start, 2))
    tokens = [[5, 6, 7, 8, 9, 0]]
    assert seen == [(0, 3, 3, [0], tokens, 5), (3, 2, 2, [3], tokens, 5)]
    assert not scores.wants("b")
    assert scores.compute_prompt_logprobs(None, None, batch) == {"b": "scores"}
    assert scores.compute_prompt_logprobs(None, None, batch) == {}
    scores.forget("b")


class TestSelection:
    @pytest.fixture(autouse=True)
    def _environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv(selection.CHOICE, raising=False)
        self.patch = monkeypatch
        self.config = VllmConfig()

    def on(self, cpu: bool) -> None:
        self.patch.setattr(selection, "current_platform", SimpleNamespace(is_cpu=lambda: cpu))

    @pytest.mark.parametrize("cpu", [True, False])
    def test_v1_unless_asked(self, cpu: bool) -> None:
        self.on(cpu)
        self.patch.setattr(selection, "HAS_TRITON", not cpu)
        selection.select_runner(self.config)
        assert self.config.use_v2_model_runner is False
        assert ("nothing is verified on a GPU" in selection.runner_in_use(False)) is not cpu

    def test_v2_when_asked(self) -> None:
        self.on(cpu=False)
        self.patch.setattr(selection, "HAS_TRITON", True)
        self.patch.setenv(selection.CHOICE, "1")
        selection.select_runner(self.config)
        assert self.config.use_v2_model_runner is True
        assert "interpreter" in selection.runner_in_use(True)

    def test_other_models_choose_for_themselves(self) -> None:
        """A plain model that is loaded later in the same process, where vLLM would take V2."""
        plain = VllmConfig()
        self.patch.setattr("vllm.config.vllm.HAS_TRITON", True)
        selection.select_runner(self.config)
        assert selection.envs.VLLM_USE_V2_MODEL_RUNNER is None
        assert (self.config.use_v2_model_runner, plain.use_v2_model_runner) == (False, True)
        sent = pickle.loads(pickle.dumps(self.config))  # to the engine core and the workers
        assert sent.use_v2_model_runner is False

    def test_v2_without_triton_is_refused(self) -> None:
        self.patch.setattr(selection, "HAS_TRITON", False)
        self.patch.setenv(selection.CHOICE, "1")
        with pytest.raises(ValueError, match="VLLM_USE_V2_MODEL_RUNNER=1 needs Triton"):
            selection.check_runner()


@pytest.mark.parametrize("order", ["LBHNC", "LBNHC", "BLHNC", "BLNHC"])
def test_states_in_every_layout_of_a_block(order: str) -> None:
    """vLLM's default on GPUs, LBNHC, is not that of CPUs."""
    from vllm.v1.kv_cache_layout import KVCacheLayout

    from vllm_loopus.serving.worker.states import StatePages

    shape = (3, 5, 2, 4, 6)  # layers, blocks, heads, tokens, numbers
    permutation = KVCacheLayout[order].stride_order
    memory = torch.zeros([shape[axis] for axis in permutation])
    layers = memory.permute(*np.argsort(permutation).tolist())
    assert layers.shape == shape
    pages = StatePages([layers[1], layers[2]], 20, torch.float32)
    slots, states = torch.tensor([17, 4, 11]), torch.arange(1.0, 61).reshape(3, 20)
    pages.write(slots, states)
    assert torch.equal(pages.read(slots), states)
    assert (layers[1:] != 0).sum() == 60 and not layers[0].any()
    assert {int(b) for b in layers[1].nonzero()[:, 0]} == {1, 2, 4}


def test_a_layout_that_scatters_a_block_is_refused() -> None:
    from vllm_loopus.serving.worker.states import StatePages

    page = torch.zeros(2, 5, 4, 6).transpose(0, 1)  # LHBNC
    with pytest.raises(ValueError, match="VLLM_KV_CACHE_LAYOUT"):
        StatePages([page], 12, torch.float32)
