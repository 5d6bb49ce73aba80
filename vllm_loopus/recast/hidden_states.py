"""Runs a base model and returns its hidden states between layers.

By default the weights are streamed from the checkpoint for every batch, one module at a time
(accelerate's offloading), so that only one module is in memory. With `device_map` the whole model
is loaded onto its devices.
"""

import copy
import ctypes
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from vllm_loopus.backbones import BACKBONES
from vllm_loopus.recast.base import Base
from vllm_loopus.recast.tensors import TensorSource

Run = Callable[[torch.Tensor], torch.Tensor]


class StreamedWeights(Mapping[str, torch.Tensor]):
    """A mapping of tensors that are read from disk at each access."""

    def __init__(self, tensors: Mapping[str, TensorSource]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name].load()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class HiddenStates:
    """A base model that returns its states between layers. `norm`: its final norm."""

    def __init__(
        self, base: Base, device: torch.device, dtype: torch.dtype, device_map: Any = None
    ):
        """`device_map`: as in transformers; without it, the weights are streamed to `device`."""
        self.device = device
        # SDPA does not support a cap on attention scores and would ignore it silently.
        capped = BACKBONES[base.config.model_type].value(base.config, "attention_softcap")
        options = {"dtype": dtype, "attn_implementation": "sdpa" if capped is None else "eager"}
        if device_map is not None:
            # Works without the head, and for composites that are not causal LMs in transformers.
            model = AutoModel.from_pretrained(base.folder, device_map=device_map, **options)
            self._decoder = _text_decoder(model, base.num_layers)
        else:
            self._decoder = _streamed(base, device, options)
        self._decoder.eval()
        self.norm: nn.Module = self._decoder.norm
        self.bytes_per_token = 4 * (base.num_layers + 1) * int(base.config.hidden_size)

    def states(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [B, T] -> states [L+1, B, T, H] in float32, on one device."""
        found: list[torch.Tensor] = []

        def record(layer: int, taken: torch.Tensor, given: torch.Tensor, run: Run) -> None:
            for state in [taken, given] if layer == 0 else [given]:
                found.append(state.to(self.device, torch.float32))

        self.visit(ids, record)
        return torch.stack(found)

    def visit(
        self,
        ids: torch.Tensor,
        after: Callable[[int, torch.Tensor, torch.Tensor, Run], None],
    ) -> torch.Tensor:
        """Runs the model on token ids [B, T] and returns its last state [B, T, H].

        `after(layer, taken, given, run)` is called after each layer with its input, its output, and
        a function that runs the layer on other states at the same positions; if B is 1, on any
        number of them.
        """
        last = torch.empty(0)

        def hook(index: int) -> Callable[..., None]:
            def called(module: Any, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
                nonlocal last
                named = {name: value for name, value in kwargs.items() if name != "hidden_states"}

                def run(states: torch.Tensor) -> torch.Tensor:
                    # Not the module itself, which would call this hook again.
                    return _state(module.forward(states, *args[1:], **named))

                last = _state(output)
                after(index, args[0] if args else kwargs["hidden_states"], last, run)

            return called

        hooks = [
            layer.register_forward_hook(hook(index), with_kwargs=True)
            for index, layer in enumerate(self._decoder.layers)
        ]
        try:
            self._decoder(input_ids=ids.to(self.device), use_cache=False)
        finally:
            for handle in hooks:
                handle.remove()
        return last


def _state(output: Any) -> torch.Tensor:
    """The state that a layer returns, in some models beside other values."""
    state: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return state


def native_bf16() -> bool:
    """Whether the CPU has bf16 instructions. Without, bf16 matrix products are many times slower
    than float32."""
    fast = torch.cpu.get_capabilities()
    return bool(fast.get("avx512_bf16") or fast.get("amx_bf16"))


def default_dtype(device: torch.device, base: Base) -> torch.dtype:
    """The checkpoint's dtype if the device supports it natively, else float32."""
    stored: torch.dtype = base.config.dtype or torch.float32
    if device.type != "cpu" or stored == torch.float32:
        return stored
    return stored if stored == torch.bfloat16 and native_bf16() else torch.float32


def _streamed(base: Base, device: torch.device, options: dict[str, Any]) -> Any:
    from accelerate import cpu_offload, init_empty_weights  # slow to import

    _return_freed_memory()
    config = copy.deepcopy(base.config)
    config.tie_word_embeddings = False
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, **options)
    # The embedding, perhaps the largest tensor, stays in its dtype: a lookup does not need another.
    decoder = _text_decoder(model, base.num_layers)
    dtype = options["dtype"]
    decoder.embed_tokens.to(base.config.dtype or dtype)
    decoder.embed_tokens.register_forward_hook(lambda _module, _args, output: output.to(dtype))
    cpu_offload(model, execution_device=device, state_dict=StreamedWeights(base.tensors))
    return decoder


def _return_freed_memory() -> None:
    """Makes glibc return the memory of freed weights to the system instead of caching it."""
    m_mmap_threshold, nbytes = -3, 4 * 2**20
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(m_mmap_threshold, nbytes)


def _text_decoder(model: nn.Module, num_layers: int) -> Any:
    """The module of a model that contains the embedding, the layers and the final norm."""
    for module in model.modules():
        layers = getattr(module, "layers", None)
        # A vision tower has layers too, but no token embedding.
        if isinstance(layers, nn.ModuleList) and hasattr(module, "embed_tokens"):
            assert len(layers) == num_layers
            return module
    raise ValueError(f"{type(model).__name__} has no text decoder to analyse")
