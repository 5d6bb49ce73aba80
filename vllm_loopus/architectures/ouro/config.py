"""`OuroConfig`: a checkpoint of Ouro as it lies on the hub."""

from typing import Any, ClassVar

from transformers import PreTrainedConfig

from vllm_loopus.loop_fields import LoopFields, check_integer, check_number

ARCHITECTURE = "OuroForCausalLM"
NEVER = 2.0  # an exit threshold that no probability reaches
LENGTH_DEPENDENT = ("dynamic", "longrope")


class OuroConfig(LoopFields, PreTrainedConfig):
    """Ouro's fields, with those of every looped model.

    - `total_ut_steps`: `max_loops`, unless a step is given.
    - `early_exit_threshold`: `exit_threshold`. None, or more than 1.0, for no early exit. With 1.0
      a token exits early only if the gate says so with a probability that rounds to 1.
    - `early_exit_step`: all tokens exit after this loop, counted from 0, whatever the threshold:
      a budget of one loop more.
    - `use_weighted_exit`: logits are the mean over all loops, weighted with the probability to exit
      there. Only the reference model does that.
    """

    model_type: ClassVar[str] = "ouro"
    attribute_map: ClassVar[dict[str, str]] = {}
    halting_strategies: ClassVar[tuple[str, ...]] = ("cdf",)
    integers: ClassVar[tuple[str, ...]] = ("max_loops", "min_loops", "total_ut_steps")

    vocab_size: int = 49152
    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 65536
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: int | float = 0.0
    use_sliding_window: bool = False
    tie_word_embeddings: bool = False
    eos_token_id: int | list[int] | None = None
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    total_ut_steps: int = 4
    early_exit_threshold: int | float | None = 1.0
    early_exit_step: int | None = None
    use_weighted_exit: bool = False
    min_loops: int = 1
    halting_strategy: str = "cdf"
    base_model_name_or_path: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        types = kwargs.pop("layer_types", None) or []
        if other := set(types) - {"full_attention"}:
            raise ValueError(
                f"layer_types has {', '.join(map(repr, sorted(other)))}; Ouro is supported with "
                "full_attention in every layer, as all published models have it"
            )
        super().__post_init__(**kwargs)
        self.architectures: list[str] = self.architectures or [ARCHITECTURE]
        self.check()

    @property
    def max_loops(self) -> int:
        """The loops that a token may take."""
        return self.total_ut_steps if self.early_exit_step is None else self.early_exit_step + 1

    @max_loops.setter
    def max_loops(self, loops: int) -> None:
        self.total_ut_steps = loops

    @property
    def exit_threshold(self) -> int | float:
        """The accumulated probability at which a token exits."""
        if self.early_exit_step is not None or self.early_exit_threshold is None:
            return NEVER
        return self.early_exit_threshold

    @exit_threshold.setter
    def exit_threshold(self, threshold: int | float) -> None:
        self.early_exit_threshold = threshold

    @property
    def exact_context(self) -> int | None:
        rope = self.rope_parameters or {}
        if rope.get("rope_type") not in LENGTH_DEPENDENT:
            return None
        return int(rope.get("original_max_position_embeddings") or self.max_position_embeddings)

    def check(self) -> None:
        """Raises `ValueError` with field, value and fix if the fields are inconsistent."""
        if (step := self.early_exit_step) is not None:
            check_integer("early_exit_step", step)
            if not 0 <= step < self.total_ut_steps:
                raise ValueError(
                    f"early_exit_step={step} must be from 0 to {self.total_ut_steps - 1}, one less "
                    f"than total_ut_steps={self.total_ut_steps} (max_loops); it counts from 0"
                )
        if self.early_exit_threshold is not None:
            check_number("early_exit_threshold", self.early_exit_threshold)
        self.check_loops()
        if self.hidden_act != "silu":
            raise ValueError(f"hidden_act={self.hidden_act!r} is not supported, only 'silu'")
        for name in ("use_sliding_window", "tie_word_embeddings"):
            if getattr(self, name):
                raise ValueError(
                    f"{name}=True is not supported: no published Ouro model has it; set it to False"
                )
        assert self.num_key_value_heads
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} must divide "
                f"num_attention_heads={self.num_attention_heads}"
            )

    def check_served(self) -> None:
        if self.use_weighted_exit:
            raise ValueError(
                "use_weighted_exit=True is only done by the reference model (transformers): it "
                "needs the logits of all loops for every token; serve with exit_threshold instead"
            )

    def _named(self, name: str) -> str:
        theirs = {"max_loops": "total_ut_steps", "exit_threshold": "early_exit_threshold"}
        return f"{name}={getattr(self, name)} ({theirs[name]})"
