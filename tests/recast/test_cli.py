"""`vllm-loopus recast`, `analyze` and `convert`, as a user calls them."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.bases import save_base
from tests.conftest import GOLDEN
from vllm_loopus.cli.main import app
from vllm_loopus.config import LoopUSConfig
from vllm_loopus.recast.cut import Cut
from vllm_loopus.recast.provenance import file_hash

TINY = "loopus-tiny-base"


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments: str | Path) -> str:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return " ".join(result.stderr.split())


@pytest.fixture(scope="module")
def recast(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("recast") / "my-loopus"
    result = run("recast", TINY, "--out", out, "--tokens", "300", "--length", "100")
    assert result.exit_code == 0, result.output
    assert "encoder 0..0, reasoning 1..2, decoder 3..3" in result.stdout
    assert f"vllm serve {out}" in result.stdout
    return out


def test_everything_is_there(recast: Path) -> None:
    assert {path.name for path in recast.iterdir()} == {
        "README.md",
        "analysis.json",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "provenance.json",
        "report.html",
        "representation.png",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = LoopUSConfig.from_pretrained(recast)
    assert (config.max_loops, config.min_loops, config.exit_threshold) == (8, 1, 0.6)


def test_provenance_and_card(recast: Path) -> None:
    provenance = json.loads((recast / "provenance.json").read_text())
    assert provenance["base"]["name"] == TINY
    assert provenance["cut"] == {"encoder": [0], "reasoning": [1, 2], "decoder": [3]}
    weights = recast / "model.safetensors"
    assert provenance["weights_sha256"] == {weights.name: file_hash(weights)}
    assert provenance["versions"].keys() >= {"vllm-loopus", "torch", "transformers"}
    card = (recast / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: vllm-loopus\n")
    assert "# my-loopus\n" in card and "not post-trained" in card
    analysis = json.loads((recast / "analysis.json").read_text())
    for similarity in analysis["similarity"]:
        assert f"{similarity:.4f}" in card


class Page(HTMLParser):
    """Rows of the tables, and what the page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        self.fetched += [v for k, v in attributes if k in ("src", "href") and v]

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()


def test_report(recast: Path) -> None:
    assert (recast / "representation.png").read_bytes().startswith(b"\x89PNG")
    page = Page()
    page.feed((recast / "report.html").read_text())
    assert [source[:22] for source in page.fetched] == ["data:image/png;base64,"]
    analysis = json.loads((recast / "analysis.json").read_text())
    layers = [row for row in page.rows if row and row[0].isdigit()]
    assert [row[1] for row in layers] == ["encoder", "reasoning", "reasoning", "decoder"]
    assert [row[2] for row in layers] == [f"{value:.4f}" for value in analysis["similarity"]]


def test_names_are_escaped(tmp_path: Path) -> None:
    sample = tmp_path / "<b>sample.txt"
    sample.write_text("a+b=c; " * 40)
    out = tmp_path / "report"
    assert run("analyze", TINY, "--out", out, "--sample", sample).exit_code == 0
    text = (out / "report.html").read_text()
    assert "<b>sample" not in text and "&lt;b&gt;sample" in text


