"""vLLM reads every format that was ever written, to the same answers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.conftest import fixed_depth_cases, runner_of
from tests.modeling.test_checkpoint import SOURCE, folder_with_config, old_name


def combined_model_pt(folder: Path) -> None:
    tensors = load_file(SOURCE / "model.safetensors")
    torch.save({old_name(k): v for k, v in tensors.items()}, folder / "combined_model.pt")
    folder_with_config(folder)


def own_format_sharded(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(SOURCE, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="300KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 3


@pytest.mark.parametrize("write", [combined_model_pt, own_format_sharded])
def test_same_answers(make_llm: Any, tmp_path: Path, write: Callable[[Path], None]) -> None:
    from vllm import SamplingParams

    write(tmp_path)
    overrides = {"N": 5, "q_threshold": 2.0}
    llm = make_llm(tmp_path, skip_tokenizer_init=True, hf_overrides=overrides)
    cases = fixed_depth_cases("qwen3", 5)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": case["prompt"]} for case in cases]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [list(o.outputs[0].token_ids) for o in outputs] == [c["tokens"] for c in cases]


def test_a_trainer_sends_one_tensor(make_llm: Any) -> None:
    """As trainers do while the engine serves: the others stay; a wrong one is named."""
    from vllm import SamplingParams

    llm = make_llm(SOURCE, skip_tokenizer_init=True)
    model = runner_of(llm).model
    params = SamplingParams(
        temperature=0, max_tokens=4, ignore_eos=True, logprobs=1, detokenize=False
    )

    def answer() -> list[tuple[int, float]]:
        (output,) = llm.generate([{"prompt_token_ids": [5, 6, 7]}], params, use_tqdm=False)
        steps = zip(output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True)
        return [(token, scores[token].logprob) for token, scores in steps]

    name = "decoder.norm.weight"
    before, sent = answer(), load_file(SOURCE / "model.safetensors")[name]
    assert model.load_weights([(name, sent * 0.5)]) == {name}
    assert answer() != before
    model.load_weights([(name, sent)])
    assert answer() == before
    with pytest.raises(ValueError, match=rf"misshapen: {name} is \[3\]"):
        model.load_weights([(name, torch.ones(3))])
