"""Quantised checkpoints, as the common tools write them: answers are those of the weights that the
files stand for, or the method is refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.conftest import GOLDEN, golden_cases
from tests.serving.looped_answers import OURO, ouro_cases

MODEL = GOLDEN / "qwen3"
PROMPTS = {
    MODEL: [case["prompt"] for case in golden_cases("qwen3")[:4]],
    OURO: [case["prompt"] for case in ouro_cases()[:4]],
}
GROUP = 32
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]

Tensors = dict[str, torch.Tensor]
# A weight [out, in] -> the tensors that are stored for it, and the weight that they stand for.
Quantise = Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]


def in_groups(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numbers from 0 to 15 [out, in], scales [out, in / GROUP], and what they stand for."""
    out, inner = weight.shape
    groups = weight.reshape(out, inner // GROUP, GROUP)
    scale = (groups.abs().amax(-1, keepdim=True) / 7).half().float()
    numbers = (groups / scale).round().clamp(-8, 7) + 8
    right = ((numbers - 8) * scale).reshape(out, inner)
    return numbers.reshape(out, inner).int(), scale.squeeze(-1), right


def packed(numbers: torch.Tensor) -> torch.Tensor:
    """Eight numbers of the last dimension in one, the first one lowest."""
    shifts = torch.arange(0, 32, 4)
    by_eight = numbers.long().reshape(*numbers.shape[:-1], -1, 8) << shifts
    words = by_eight.sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def gptq(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    numbers, scale, right = in_groups(weight)
    out, inner = weight.shape
    return {
        "qweight": packed(numbers).T.contiguous(),
        "qzeros": packed(torch.full((inner // GROUP, out), 7)),
        "scales": scale.T.contiguous().half(),
        "g_idx": torch.arange(inner, dtype=torch.int32) // GROUP,
    }, right


def awq(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    numbers, scale, right = in_groups(weight)
    out, inner = weight.shape
    ordered = numbers.T.reshape(inner, out // 8, 8)[:, :, AWQ_ORDER].reshape(inner, out)
    return {
        "qweight": packed(ordered),
        "qzeros": packed(torch.full((inner // GROUP, out), 8)),
        "scales": scale.T.contiguous().half(),
    }, right


def int8(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    scale = weight.abs().amax(-1, keepdim=True) / 127
    numbers = (weight / scale).round()
    return {"weight": numbers.to(torch.int8), "weight_scale": scale}, numbers * scale


def fp8(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    scale = weight.abs().amax(-1, keepdim=True) / 448
    numbers = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": numbers, "weight_scale": scale}, numbers.float() * scale


def compressed(number_type: str, name: str) -> dict[str, Any]:
    of_each = {"num_bits": 8, "type": number_type, "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": name,
        "quantization_status": "compressed",
        "ignore": ["decoder.lm_head", "lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**of_each, "strategy": "channel", "dynamic": False},
                "input_activations": {**of_each, "strategy": "token", "dynamic": True},
            }
        },
    }


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True,
       "version": "gemm"}  # fmt: skip
# Method -> how a weight is stored, what config.json says, and how far a log-probability may be off
# in bfloat16, with activations that are rounded too: about twice what is seen. Unquantised: 0.07.
METHODS: dict[str, tuple[Quantise, dict[str, Any], float]] = {
    "gptq": (gptq, GPTQ, 0.25),
    "awq": (awq, AWQ, 0.25),
    "int8": (int8, compressed("int", "int-quantized"), 0.3),
    "fp8": (fp8, compressed("float", "float-quantized"), 0.9),
}


def write(folder: Path, tensors: Tensors, source: Path = MODEL, **more: Any) -> None:
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32", **more}))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def quantised(folder: Path, method: str, source: Path) -> Any:
    """Writes a checkpoint; the reference model with the weights that it stands for."""
    quantise, config, _ = METHODS[method]
    stored: Tensors = {}
    meant = load_file(source / "model.safetensors")
    for name, tensor in list(meant.items()):
        layer, _, kind = name.rpartition(".")
        if ".layers." in name and layer.endswith("_proj") and kind == "weight":
            parts, meant[name] = quantise(tensor.float())
            stored.update({f"{layer}.{part}": value for part, value in parts.items()})
        else:
            stored[name] = tensor
    write(folder, stored, source, quantization_config=config)
    plain = folder / "plain"
    plain.mkdir()
    write(plain, {name: tensor.contiguous() for name, tensor in meant.items()}, source)
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    shutil.rmtree(plain)
    model.config.exit_threshold = 2.0
    return model.eval()


@pytest.mark.parametrize(
    ("method", "source"),
    [
        *((method, MODEL) for method in METHODS),
        *(pytest.param(method, OURO, marks=pytest.mark.long) for method in METHODS),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_answers_are_those_of_the_weights(
    make_llm: Any, tmp_path: Path, method: str, source: Path
) -> None:
    from vllm import SamplingParams

    model = quantised(tmp_path, method, source)
    llm = make_llm(tmp_path, skip_tokenizer_init=True, max_logprobs=20, dtype="bfloat16")
    params = SamplingParams(
        temperature=0, max_tokens=1, logprobs=20, detokenize=False,
        extra_args={"exit_threshold": 2.0},
    )  # fmt: skip
    outputs = llm.generate(
        [{"prompt_token_ids": p} for p in PROMPTS[source]], params, use_tqdm=False
    )
    farthest = 0.0
    for prompt, output in zip(PROMPTS[source], outputs, strict=True):
        right = model(torch.tensor([prompt]), logits_to_keep=1).logits[0, -1].log_softmax(-1)
        for token, value in output.outputs[0].logprobs[0].items():
            farthest = max(farthest, abs(value.logprob - right[token].item()))
    # Every loop of Ouro goes through the same rounding again: 0.3 without quantisation.
    assert farthest < METHODS[method][2] * (4 if source == OURO else 1)


def test_an_unknown_method_is_named(make_llm: Any, tmp_path: Path) -> None:
    write(tmp_path, load_file(MODEL / "model.safetensors"),
          quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})  # fmt: skip
    with pytest.raises(ValueError, match="bitsandbytes"):
        make_llm(tmp_path, skip_tokenizer_init=True)
