"""Engine options: `additional_config={"loopus": {...}}`."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from vllm_loopus.loop_fields import is_finite_number, is_integer
from vllm_loopus.serving.knobs.request import LoopDefaults

SECTION = "loopus"  # of additional_config
KV_POLICIES = ("exact", "last_exited")
PREFILL_DEPTHS = ("lazy", "full")
AUTO = "auto"
SWITCH = (AUTO, "on", "off")
NOISE, ZEROS = "noise", "zeros"  # first states: of seed and position, or none
LOOKAHEAD, MOST_AHEAD = 7, 64  # guessed positions of a sequence: by default, and at most
ALL_PLANES, LAST, RESIDUAL = "all", "last:", "residual"  # of `kv_planes`
# What the OpenAI server accepts as `reasoning_effort` (vLLM's ChatCompletionRequest).
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


@dataclass(frozen=True)
class EngineOptions:
    """Options of one engine.

    - `kv_policy`: `exact` computes the K/V that deeper tokens need at every depth. `last_exited`
      copies the K/V and state of a token's exit depth to all deeper depths: an approximation.
    - `prefill_depth`: `lazy` computes a prompt to the exit depth of its last position, and deeper
      when a later token needs it; `full` computes all its K/V at once.
    - `exit_quorum`: the share of the sequences in flight that must have exited before a step
      decodes and samples them, or `auto`.
    - `overlap`: launch the next pass before the tokens of a step are read, so that the device does
      not wait for the host. `auto`: where the device works asynchronously.
    - `late_verdicts`: launch a pass before the exits of the one before are read; those that have
      exited take part in it in vain. `auto`: where that costs less than waiting.
    - `reasoning_effort`: the `max_loops` of requests that name an effort and no `max_loops`, for
      example `{"low": 2, "high": 8}`. Efforts that are not listed change nothing.
    - `speculate`: let sequences go on with the token that they will probably get, before it is
      certain (`step/wave.py`): `off`, `auto`, or `{"draft_depth": d, "lookahead": k}` for a guess
      after `d` passes and at most `k` guessed positions of a sequence in flight. Answers are the
      same.
    - `kv_planes`: `all` keeps K/V at every depth. `last:m` keeps it up to depth m: deeper passes,
      and the decoder after them, read the K/V of depth m at all positions, their own included, and
      write none. An approximation; K/V stays a function of depth and tokens.
    - `initial_state`: of models whose first state is drawn: `noise`, a function of the request's
      seed and the position (default), `zeros`, or a safetensors file.
    """

    kv_policy: str = "exact"
    prefill_depth: str = "lazy"
    exit_quorum: float | str = AUTO
    overlap: str = AUTO
    late_verdicts: str = AUTO
    reasoning_effort: Mapping[str, int] = field(default_factory=dict)
    speculate: str | Mapping[str, int] = "off"
    kv_planes: str = ALL_PLANES
    initial_state: str | None = None

    @classmethod
    def of(cls, additional_config: object) -> "EngineOptions":
        """Reads vLLM's `additional_config`.

        Raises `ValueError` that names the option, its value and the fix.
        """
        outer = additional_config if isinstance(additional_config, Mapping) else {}
        known = [field.name for field in fields(cls)]
        for name in known:
            if name in outer:
                raise ValueError(
                    f"additional_config[{name!r}]={outer[name]!r} has no effect there; "
                    f"put it into additional_config[{SECTION!r}]"
                )
        given = outer.get(SECTION)
        if given is None:
            return cls()
        if not isinstance(given, Mapping):
            raise ValueError(
                f"additional_config[{SECTION!r}]={given!r} must be a mapping of {', '.join(known)}"
            )
        for name in given:
            if name not in known:
                raise ValueError(
                    f"additional_config[{SECTION!r}] has no option {name!r}; "
                    f"there are {', '.join(known)}"
                )
        options = cls(**given)
        options._check_values()
        return options

    def _check_values(self) -> None:
        choices_of = {
            "kv_policy": KV_POLICIES,
            "prefill_depth": PREFILL_DEPTHS,
            "overlap": SWITCH,
            "late_verdicts": SWITCH,
        }
        for name, choices in choices_of.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(choices)}"
                )
        quorum = self.exit_quorum
        if quorum != AUTO and not (
            not isinstance(quorum, str) and is_finite_number(quorum) and 0 < quorum <= 1
        ):
            raise ValueError(
                f"exit_quorum={quorum!r} must be a number above 0 and at most 1, or {AUTO!r}"
            )
        if self.late_verdicts == "on" and self.last_exited:
            raise ValueError(
                "late_verdicts='on' is not possible with kv_policy='last_exited', where K/V "
                "depends on the exits; use 'auto' or 'off'"
            )
        _check_efforts(self.reasoning_effort)
        _check_speculate(self.speculate)
        self._check_kv_planes()
        if self.initial_state is not None and not isinstance(self.initial_state, str):
            raise ValueError(
                f"initial_state={self.initial_state!r} must be 'noise', 'zeros' or the name of a "
                "safetensors file"
            )
        if self.last_exited and self.speculates:
            raise ValueError(
                f"speculate={self.speculate!r} is not possible with kv_policy='last_exited', where "
                "K/V depends on exit depths and a guess would change it; use kv_policy='exact' or "
                "speculate='off'"
            )

    def _check_kv_planes(self) -> None:
        planes = self.kv_planes
        if planes == RESIDUAL:
            raise ValueError(
                "kv_planes='residual' is not offered: decoding differences takes longer than the "
                "attention itself (docs/kv-layout.md); use kv_planes='last:m' or a quantised "
                "kv_cache_dtype"
            )
        number = planes.removeprefix(LAST) if isinstance(planes, str) else ""
        if planes != ALL_PLANES and not (
            number.isascii() and number.isdecimal() and int(number) > 0 and planes == LAST + number
        ):
            raise ValueError(
                f"kv_planes={planes!r} must be {ALL_PLANES!r} or 'last:m', for example 'last:4'"
            )
        if planes != ALL_PLANES and self.speculates:
            raise ValueError(
                f"speculate={self.speculate!r} is not possible with kv_planes={planes!r}: a guess "
                "may be decoded at a depth that has no K/V; use kv_planes='all' or speculate='off'"
            )

    def last_plane(self, max_loops: int) -> int:
        """The deepest depth that has K/V of its own, for a model served with `max_loops`."""
        if self.kv_planes == ALL_PLANES:
            return max_loops
        return min(int(self.kv_planes.removeprefix(LAST)), max_loops)

    def overlaps(self, asynchronous: bool) -> bool:
        """Whether the next pass is launched ahead. `asynchronous`: whether calls of the device
        return before it has computed them."""
        return asynchronous if self.overlap == AUTO else self.overlap == "on"

    @property
    def reads_late(self) -> bool | None:
        """Whether exits are read one pass late; None to decide by cost."""
        return None if self.late_verdicts == AUTO else self.late_verdicts == "on"

    @property
    def speculates(self) -> bool:
        """Whether positions may begin with guessed tokens."""
        return self.speculate != "off"

    @property
    def draws_noise(self) -> bool:
        """Whether first states that are drawn are noise."""
        return self.initial_state in (None, NOISE)

    @property
    def draft_depth(self) -> int:
        """Passes before a guess; 1 if that is decided by measurement."""
        return 1 if isinstance(self.speculate, str) else self.speculate.get("draft_depth", 1)

    @property
    def lookahead(self) -> int:
        """The most positions of a sequence that may be guessed at once."""
        if not self.speculates:
            return 0
        chosen = {} if isinstance(self.speculate, str) else self.speculate
        return chosen.get("lookahead", LOOKAHEAD)

    @property
    def positions_in_flight(self) -> int:
        """The most positions of a sequence in flight: the certain one, guessed ones, and one that
        begins while the certain one leaves."""
        return self.lookahead + 2 if self.speculates else 1

    def check(self, config: LoopDefaults) -> None:
        """Raises `ValueError` for an option that does not fit the model."""
        if self.speculates and config.max_loops > 1 and self.draft_depth >= config.max_loops:
            raise ValueError(
                f"speculate['draft_depth']={self.draft_depth} must be below the served "
                f"max_loops={config.max_loops}: a guess has to be earlier than the token"
            )
        last = self.kv_planes.removeprefix(LAST)
        if self.kv_planes != ALL_PLANES and int(last) > config.max_loops:
            raise ValueError(
                f"kv_planes={self.kv_planes!r} must name a depth of at most the served max_loops="
                f"{config.max_loops}"
            )
        for effort, loops in self.reasoning_effort.items():
            if loops > config.max_loops:
                raise ValueError(
                    f"reasoning_effort[{effort!r}]={loops} must be at most the served "
                    f"max_loops={config.max_loops}"
                )

    @property
    def last_exited(self) -> bool:
        """Whether the K/V of a token's exit depth is copied to all deeper depths."""
        return self.kv_policy == "last_exited"

    @property
    def full_prefill(self) -> bool:
        """Whether all K/V of prompts is computed, wherever their last position exits."""
        return self.prefill_depth == "full"

    def planes(self, max_loops: int, served: int) -> int:
        """How many planes the positions of a request with the budget `max_loops` may need.

        In `last_exited`, K/V is only shared between requests of equal knobs.
        """
        every = served if self.full_prefill and not self.last_exited else max_loops
        return min(every, self.last_plane(served))

    def deepest(self, max_loops: int, served: int) -> int:
        """How deep the positions of a request with the budget `max_loops` may go."""
        return max(max_loops, self.planes(max_loops, served))


