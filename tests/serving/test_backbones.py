"""Every backbone in vLLM against transformers, in float32: the base itself, and early exit."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from vllm.v1.kv_cache_interface import FullAttentionSpec

from tests.bases import BASES, SIZES, WINDOW, load_base, save_base
from tests.conftest import runner_of
from vllm_loopus import exit_depths
from vllm_loopus.aliases import EMBEDDED
from vllm_loopus.recast.convert import recast

VOCABULARY = SIZES["vocab_size"]  # of the trained one too
TRAINED = "loopus-tiny-base"
MAX_LOOPS = 4
CERTAIN = 1e-4  # a smaller margin may fall either way
NEW_TOKENS = 6
# Over a block of 32, over the window, and within it.
LENGTHS = (45, 3 * WINDOW, WINDOW - 2)


@dataclass
class Case:
    base: Any  # transformers
    looped: Any  # transformers
    llm: Any
    prompts: list[list[int]]


@pytest.fixture(scope="module", params=[*BASES, TRAINED])
def case(
    request: pytest.FixtureRequest, make_llm: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Case]:
    folder = tmp_path_factory.mktemp(request.param)
    base = EMBEDDED[TRAINED] if request.param == TRAINED else folder / "base"
    if request.param != TRAINED:
        save_base(request.param, base)
    looped = folder / "looped"
    recast(
        str(base),
        looped,
        encoder=1,
        decoder=1,
        max_loops=MAX_LOOPS,
        exit_threshold=0.5,
        exit_interval=1,
    )
    spread_confidence(looped)
    generator = torch.Generator().manual_seed(3)
    yield Case(
        base=load_base(base),
        looped=AutoModelForCausalLM.from_pretrained(looped, dtype=torch.float32),
        llm=make_llm(
            looped,
            max_num_batched_tokens=16,
            max_num_seqs=4,
            max_logprobs=VOCABULARY,
            enable_prefix_caching=False,
        ),
        prompts=[torch.randint(2, VOCABULARY, (n,), generator=generator).tolist() for n in LENGTHS],
    )


def spread_confidence(folder: Path) -> None:
    """A confidence head whose answers differ between tokens and depths."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    generator = torch.Generator().manual_seed(5)
    tensors["q_head.1.weight"].normal_(0, 0.5, generator=generator)
    save_file(tensors, file, metadata={"format": "pt"})


@torch.no_grad()
def reference(case: Case, prompt: list[int]) -> tuple[list[int], list[int]]:
    """Greedy tokens and exit depths of the transformers side; nothing may be a toss-up."""
    tokens, depths = list(prompt), []
    for _ in range(NEW_TOKENS):
        output = case.looped(torch.tensor([tokens]), logits_to_keep=1, output_states=True)
        best, second = output.logits[0, -1].topk(2).values
        assert best - second > CERTAIN
        for confidence in output.confidences:
            assert abs(confidence.item() - case.looped.config.exit_threshold) > CERTAIN
        tokens.append(int(output.logits[0, -1].argmax()))
        depths.append(int(output.exit_depths[0]))
    return tokens[len(prompt) :], depths


def generate(case: Case, **options: Any) -> list[Any]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, ignore_eos=True, detokenize=False, **options)
    prompts = [{"prompt_token_ids": prompt} for prompt in case.prompts]
    return case.llm.generate(prompts, params, use_tqdm=False)


def test_windows_are_masks_alone(case: Case) -> None:
    """Every plane keeps all its positions: a deeper token may ask for any of them."""
    core = case.llm.llm_engine.engine_core.engine_core
    groups = core.scheduler.kv_cache_config.kv_cache_groups
    assert len(groups) == MAX_LOOPS
    assert all(type(group.kv_cache_spec) is FullAttentionSpec for group in groups)


def test_early_exit(case: Case) -> None:
    expected = [reference(case, prompt) for prompt in case.prompts]
    assert len({depth for _, depths in expected for depth in depths}) > 1
    outputs = [output.outputs[0] for output in generate(case, max_tokens=NEW_TOKENS)]
    assert [(list(o.token_ids), exit_depths(o)) for o in outputs] == expected


@torch.no_grad()
def test_one_open_loop_is_the_base(case: Case) -> None:
    bias = runner_of(case.llm).model.reasoning.gate.delta_proj.bias
    trained = bias.clone()
    bias.fill_(-100)  # a = 1: the update is taken whole
    try:
        outputs = generate(
            case,
            max_tokens=1,
            logprobs=VOCABULARY,
            prompt_logprobs=VOCABULARY,
            extra_args={"max_loops": 1},
        )
    finally:
        bias.copy_(trained)
    for prompt, output in zip(case.prompts, outputs, strict=True):
        expected = case.base(torch.tensor([prompt])).logits[0].log_softmax(-1)
        found = [*output.prompt_logprobs[1:], output.outputs[0].logprobs[0]]
        table = torch.tensor([[row[t].logprob for t in range(VOCABULARY)] for row in found])
        torch.testing.assert_close(table, expected, atol=1e-4, rtol=0)
