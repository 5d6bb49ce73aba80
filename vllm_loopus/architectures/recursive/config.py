"""`RecursiveConfig`: a block of tied layers, how often it is repeated, and the rank of the LoRA."""

from typing import Any, ClassVar

from vllm_loopus.base_config import ConfigWithBase
from vllm_loopus.loop_fields import MAX_RECURSION_DEPTH, check_choice
from vllm_loopus.modeling.fixed_depth import NONE

ARCHITECTURE = "RecursiveForCausalLM"
ALL = -1  # default of `max_loops`: as many as there are
TIES = ("stepwise", "average", "lower")


class RecursiveConfig(ConfigWithBase):
    """A base model of L layers as a block of K = L / `loops` layers that is run `loops` times.

    - `base_config`, `base_model_name_or_path`: as in `ConfigWithBase`.
    - `loops`: how many loops the checkpoint has LoRA, norms and biases for.
    - `lora_rank`: the rank of the LoRA of each loop and linear layer; a layer whose matrix has a
      smaller full rank has that one. 0: no LoRA.
    - `tie`: how the tied layers were made from those of the base.
    - `tie_word_embeddings`: whether the LM head is the embedding.
    - `max_loops`: how many loops are run, at most `loops`, which it is by default. The family
      has no exit rule: `halting_strategy` is `none`, `min_loops` and `exit_threshold` change
      nothing.

    Raises `ValueError` with field, value and fix when it is built, or when `check()` is called
    after fields were overridden.
    """

    model_type: ClassVar[str] = "recursive_transformer"
    integers: ClassVar[tuple[str, ...]] = ("loops", "lora_rank", "max_loops", "min_loops")
    halting_strategies: ClassVar[tuple[str, ...]] = (NONE,)

    loops: int = 1
    lora_rank: int = 0
    tie: str = TIES[0]
    max_loops: int = ALL
    min_loops: int = 1
    halting_strategy: str = NONE
    exit_threshold: int | float = 1.0
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.architectures: list[str] = self.architectures or [ARCHITECTURE]
        if self.max_loops == ALL:
            self.max_loops = self.loops
        # transformers builds a config without arguments to find the defaults; do not check that.
        if self.base_config is not None:
            self.check()

    @property
    def block_size(self) -> int:
        """K, the number of tied layers."""
        return int(self.base.num_hidden_layers) // self.loops

    def layer_of_base(self, loop: int, layer: int) -> int:
        """The layer of the base model that tied `layer` stands for in `loop`; all 0-based."""
        return loop * self.block_size + layer

    def rank_of(self, outputs: int, inputs: int) -> int:
        """The rank of the LoRA of a linear layer of this size."""
        return min(self.lora_rank, outputs, inputs)

    def check(self) -> None:
        """Raises `ValueError` with field, value and fix if the fields are inconsistent."""
        layers = int(self.base.num_hidden_layers)
        if not 1 <= self.loops <= MAX_RECURSION_DEPTH:
            raise ValueError(f"loops={self.loops} must be from 1 to {MAX_RECURSION_DEPTH}")
        if layers % self.loops:
            fitting = [loops for loops in range(1, layers + 1) if layers % loops == 0]
            raise ValueError(
                f"loops={self.loops} does not divide the {layers} layers of the base model; choose "
                f"one of {', '.join(map(str, fitting))}"
            )
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank={self.lora_rank} must be 0 (no LoRA) or more")
        check_choice("tie", self.tie, TIES)
        self.attention.check()
        self._check_attention_types()
        if self.max_loops > self.loops:
            raise ValueError(
                f"max_loops={self.max_loops} must be from 1 to {self.loops}: the checkpoint has "
                f"the weights of {self.loops} loops"
            )
        self.check_loops()

    def _check_attention_types(self) -> None:
        types, size = self.attention.types, self.block_size
        for layer, kind in enumerate(types):
            if kind != types[layer % size]:
                raise ValueError(
                    f"loops={self.loops} ties layer {layer} of the base ({kind}) to layer "
                    f"{layer % size} ({types[layer % size]}), but tied layers must attend alike; "
                    f"choose loops for which layers L / loops apart have the same layer_types"
                )
