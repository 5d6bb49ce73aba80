"""Reference models of which any function can be trained."""

from typing import Any

from vllm_loopus.architectures import record_of
from vllm_loopus.modeling.looped_model import LoopedReference


class Trainable(LoopedReference):
    """A reference model with a `forward` that can run any function of the model. Stands before the
    reference in the bases of a class.

    Wrappers for data-parallel and sharded training only work for calls of `forward`.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        # The modules that sharded training gathers one at a time.
        self._no_split_modules = [config.backbone.hf_layer.partition(":")[2]]

    def forward(self, function: Any = None, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Calls `function(model, ...)` if `function` is callable, else the reference's forward."""
        if callable(function):
            return function(self, *args, **kwargs)
        return super().forward(*(() if function is None else (function,)), *args, **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in transformers, but with the reference model's class name in the config."""
        super().save_pretrained(save_directory, *args, **kwargs)
        self.config.architectures = [record_of(self.config).name]
        self.config.save_pretrained(save_directory)
