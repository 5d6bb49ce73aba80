"""Cut a pretrained checkpoint into encoder, reasoning block and decoder."""

import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from vllm_loopus.config import LoopUSConfig
from vllm_loopus.modeling.gate import SelectiveGate
from vllm_loopus.modeling.halting import build_confidence_head

OUTSIDE_LAYERS = {
    "model.embed_tokens.weight": "encoder.embed_tokens.weight",
    "model.norm.weight": "decoder.norm.weight",
    "lm_head.weight": "decoder.lm_head.weight",
}
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def layer_runs(num_layers: int, encoder: int, decoder: int) -> dict[str, list[int]]:
    """Layer indices by config field for a cut of `encoder` first and `decoder` last layers.

    Raises `ValueError` when no layer is left to loop.
    """
    if encoder < 0 or decoder < 0 or encoder + decoder >= num_layers:
        raise ValueError(
            f"encoder={encoder} and decoder={decoder} leave no layer of {num_layers} for the "
            "reasoning block; lower one of them"
        )
    layers = list(range(num_layers))
    return {
        "encoder_layer_indices": layers[:encoder],
        "reasoning_layer_indices": layers[encoder : num_layers - decoder],
        "decoder_layer_indices": layers[num_layers - decoder :],
    }


def rename(name: str, runs: dict[str, list[int]]) -> str:
    """The LoopUS name of a tensor of the base model. Raises `ValueError` for an unknown tensor."""
    if name in OUTSIDE_LAYERS:
        return OUTSIDE_LAYERS[name]
    if match := LAYER.fullmatch(name):
        index, rest = int(match[1]), match[2]
        for field, run in runs.items():
            if index in run:
                block = field.removesuffix("_layer_indices")
                return f"{block}.layers.{run.index(index)}.{rest}"
    raise ValueError(f"tensor {name!r} of the base model has no place in a LoopUS model")


def new_tensors(hidden_size: int, dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    """Gate and confidence head at the paper's initialisation, named as in a checkpoint."""
    generator = torch.Generator().manual_seed(seed)
    gate = SelectiveGate(hidden_size)
    gate.reset_parameters(generator)
    head = build_confidence_head(hidden_size)
    with torch.no_grad():
        _, _, weight, bias = head.parameters()
        weight.normal_(0, 0.02, generator=generator)
        bias.zero_()
    named = {
        **{f"reasoning.gate.{name}": value for name, value in gate.state_dict().items()},
        **{f"q_head.{name}": value for name, value in head.state_dict().items()},
    }
    return {name: tensor.to(dtype) for name, tensor in named.items()}


def recast(
    base: str, out: Path, *, encoder: int, decoder: int, seed: int = 0, **fields: Any
) -> LoopUSConfig:
    """Write the LoopUS checkpoint `out` cut from the pretrained model `base`.

    The first `encoder` layers become the encoder, the last `decoder` layers the decoder; `fields`
    are further fields of `LoopUSConfig`. `out` appears when it is complete. Raises
    `FileExistsError` when it is there already and `ValueError` for a cut that cannot be.
    """
    if out.exists():
        raise FileExistsError(f"out={out} exists; choose another folder or delete it")
    base_config = AutoConfig.from_pretrained(base)
    runs = layer_runs(base_config.num_hidden_layers, encoder, decoder)
    fields.setdefault("base_model_name_or_path", base)
    config = LoopUSConfig(base_config=base_config.to_dict(), **runs, **fields)
    config.dtype = base_config.dtype
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    tensors = {rename(name, runs): tensor for name, tensor in model.state_dict().items()}
    head = tensors["decoder.lm_head.weight"]
    # A tied base shares one matrix; a LoopUS checkpoint stores both.
    tensors["decoder.lm_head.weight"] = head.clone()
    tensors.update(new_tensors(config.hidden_size, head.dtype, seed))

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as unfinished:
        folder = Path(unfinished) / out.name
        config.save_pretrained(folder)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        AutoTokenizer.from_pretrained(base).save_pretrained(folder)
        GenerationConfig.from_pretrained(base).save_pretrained(folder)
        shutil.move(folder, out)
    return config