def _check_speculate(speculate: object) -> None:
    if speculate in ("off", AUTO):
        return
    if not isinstance(speculate, Mapping):
        raise ValueError(
            f"speculate={speculate!r} must be 'off', {AUTO!r} or a mapping, for example "
            '{"draft_depth": 1, "lookahead": 7}'
        )
    limits = {"draft_depth": None, "lookahead": MOST_AHEAD}
    for name, value in speculate.items():
        if name not in limits:
            raise ValueError(f"speculate has no option {name!r}; there are {', '.join(limits)}")
        most = limits[name]
        if not is_integer(value) or value < 1 or (most is not None and value > most):
            upto = "1 or more" if most is None else f"from 1 to {most}"
            raise ValueError(f"speculate[{name!r}]={value!r} must be a whole number, {upto}")


def _check_efforts(efforts: object) -> None:
    if not isinstance(efforts, Mapping):
        raise ValueError(
            f"reasoning_effort={efforts!r} must be a mapping of efforts to loops, for example "
            '{"low": 2, "high": 8}'
        )
    for effort, loops in efforts.items():
        if effort not in EFFORTS:
            raise ValueError(
                f"reasoning_effort has no effort {effort!r}; there are {', '.join(EFFORTS)}"
            )
        if not is_integer(loops) or loops < 1:
            raise ValueError(
                f"reasoning_effort[{effort!r}]={loops!r} must be a whole number, 1 or more"
            )
