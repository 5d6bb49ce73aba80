"""Recursive transformers on the engine: the base at full rank, the reference at any rank."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.bases import BASES, load_base, save_base
from tests.conftest import counter, spy_on_steps
from tests.serving.looped_answers import assert_right, assert_right_preempted, generate, scarce
from vllm_loopus.aliases import EMBEDDED
from vllm_loopus.recast.base import Base
from vllm_loopus.recast.convert import WriteOptions
from vllm_loopus.recast.recursive import plan
from vllm_loopus.serving.model.by_depth import RowsByDepth

TINY = "loopus-tiny-base"
FULL = 64  # the rank of the largest matrices of all bases here
NEW_TOKENS = 8
LENGTHS = (1, 5, 17, 33, 40, 3)
CERTAIN = 1e-4  # a smaller margin may fall either way
# A base whose layers differ in their attention cannot be tied anyhow.
CHANGES: dict[str, dict[str, Any]] = {"qwen2": {"max_window_layers": 0}}

Case = dict[str, Any]


def base_folder(name: str, folder: Path) -> Path:
    if name == TINY:
        return Path(EMBEDDED[TINY])
    save_base(name, folder / "base", **CHANGES.get(name, {}))
    return folder / "base"


def recast(base: Path, out: Path, loops: int, rank: int, tie: str = "average") -> Path:
    plan(Base.open(str(base)), loops=loops, lora_rank=rank, tie=tie).write(out, WriteOptions())
    return out


def prompts() -> list[list[int]]:
    rng = random.Random(5)
    return [[rng.randrange(2, 128) for _ in range(length)] for length in LENGTHS]


@torch.no_grad()
def greedy(prompt: list[int], logits: Callable[[torch.Tensor], torch.Tensor]) -> list[int]:
    """Tokens of an uncached model; none may be a toss-up."""
    tokens = list(prompt)
    for _ in range(NEW_TOKENS):
        last = logits(torch.tensor([tokens]))[0, -1]
        best, second = last.topk(2).values
        assert best - second > CERTAIN
        tokens.append(int(last.argmax()))
    return tokens[len(prompt) :]


def cases_of(folder: Path, loops: int) -> list[Case]:
    """Requests of all budgets with the answers of the reference model."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    cases = []
    for index, prompt in enumerate(prompts()):
        model.config.max_loops = budget = 1 + index % loops
        tokens = greedy(prompt, lambda ids: model(ids, logits_to_keep=1).logits)
        depths, knobs = [budget] * NEW_TOKENS, {"max_loops": budget}
        cases.append({"prompt": prompt, "tokens": tokens, "depths": depths, "knobs": knobs})
    return cases


@pytest.fixture(scope="module")
def low_rank(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Case]]:
    """Four loops of one layer of a Llama with biases, at rank 8."""
    folder = tmp_path_factory.mktemp("recursive")
    out = recast(base_folder("llama", folder), folder / "out", loops=4, rank=8)
    return out, cases_of(out, 4)


