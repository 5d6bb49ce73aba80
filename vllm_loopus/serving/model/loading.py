"""Loads a checkpoint into a model for vLLM, and says which of its tensors do not fit."""

from collections.abc import Callable, Iterable

import torch
from vllm.model_executor.models.llama import LlamaModel
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper

from vllm_loopus.modeling.checkpoint import CheckpointCheck, explaining_read_errors
from vllm_loopus.modeling.looped_model import LoopedReference
from vllm_loopus.serving.model.base import LoopedModelBase


def load_checked(
    model: LoopedModelBase,
    weights: Iterable[tuple[str, torch.Tensor]],
    reference: type[LoopedReference],
    *,
    rename: Callable[[str], str] = str,
    mapper: WeightsMapper | None = LlamaModel.hf_to_vllm_mapper,
    takes: Callable[[str, torch.Tensor], bool] = lambda name, tensor: False,
) -> set[str]:
    """Loads `weights` of the model's checkpoint; once the engine serves, also a part of one.

    - `reference`: knows name and shape of every tensor of such a checkpoint. A quantised one has
      tensors of its own kind, which vLLM's loader checks.
    - `rename`: from names in the file to those of the reference.
    - `mapper`: from there to the modules; by default it merges q, k, v and gate, up where they are
      split, as vLLM's Llama does.
    - `takes`: loads a tensor that vLLM's loader has no place for; False for all others.

    Returns the names of the parameters. Raises `ValueError` that names the tensors that do not fit
    or hold NaN or infinity, and the files that cannot be read.
    """
    weights = explaining_read_errors(weights, model.model_name)
    loader = AutoWeightsLoader(model)
    if model.quant_config is not None:
        renamed = ((rename(name), tensor) for name, tensor in weights)
        return loader.load_weights((w for w in renamed if not takes(*w)), mapper=mapper)
    dtype = next(model.parameters()).dtype
    check = CheckpointCheck(reference.expected_shapes(model.config), dtype, rename)
    rest = (weight for weight in check.checked(weights) if not takes(*weight))
    loaded = loader.load_weights(rest, mapper=mapper)
    check.raise_if_wrong(model.model_name, partial=model.is_served)
    return loaded
