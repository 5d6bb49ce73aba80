"""`RavenConfig`: the config of Huginn-0125 and of retrofitted recurrence."""

from typing import Any, ClassVar

from transformers import PreTrainedConfig

from vllm_loopus.architectures.raven.criteria import (
    CRITERIA,
    default_threshold,
    reads_logits,
)
from vllm_loopus.architectures.raven.families import FAMILIES, Family, family_of, tensor_names
from vllm_loopus.loop_fields import LoopFields, check_number

ARCHITECTURE = "RavenForCausalLM"
# Fields whose other values the original code has no computation for, or a random one.
FIXED = {
    "injection_type": ("linear", "no other adapter is in the original's code for inference"),
    "bias": (False, "linear layers have no bias"),
    "test_time_noise": (0, "noise in every pass is no function of the request"),
    "nonlin_name": ("SiLU", "no other activation is known here"),
    "mlp_class_name": ("GatedMLP", "no other MLP is known here"),
}
ROPE_TYPES = ("default", "linear", "llama3")  # of retrofits: by position alone
_COUNTS = ("n_embd", "n_heads", "intermediate_size", "vocab_size", "n_layers_in_recurrent_block")


class RavenConfig(LoopFields, PreTrainedConfig):
    """The fields of the original's `RavenConfig`, and how the loop ends.

    - `max_loops` [`mean_recurrence`, `num_steps`]: the recursion budget; any depth from 1 to far
      beyond the mean of training. `min_loops`: the minimum exit depth of a token.
    - `halting_strategy`: one of `criteria.CRITERIA`, with `exit_threshold`, the original's number;
      None for the original's default of that criterion.
    - `layout`: the family (`families.py`); None until `settle` has looked at the checkpoint.
    - `max_position_embeddings`: at most `block_size`, the length of training; that of a retrofit's
      base is much longer. To be served with more, override it.
    - `tie_embeddings`: whether the LM head is the embedding, also where `tie_word_embeddings` is
      missing, whose default elsewhere is the opposite.

    Raises `ValueError` with field, value and fix in `check()`, after fields were overridden.
    """

    model_type: ClassVar[str] = "huginn_raven"
    halting_strategies: ClassVar[tuple[str, ...]] = tuple(CRITERIA)
    numbers: ClassVar[tuple[str, ...]] = ()  # None stands for a default
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "n_embd",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
        "rms_norm_eps": "norm_eps",
        "mean_recurrence": "max_loops",
        "num_steps": "max_loops",
        "tie_word_embeddings": "tie_embeddings",
    }

    n_embd: int = 5280
    n_heads: int = 55
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    n_layers: int | None = None
    n_layers_in_prelude: int = 2
    n_layers_in_recurrent_block: int = 4
    n_layers_in_coda: int = 2
    intermediate_size: int = 17920
    vocab_size: int = 65536
    padded_vocab_size: int | None = None
    block_size: int = 4096
    max_position_embeddings: int | None = None
    norm_eps: int | float = 1e-6
    rope_base: int | float = 50000
    rope_theta: int | float | None = None
    rope_scaling: dict[str, Any] | None = None
    qk_bias: bool = True
    tie_embeddings: bool = True
    bias: bool = False
    injection_type: str = "linear"
    nonlin_name: str = "SiLU"
    mlp_class_name: str = "GatedMLP"
    test_time_noise: int | float = 0
    init_values: dict[str, Any] | None = None
    max_loops: int = 32
    min_loops: int = 1
    halting_strategy: str = "none"
    layout: str | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    base_model_name_or_path: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for other, name in self.attribute_map.items():
            if other in kwargs:
                value = kwargs.pop(other)
                # `tie_embeddings` wins: checkpoints have one of the two, or both alike.
                if other != "tie_word_embeddings":
                    setattr(self, name, value)
        rope = kwargs.pop("rope_parameters", None)  # as transformers writes it today
        super().__post_init__(**kwargs)
        if rope and self.rope_theta is None:
            self.rope_theta = rope.get("rope_theta")
            self.rope_scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
        self.architectures: list[str] = self.architectures or [ARCHITECTURE]
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.n_heads
        if self.head_dim is None:
            self.head_dim = self.n_embd // self.n_heads
        if self.padded_vocab_size is None:
            self.padded_vocab_size = self.vocab_size
        longest = self.max_position_embeddings or self.block_size
        self.max_position_embeddings = min(longest, self.block_size)
        if self.n_layers is None:
            self.n_layers = self.n_blocks

    @property
    def exit_threshold(self) -> Any:
        """The number of the criterion; the original's default unless one was given."""
        given = self.__dict__.get("_exit_threshold")
        if given is None:
            return default_threshold(self.halting_strategy, self.rope_theta is not None)
        return given

    @exit_threshold.setter
    def exit_threshold(self, value: Any) -> None:
        if value is not None:
            check_number("exit_threshold", value)
        self._exit_threshold = value

    @property
    def n_blocks(self) -> int:
        """Blocks of prelude, core and coda."""
        return self.n_layers_in_prelude + self.n_layers_in_recurrent_block + self.n_layers_in_coda

    @property
    def family(self) -> Family:
        """What the tensors said, or before `settle` what the config alone tells."""
        if self.layout is None:
            return family_of((), self.qk_bias, self.rope_theta, "the checkpoint")
        return FAMILIES[self.layout]

    @property
    def embed_scale(self) -> float:
        """What embedded tokens, and the first state, are multiplied with."""
        if self.family.interleaved:
            return float(self.n_embd**0.5)  # of Huginn, from the code
        return float((self.init_values or {}).get("embed_scale", 1.0))

    @property
    def state_std(self) -> float:
        """The standard deviation of the first state, before `embed_scale`."""
        return float((self.init_values or {}).get("std", (2 / (5 * self.n_embd)) ** 0.5))

    @property
    def rope_settings(self) -> dict[str, Any]:
        """RoPE as transformers and vLLM name it: `rope_type`, `rope_theta` and its scaling."""
        if self.family.interleaved:
            return {"rope_type": "default", "rope_theta": float(self.rope_base)}
        scaling = dict(self.rope_scaling or {})
        kind = scaling.pop("rope_type", scaling.pop("type", "default"))
        assert self.rope_theta is not None
        return {**scaling, "rope_type": kind, "rope_theta": float(self.rope_theta)}

    @property
    def cost_of_exits(self) -> str:
        """What the exit rule costs in every loop, in words; empty for next to nothing."""
        if not reads_logits(self.halting_strategy):
            return ""
        assert self.num_key_value_heads and self.head_dim and self.padded_vocab_size
        heads = 2 * (self.n_heads + self.num_key_value_heads)
        block = self.n_embd * (heads * self.head_dim + 3 * self.intermediate_size)
        loop = self.n_layers_in_recurrent_block * block + 2 * self.n_embd**2
        more = self.n_layers_in_coda * block + self.padded_vocab_size * self.n_embd
        return (
            f"every loop also runs the coda ({self.n_layers_in_coda} blocks) and, for tokens that "
            f"may exit, the LM head: {1 + more / loop:.2f} times the weights of a loop without"
        )

    def settle(self, source: str, revision: str | None = None) -> None:
        """Finds out the family from the tensors of the checkpoint, if `layout` does not say it.

        Raises `ValueError` if they fit none.
        """
        if self.layout is not None:
            return
        names = tensor_names(source, revision)
        self.layout = family_of(names, self.qk_bias, self.rope_theta, source).name

    def check(self) -> None:
        """Raises `ValueError` with field, value and fix if the fields are inconsistent."""
        for name, (value, why) in FIXED.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not supported: {why}; set it to {value!r}"
                )
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more")
        for name in ("n_layers_in_prelude", "n_layers_in_coda"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more")
        if self.n_layers != self.n_blocks:
            raise ValueError(
                f"n_layers={self.n_layers} is not the sum of n_layers_in_prelude="
                f"{self.n_layers_in_prelude}, n_layers_in_recurrent_block="
                f"{self.n_layers_in_recurrent_block} and n_layers_in_coda={self.n_layers_in_coda}; "
                "correct one of them"
            )
        if (self.padded_vocab_size or 0) < self.vocab_size:
            raise ValueError(
                f"padded_vocab_size={self.padded_vocab_size} must be at least vocab_size="
                f"{self.vocab_size}"
            )
        scaling = self.rope_scaling or {}
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind not in ROPE_TYPES:
            raise ValueError(
                f"rope_scaling={scaling} has a type that is not supported; there are "
                f"{', '.join(ROPE_TYPES)}"
            )
        if self.n_heads % (self.num_key_value_heads or 1):
            raise ValueError(
                f"n_heads={self.n_heads} must be a multiple of num_key_value_heads="
                f"{self.num_key_value_heads}"
            )
        if (self.head_dim or 0) < 2 or (self.head_dim or 0) % 2:
            raise ValueError(f"head_dim={self.head_dim} must be an even number, 2 or more")
        self.check_loops()
        if self.layout is not None and self.layout not in FAMILIES:
            raise ValueError(
                f"layout={self.layout!r} is unknown; choose one of {', '.join(FAMILIES)}, or leave "
                "it out"
            )
