"""Recurrent depth in the engine: what is refused, and how it is said."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests import raven
from tests.conftest import GOLDEN
from tests.raven import start
from tests.serving.looped_answers import generate

REFUSED = [
    ({"overrides": {"max_loops": 0}}, r"max_loops=0 must be from 1 to 256"),
    (
        {"overrides": {"halting_strategy": "threshold"}},
        r"halting_strategy='threshold' is unknown.*kl",
    ),
    ({"state": "ones"}, r"initial_state='ones' .*no such file exists.*'zeros'"),
    ({"loopus": {"initial_state": 3}}, r"initial_state=3 must be 'noise'"),
    ({"state": "{tmp}/other"}, r"initial_state=.*has no tensor 's0'"),
    ({"state": "{tmp}/narrow"}, r"initial_state=.*shape \[8, 32\].*\[positions, 64\]"),
    ({"state": "{tmp}/nan"}, r"initial_state=.*NaN"),
    ({"state": "{tmp}/text"}, r"initial_state=.*cannot be read"),
    (
        {"overrides": {"max_loops": 200}},
        r"max_loops=200 .*max_model_len=128.*lower max_loops to \d",
    ),
]


@pytest.fixture(scope="module")
def wrong_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("states")
    save_file({"s1": torch.zeros(8, 64)}, folder / "other")
    save_file({"s0": torch.zeros(8, 32)}, folder / "narrow")
    save_file({"s0": torch.full((8, 64), torch.nan)}, folder / "nan")
    (folder / "text").write_text("no tensors")
    return folder


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=lambda value: str(value)[:50])
def test_refused(make_llm: Any, wrong_files: Path, options: dict[str, Any], message: str) -> None:
    given = dict(options)
    state = given.pop("state", "zeros" if "loopus" not in given else None)
    if state is not None:
        state = state.replace("{tmp}", str(wrong_files))
    with pytest.raises(Exception, match=r"(?s)" + message) as caught:
        start(make_llm, "huginn", state, **given)
    assert isinstance(caught.value, ValueError)


def test_only_for_models_whose_first_state_is_drawn(make_llm: Any) -> None:
    with pytest.raises(ValueError, match="initial_state='zeros' is not possible with LoopUS"):
        make_llm(
            GOLDEN / "qwen3",
            skip_tokenizer_init=True,
            additional_config={"loopus": {"initial_state": "zeros"}},
        )


def test_tensors_of_no_family(make_llm: Any, tmp_path: Path) -> None:
    folder = raven.copy("huginn", tmp_path, qk_bias=False)
    with pytest.raises(Exception, match="fit no family of model_type='huginn_raven'"):
        make_llm(folder, skip_tokenizer_init=True)


def test_positions_beyond_the_table(make_llm: Any) -> None:
    llm = start(make_llm, "retro_llama3", str(raven.table("retro_llama3")))
    assert llm.llm_engine.model_config.max_model_len == 64
    case = {"prompt": [5] * 70, "tokens": [0], "knobs": {"max_loops": 1}}
    with pytest.raises(Exception, match="maximum context length is 64"):
        generate(llm, [case])
    # It ends where the table does.
    (output,) = generate(llm, [{**case, "prompt": [5] * 60, "tokens": [0] * 9}])
    assert len(output.token_ids) <= 5
    assert output.finish_reason == "length"
