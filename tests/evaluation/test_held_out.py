"""Tasks from held-out texts: the right answer is what stands in the text."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_loopus.cli.main import app
from vllm_loopus.evaluation.held_out import documents
from vllm_loopus.evaluation.models import Setting, looped_model
from vllm_loopus.evaluation.tasks import load_tasks

NAMES = ["held_out_text", "held_out_last_word", "held_out_choice", "held_out_word"]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    rows = [
        f"The {colour} garden has a gate. "
        + " ".join(f"Somebody number {n} walked through it slowly." for n in range(3))
        + f" In the end nobody but the gardener of {place} closed the gate."
        for colour, place in [("red", "Rome"), ("blue", "Bonn"), ("green", "Graz"), ("old", "Oslo")]
    ]
    text = tmp_path / "texts.jsonl"
    text.write_text("\n".join(json.dumps({"text": row}) for row in rows) + "\n")
    monkeypatch.setenv(documents.HELD_OUT, str(text))
    return text


def test_answers_stand_in_the_text(file: Path) -> None:
    whole = {row["text"] for row in documents.text()["test"]}
    assert len(whole) == 4
    for row in documents.choices()["test"]:
        ending = row["choices"][row["right"]]
        assert f"{row['context']} {ending}" in whole
        assert len(set(row["choices"])) == 4
    for row in documents.last_words()["test"]:
        assert any(text.startswith(f"{row['context']} {row['word']}") for text in whole)
        assert row["word"] in row["context"]


def test_what_is_scored_is_the_text(file: Path) -> None:
    """Context and target as lm-eval joins them, spaces included."""
    whole = {row["text"] for row in documents.text()["test"]}
    asked = 0
    for name in ("held_out_last_word", "held_out_choice"):
        (task,) = load_tasks([name])[0].leaves
        for doc in task.eval_docs:
            made = task.construct_requests(doc, task.doc_to_text(doc), metadata=(name, 0, 1))
            joined = ["".join(one.args) for one in (made if isinstance(made, list) else [made])]
            right = joined[doc["right"]] if "right" in doc else joined[0]
            assert any(text.startswith(right) for text in whole), right
            asked += 1
    assert asked > 4


def test_lm_eval_loads_them_and_their_documents_identify_them(file: Path) -> None:
    before = {task.name: task.fingerprint(None) for task in load_tasks(NAMES)}
    assert set(before) == set(NAMES)
    file.write_text(file.read_text().replace("garden", "forest"))
    after = {task.name: task.fingerprint(None) for task in load_tasks(NAMES)}
    assert all(before[name] != after[name] for name in NAMES)


def test_every_depth_is_a_setting() -> None:
    settings = looped_model("loopus-tiny", 3, None, 0.5, True, "last_exited").settings
    assert settings[:3] == (Setting(1), Setting(2), Setting(3))
    assert settings[1].knobs() == {"min_loops": 2, "max_loops": 2}
    assert [setting.label for setting in settings[:2]] == ["1 loop", "2 loops"]
    assert settings[3].label == "≤ 3 loops, exit at 0.5, last_exited"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tasks", "held-out"), "needs texts that no training has seen; give --held-out FILE"),
        (
            ("--tasks", "tiny", "--kv-policy", "last_exited", "--engine", "hf"),
            "kv_policy=last_exited needs --engine vllm",
        ),
    ],
)
def test_refused(options: tuple[str, ...], message: str) -> None:
    result = CliRunner().invoke(app, ["eval", "loopus-tiny", *options])
    assert result.exit_code == 2 and message in " ".join(result.stderr.split())