def test_low_rank_is_the_reference(
    make_llm: Any, low_rank: tuple[Path, list[Case]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, in one batch with own budgets, from the prefix cache, and with replayed depths."""
    folder, cases = low_rank
    original, mixed = RowsByDepth.of, []

    def noted(depth: torch.Tensor) -> RowsByDepth:
        mixed.append(len(depth.unique()))
        return original(depth)

    monkeypatch.setattr(RowsByDepth, "of", noted)
    llm = make_llm(
        folder,
        skip_tokenizer_init=True,
        disable_log_stats=False,
        additional_config={"loopus": {"exit_quorum": 0.3}},
    )
    assert_right(llm, cases[3:4])
    assert max(mixed) == 1
    for _ in range(2):
        assert_right(llm, cases)
    assert max(mixed) > 1  # rows of several depths in one pass
    assert counter(llm, "vllm:prefix_cache_hits") > 0
    assert_right(llm, [{**case, "knobs": {"exit_depths": case["depths"]}} for case in cases])


def test_low_rank_in_chunks_preempted_and_with_guesses(
    make_llm: Any, low_rank: tuple[Path, list[Case]]
) -> None:
    folder, cases = low_rank
    llm = make_llm(
        folder,
        skip_tokenizer_init=True,
        max_num_batched_tokens=16,
        **scarce(4),
        additional_config={"loopus": {"speculate": {"draft_depth": 1, "lookahead": 2}}},
    )
    steps = spy_on_steps(llm)
    assert_right_preempted(llm, cases)
    assert max(rows for step in steps for rows in step.passes) == 16


def base_answers(base: Path) -> list[Case]:
    model = load_base(base)
    return [
        {
            "prompt": prompt,
            "tokens": greedy(prompt, lambda ids: model(ids).logits),
            "depths": [2] * NEW_TOKENS,
            "knobs": {},
        }
        for prompt in prompts()
    ]


def test_full_rank_is_the_base(make_llm: Any, tmp_path: Path) -> None:
    base = base_folder(TINY, tmp_path)
    out = recast(base, tmp_path / "out", loops=2, rank=FULL, tie="stepwise")
    cases = base_answers(base)
    assert_right(make_llm(out, skip_tokenizer_init=True), cases)


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_full_rank_is_the_base_by_engine(make_llm: Any, tmp_path: Path, dtype: str) -> None:
    """The same engine, options and all, for both."""
    base = base_folder(TINY, tmp_path)
    out = recast(base, tmp_path / "out", loops=2, rank=FULL)
    new = [0] * NEW_TOKENS
    cases = [{"prompt": prompt, "tokens": new, "knobs": None} for prompt in prompts()]
    options = {"skip_tokenizer_init": True, "dtype": dtype}
    answers = [
        [list(output.token_ids) for output in generate(make_llm(model, **options), cases)]
        for model in (base, out)
    ]
    assert answers[0] == answers[1]


@pytest.mark.long
@pytest.mark.parametrize("name", BASES)
def test_every_backbone(make_llm: Any, tmp_path: Path, name: str) -> None:
    """At full rank the base; at low rank the reference, with rows of several depths a pass."""
    base = base_folder(name, tmp_path)
    out = recast(base, tmp_path / "full", loops=2, rank=FULL, tie="lower")
    cases = base_answers(base)
    assert_right(make_llm(out, skip_tokenizer_init=True, max_num_batched_tokens=16), cases)
    low = recast(base, tmp_path / "low", loops=2, rank=6)
    llm = make_llm(low, skip_tokenizer_init=True, max_num_batched_tokens=16)
    assert_right(llm, cases_of(low, 2))


@pytest.mark.long
def test_padded_as_for_graphs_and_with_the_product_of_a_gpu(
    make_llm: Any, low_rank: tuple[Path, list[Case]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_loopus.serving.worker import regions

    monkeypatch.setenv(regions.PADDED_ROWS, "1,2,4,8,16,24")
    original = RowsByDepth.of
    monkeypatch.setattr(RowsByDepth, "of", lambda depth: RowsByDepth(original(depth).index))
    folder, cases = low_rank
    llm = make_llm(folder, skip_tokenizer_init=True, max_num_batched_tokens=40, max_num_seqs=12)
    assert_right(llm, cases)


@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(name, marks=pytest.mark.long) for name in ("phi3", "gemma2"))]
)
def test_two_ranks(
    make_llm: Any,
    forked_processes: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """K/V heads are repeated (Llama) or divided, projections in one (Phi-3) or apart; biases of
    layers whose outputs are added up count once."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # or ranks want a memory node each
    changes = {"num_attention_heads": 2, "hidden_size": 128} if name == "phi3" else {}
    save_base(name, tmp_path / "base", **changes)
    folder = recast(tmp_path / "base", tmp_path / "out", loops=2, rank=8)
    llm = make_llm(
        folder,
        skip_tokenizer_init=True,
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
        max_num_batched_tokens=24,
    )
    assert_right(llm, cases_of(folder, 2))


@pytest.mark.long
def test_fewer_loops_than_the_checkpoint_has(
    make_llm: Any, low_rank: tuple[Path, list[Case]]
) -> None:
    folder, cases = low_rank
    llm = make_llm(folder, skip_tokenizer_init=True, hf_overrides={"max_loops": 2})
    shallow = [case for case in cases if case["knobs"]["max_loops"] <= 2]
    assert len(shallow) > 2
    assert_right(llm, shallow)
    with pytest.raises(ValueError, match="max_loops=5 must be from 1 to 4"):
        make_llm(folder, skip_tokenizer_init=True, hf_overrides={"max_loops": 5})