def test_by_hand(tmp_path: Path) -> None:
    out = tmp_path / "looped"
    options = ("--encoder", "none", "--decoder", "2..3", "--max-loops", "3", "--min-loops", "2")
    result = run("recast", TINY, "--out", out, *options, "--tokens", "100", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["cut"] == Cut(4, 0, 2).runs
    config = LoopUSConfig.from_pretrained(out)
    assert list(config.reasoning_layer_indices) == [0, 1]
    assert (config.max_loops, config.min_loops) == (3, 2)
    assert "given by hand" in (out / "README.md").read_text()
    assert (out / "report.html").is_file()


def test_one_end_by_hand(tmp_path: Path) -> None:
    out = tmp_path / "looped"
    assert run("recast", TINY, "--out", out, "--encoder", "0..1", "--tokens", "100").exit_code == 0
    assert list(LoopUSConfig.from_pretrained(out).encoder_layer_indices) == [0, 1]
    assert "The encoder was given by hand, the rest" in (out / "README.md").read_text()


def test_without_a_tokenizer(tmp_path: Path) -> None:
    save_base("llama", tmp_path / "base")
    for file in (tmp_path / "base").glob("token*"):
        file.unlink()
    out = tmp_path / "looped"
    assert "has no tokenizer" in refused("recast", tmp_path / "base", "--out", out)
    result = run("recast", tmp_path / "base", "--out", out, "--encoder", "0", "--decoder", "3")
    assert result.exit_code == 0 and "not analysed" in result.stderr
    assert not (out / "report.html").exists()
    assert "was not analysed" in (out / "README.md").read_text()
    again = ("--force", "--tokenizer", str(GOLDEN))
    assert "cannot be loaded" in refused("recast", tmp_path / "base", "--out", out, *again)


def test_a_tokenizer_with_tokens_of_its_own(tmp_path: Path) -> None:
    """As Gemma-3's, whose image token has no embedding: it matters when a text has it."""
    save_base("llama", tmp_path / "base", vocab_size=101)  # the tokenizer knows 102
    common = tmp_path / "common.txt"
    common.write_text("a+b=c " * 40)
    assert run("analyze", tmp_path / "base", "--sample", common).exit_code == 0
    rare = tmp_path / "rare.txt"
    rare.write_text("a+b=c\n" * 40)  # the line's end is the last token
    message = refused("analyze", tmp_path / "base", "--sample", rare)
    assert "the tokenizer gives token 101" in message


def test_analyze_as_json() -> None:
    result = run("analyze", TINY, "--tokens", "100", "--json")
    told = json.loads(result.stdout)
    assert len(told["similarity"]) == 4 and len(told["cosine"]) == 5
    assert told["ranking"][0]["cut"] == Cut(4, 1, 1).runs
    assert told["published_cut"] is None


def test_the_published_cut_stands_beside_the_rules(tmp_path: Path) -> None:
    """A model of the published name and depth; its weights here are random."""
    folder = tmp_path / "Qwen3-1.7B"
    save_base("qwen3", folder, num_hidden_layers=28)
    result = run("analyze", folder, "--tokens", "60")
    assert result.exit_code == 0, result.output
    told = " ".join(result.stdout.split())
    assert re.search(
        r"Published cut: encoder 0..1, reasoning 2..26, decoder 27..27; its rank", told
    )


def test_convert_and_back(tmp_path: Path, recast: Path) -> None:
    lds, own = tmp_path / "lds", tmp_path / "own"
    assert run("convert", recast, lds, "--format", "lds").exit_code == 0
    assert json.loads((lds / "config.json").read_text())["model_type"] == "lds"
    result = run("convert", lds, own, "--format", "loopus", "--json")
    assert json.loads(result.stdout)["format"] == "loopus"
    assert (own / "model.safetensors").read_bytes() == (recast / "model.safetensors").read_bytes()
    formats = [
        c["format"] for c in json.loads((own / "provenance.json").read_text())["conversions"]
    ]
    assert formats == ["lds", "loopus"]
    assert (own / "README.md").is_file() and (own / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--encoder", "1..2"), "encoder='1..2' must begin at layer 0"),
        (("--decoder", "2"), "decoder='2' must end at the last layer, 3"),
        (("--encoder", "0..1", "--decoder", "2..3"), "leave no layer of 4"),
        (("--encoder", "0..2"), "leave no layer of 4"),
        (("--decoder", "1..3"), "leave no layer of 4"),
        (("--device", "meta"), "cannot be run on meta"),
        (("--device-map", "cuda"), "cannot be run on cuda"),
        (("--revision", "main"), "revision='main' has no effect"),
        (("--max-loops", "0"), "max_loops=0 must be from 1"),
        (("--min-loops", "9"), "min_loops=9 must be from 1 to max_loops=8"),
        (("--exit-threshold", "nan"), "exit_threshold=nan must be a finite number"),
        (("--no-analysis",), "--no-analysis needs a cut"),
        (("--sample", "nowhere.txt"), "sample='nowhere.txt' is neither a file"),
        (("--device", "cuda:7"), "device='cuda:7' cannot be used"),
        (("--device", "abacus"), "device='abacus' cannot be used"),
        (("--max-shard-size", "huge"), "max_shard_size='huge' is not a size"),
    ],
)
def test_bad_options(tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    assert message in refused("recast", TINY, "--out", tmp_path / "out", *options)
    assert not any(tmp_path.iterdir())


def test_outputs_that_exist(tmp_path: Path, recast: Path) -> None:
    assert "exists; choose another folder" in refused("recast", TINY, "--out", recast)
    assert "exists; choose another folder" in refused("convert", recast, recast)
    assert "is or contains the model to read" in refused("convert", recast, recast, "--force")
    assert "exists; choose another folder" in refused("analyze", TINY, "--out", recast)
    assert (recast / "model.safetensors").is_file()
