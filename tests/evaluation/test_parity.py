"""`vllm-loopus eval` on vLLM against lm-evaluation-harness's own `hf` type on the reference model:
the same answer on every document, in float32."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from tests.conftest import GOLDEN
from vllm_loopus.cli.main import app
from vllm_loopus.evaluation.columns import TINY
from vllm_loopus.evaluation.engines import RESERVED, EngineOptions, running_engine
from vllm_loopus.evaluation.models import looped_model
from vllm_loopus.evaluation.tasks import load_tasks
from vllm_loopus.tiny.tokenizer import build_tokenizer

DOCUMENTS = 12
MAX_LENGTH = 64
THRESHOLD = 0.7  # the golden model leaves at many depths
LONG = "long_text"  # more than one window of MAX_LENGTH tokens each
TASKS = [column.task for column in TINY.columns] + [LONG]
LONG_TASK = """
task: long_text
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
    aggregation: weighted_perplexity
    higher_is_better: false
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden Qwen3 model with the tokenizer of loopus-tiny."""
    folder = tmp_path_factory.mktemp("model") / "golden"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).symlink_to(GOLDEN / "qwen3" / name)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def own_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a task definition of the user's."""
    folder = tmp_path_factory.mktemp("tasks")
    texts = [" ".join(f"word{i}" * n for i in range(9)) for n in (1, 3, 7)]
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "texts.jsonl").write_text(rows)
    (folder / "long.yaml").write_text(LONG_TASK.replace("FILE", str(folder / "texts.jsonl")))
    return folder


@pytest.fixture(scope="module")
def told(
    quick_starts: None, model: Path, own_tasks: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What the command prints as JSON, and under `results` the files it writes."""
    out = tmp_path_factory.mktemp("results")
    arguments = [
        *("eval", str(model), "--base", "loopus-tiny-base", "--tasks", f"tiny,{LONG}"),
        *("--include", str(own_tasks), "--limit", str(DOCUMENTS), "--dtype", "float32"),
        *("--max-length", str(MAX_LENGTH), "--exit-threshold", str(THRESHOLD)),
        *("--out", str(out), "--json"),
    ]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    results = [json.loads(file.read_text()) for file in out.rglob("*.json")]
    return {**json.loads(result.stdout), "results": results}


@pytest.fixture(scope="module")
def reference(model: Path, own_tasks: Path) -> Iterator[Callable[..., Any]]:
    """`reference(lm)`: what an lm-eval model answers, by task."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tasks = load_tasks(TASKS, include=own_tasks)

    def answers(lm: Any) -> dict[str, list[Any]]:
        found = {}
        for task in tasks:
            samples = lm_eval.evaluate(lm, task.found, limit=DOCUMENTS, bootstrap_iters=0)
            found[task.name] = [s["filtered_resps"] for s in samples["samples"][task.name]]
        return found

    yield answers


def of_setting(told: dict[str, Any], model: str, setting: str) -> dict[str, Any]:
    return {
        result["task"]: result
        for result in told["results"]
        if result["model"] == model and result["setting"] == setting
    }


def same(ours: Any, theirs: Any) -> bool:
    """Texts and decisions equal, log-likelihoods within 1e-3."""
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    if isinstance(ours, float):
        return ours == pytest.approx(float(theirs), abs=1e-3)
    return ours == theirs


def assert_same(results: dict[str, Any], expected: dict[str, list[Any]]) -> None:
    assert set(results) == set(expected) == set(TASKS)
    for task, answers in expected.items():
        items = results[task]["items"][task]
        assert len(items) == len(answers) == (3 if task == LONG else DOCUMENTS)
        for item, answer in zip(items, answers, strict=True):
            assert same(item["responses"], json.loads(json.dumps(answer))), (task, item, answer)


def test_fixed_depth_equals_lm_evals_own_hf(
    told: dict[str, Any], model: Path, reference: Callable[..., Any]
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    plain.config.update({"min_loops": 8})
    lm = HFLM(plain, tokenizer=str(model), batch_size=8, max_length=MAX_LENGTH - RESERVED)
    results = of_setting(told, str(model), "8 loops")
    assert_same(results, reference(lm))
    for result in results.values():
        work = result["work"]
        assert work["rows"] == 8 * work["positions"] and work["depths"] == 8 * work["exits"]


def test_the_base_equals_lm_evals_own_hf(
    told: dict[str, Any], reference: Callable[..., Any]
) -> None:
    from vllm_loopus.aliases import EMBEDDED

    folder = str(EMBEDDED["loopus-tiny-base"])
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    lm = HFLM(plain, tokenizer=folder, batch_size=8, max_length=MAX_LENGTH - RESERVED)
    assert_same(of_setting(told, "loopus-tiny-base", "no loop"), reference(lm))


def test_early_exit_equals_the_reference(
    told: dict[str, Any], model: Path, reference: Callable[..., Any]
) -> None:
    """The depth of a text is that of its last token, on both sides."""
    looped = looped_model(str(model), None, True, THRESHOLD)
    options = EngineOptions("hf", "float32", MAX_LENGTH, batch_size=8)
    with running_engine(looped, options) as lm:
        lm.apply(looped.settings[0])
        expected = reference(lm)
        early = of_setting(told, str(model), f"≤ 8 loops, exit at {THRESHOLD}")
        assert_same(early, expected)
        # Of whole texts, one at a time, without any padding.
        (task,) = load_tasks(["tiny_last_word"])
        tokenizer = AutoTokenizer.from_pretrained(model)
        depths = []
        for document in list(task.leaves[0].eval_docs)[:DOCUMENTS]:
            ids = tokenizer.encode(document["question"] + document["answer"])
            depths += lm.model(torch.tensor([ids])).exit_depths.tolist()
    work = early["tiny_last_word"]["work"]
    assert len(set(depths)) > 2
    assert (work["exits"], work["depths"]) == (DOCUMENTS, sum(depths))


def test_the_table(told: dict[str, Any]) -> None:
    columns = [column["title"] for column in told["columns"]]
    assert columns == ["Text", "Last word", "Choice", "Generation", LONG]
    base, fixed, early = told["rows"]
    assert base["delta"] is None and base["passes"] is None
    assert fixed["passes"] == 8 and 1 < early["passes"] < 8
    for row in (fixed, early):
        mean = (row["scores"]["Choice"]["value"] + row["scores"]["Generation"]["value"]) / 2
        assert row["average"]["value"] == pytest.approx(mean)
        difference = mean - base["average"]["value"]
        assert row["delta"]["value"] == pytest.approx(difference)
        assert all(score["error"] is not None for score in row["scores"].values())
