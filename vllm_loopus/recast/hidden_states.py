"""Runs a base model and gives its hidden states between layers.

By default the weights are streamed from the checkpoint for every batch, a module at a time
(accelerate's offloading), so that memory holds no more than one of them; `device_map` keeps the
model on its devices instead.
"""

import copy
import ctypes
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from vllm_loopus.backbones import BACKBONES
from vllm_loopus.recast.base import Base
from vllm_loopus.recast.tensors import TensorSource


class StreamedWeights(Mapping[str, torch.Tensor]):
    """Tensors that are read from disk each time they are asked for."""

    def __init__(self, tensors: Mapping[str, TensorSource]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name].load()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class HiddenStates:
    """A base model whose states between layers can be had. `norm` is its final norm."""

    def __init__(
        self, base: Base, device: torch.device, dtype: torch.dtype, device_map: Any = None
    ):
        """`device_map` as in transformers; without it the model is streamed to `device`."""
        self.device = device
        # "sdpa" leaves a cap on attention scores out without a word.
        capped = BACKBONES[base.config.model_type].value(base.config, "attention_softcap")
        options = {"dtype": dtype, "attn_implementation": "sdpa" if capped is None else "eager"}
        if device_map is not None:
            # Without the head, and of wrappers that are no causal LM for transformers, too.
            model = AutoModel.from_pretrained(base.folder, device_map=device_map, **options)
            self._decoder = _text_decoder(model, base.num_layers)
        else:
            self._decoder = _streamed(base, device, options)
        self._decoder.eval()
        self.norm: nn.Module = self._decoder.norm
        self.bytes_per_token = 4 * (base.num_layers + 1) * int(base.config.hidden_size)

    def states(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [B, T] -> states [L+1, B, T, H] in float32, on one device."""
        layers = self._decoder.layers
        found: list[torch.Tensor] = []

        def keep(state: Any) -> None:
            state = state[0] if isinstance(state, tuple) else state
            found.append(state.to(self.device, torch.float32))

        def before_the_first(module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
            keep(args[0] if args else kwargs["hidden_states"])

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            keep(output)

        hooks = [layers[0].register_forward_pre_hook(before_the_first, with_kwargs=True)]
        hooks += [layer.register_forward_hook(after) for layer in layers]
        try:
            self._decoder(input_ids=ids.to(self.device), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack(found)


def default_dtype(device: torch.device, base: Base) -> torch.dtype:
    """The checkpoint's dtype where the device computes in it, else float32.

    A CPU without bf16 instructions multiplies such matrices many times slower than float32 ones.
    """
    stored: torch.dtype = base.config.dtype or torch.float32
    if device.type != "cpu" or stored == torch.float32:
        return stored
    fast = torch.cpu.get_capabilities()
    native = stored == torch.bfloat16 and (fast.get("avx512_bf16") or fast.get("amx_bf16"))
    return stored if native else torch.float32


def _streamed(base: Base, device: torch.device, options: dict[str, Any]) -> Any:
    from accelerate import cpu_offload, init_empty_weights  # not at the start of every command

    _give_freed_memory_back()
    config = copy.deepcopy(base.config)
    config.tie_word_embeddings = False
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, **options)
    # A lookup gains nothing from the wider dtype, and an embedding may be a model's largest tensor.
    decoder = _text_decoder(model, base.num_layers)
    dtype = options["dtype"]
    decoder.embed_tokens.to(base.config.dtype or dtype)
    decoder.embed_tokens.register_forward_hook(lambda _module, _args, output: output.to(dtype))
    cpu_offload(model, execution_device=device, state_dict=StreamedWeights(base.tensors))
    return decoder


def _give_freed_memory_back() -> None:
    """Weights that come and go must not stay with glibc, which by itself learns to keep them."""
    m_mmap_threshold, nbytes = -3, 4 * 2**20
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(m_mmap_threshold, nbytes)


def _text_decoder(model: nn.Module, num_layers: int) -> Any:
    """The part of a model that holds embedding, layers and final norm."""
    for module in model.modules():
        layers = getattr(module, "layers", None)
        # A vision tower may have as many layers, but embeds no tokens.
        if isinstance(layers, nn.ModuleList) and hasattr(module, "embed_tokens"):
            assert len(layers) == num_layers
            return module
    raise ValueError(f"{type(model).__name__} has no text decoder to analyse")
