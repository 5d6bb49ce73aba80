"""The data of a trace, and its JSON format, which docs/looking-inside.md documents."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vllm_loopus.files import write_text
from vllm_loopus.modeling.exit_rule import ExitRule
from vllm_loopus.trace.exits import Exits
from vllm_loopus.trace.reference import DepthValues
from vllm_loopus.trace.tokens import Vocabulary

FORMAT, VERSION = "vllm-loopus trace", 1


@dataclass(frozen=True)
class Prediction:
    """A token predicted at a depth, and its probability."""

    token_id: int
    text: str
    probability: float | None


@dataclass(frozen=True)
class Depth:
    """The values of a token at one depth. Values that are not finite are None.

    `values`: what the architecture has, by name; in JSON, beside the others.
    """

    depth: int
    top: list[Prediction]  # most probable first
    probability: float | None  # of the answer's token
    distance_to_last: float | None
    kl_to_last: float | None
    compared: float | None  # with the limit of the exit rule
    values: dict[str, float | None]


@dataclass(frozen=True)
class Token:
    """A token of the answer. `position`: the 0-based position from which it was predicted.

    `shown`: its part of the answer's text. A character of several tokens, such as an emoji, is
    shown at the first of them; `text` has the bytes of each.
    """

    token_id: int
    text: str
    shown: str
    token_class: str
    position: int
    exit_depth: int
    left_by: str  # why it exited: the halting strategy, min_loops or budget
    depths: list[Depth]


@dataclass(frozen=True)
class Trace:
    """One prompt with its answer. `exit_depths` and `token_ids` repeat fields of `tokens`."""

    prompt: str | None
    prompt_token_ids: list[int]
    text: str | None
    token_ids: list[int]
    exit_depths: list[int]
    engine_exit_depths: list[int] | None  # those that vLLM returned, if it generated the answer
    given: bool  # whether the answer was given, not generated
    tokens: list[Token]
    trajectories: dict[str, Any] | None = None
    fields: dict[str, Any] = field(default_factory=dict)  # other fields of the prompt's line


def build(
    vocabulary: Vocabulary,
    prompt: str | None,
    prompt_ids: Sequence[int],
    answer: Sequence[int],
    values: DepthValues,
    found: Exits,
    *,
    engine_depths: list[int] | None,
    given: bool,
    fields: dict[str, Any],
) -> Trace:
    """Builds the trace of an answer from its values and exits."""
    columns = {
        name: _numbers(getattr(values, name))
        for name in ("probability", "distance_to_last", "kl_to_last")
    }
    columns["compared"] = _numbers(found.compared)
    own = {name: _numbers(tensor) for name, tensor in values.by_name.items()}
    ids, probabilities = values.top_ids.tolist(), _numbers(values.top_probabilities)
    tokens = []
    shown = vocabulary.shown(answer)
    for index, token_id in enumerate(answer):
        depths = [
            Depth(
                depth=row + 1,
                top=[
                    Prediction(predicted, vocabulary.text(predicted), probability)
                    for predicted, probability in zip(
                        ids[row][index], probabilities[row][index], strict=True
                    )
                ],
                **{name: column[row][index] for name, column in columns.items()},
                values={name: column[row][index] for name, column in own.items()},
            )
            for row in range(len(ids))
        ]
        tokens.append(
            Token(
                token_id=token_id,
                text=vocabulary.text(token_id),
                shown=shown[index],
                token_class=vocabulary.token_class(token_id),
                position=len(prompt_ids) - 1 + index,
                exit_depth=found.depths[index],
                left_by=found.reasons[index],
                depths=depths,
            )
        )
    return Trace(
        prompt=prompt,
        prompt_token_ids=list(prompt_ids),
        text=vocabulary.joined(answer),
        token_ids=list(answer),
        exit_depths=found.depths,
        engine_exit_depths=engine_depths,
        given=given,
        tokens=tokens,
        fields=fields,
    )


def document(
    model: str,
    engine: str,
    dtype: str,
    architecture: str,
    rule: ExitRule,
    traces: Sequence[Trace],
    convergence: dict[str, Any],
) -> dict[str, Any]:
    """The content of the file that `trace --json` writes."""
    from vllm_loopus import __version__

    return {
        "format": FORMAT,
        "version": VERSION,
        "vllm_loopus": __version__,
        "model": model,
        "engine": engine,
        "dtype": dtype,
        "architecture": architecture,
        "halting": asdict(rule),
        "exits": {
            "limit": rule.limit_name,
            "comparison": rule.comparison,
            "checked": [d for d in range(1, int(rule.max_loops) + 1) if rule.checked_at(d)],
        },
        "values": list(traces[0].tokens[0].depths[0].values),
        "traces": [json_of(trace) for trace in traces],
        "convergence": convergence,
    }


def json_of(trace: Trace) -> dict[str, Any]:
    """A trace as JSON: values of a depth stand beside each other."""
    written = asdict(trace)
    for token in written["tokens"]:
        token["depths"] = [{**depth, **depth.pop("values")} for depth in token["depths"]]
    return written


def write(data: dict[str, Any], file: Path) -> None:
    """Writes one line of ASCII JSON atomically. Raises `OSError` that names `file`."""
    write_text(file, json.dumps(data, allow_nan=False) + "\n")


def number(value: Any) -> float | None:
    """The shortest decimal that gives the same float32; None if the value is not finite."""
    return float(str(np.float32(value))) if math.isfinite(value) else None


def _numbers(values: Any) -> Any:
    """A tensor as nested lists, with `number` applied to each value."""
    flat = np.asarray(values, dtype=np.float32)
    numbers = np.array([number(value) for value in flat.ravel()], dtype=object)
    return numbers.reshape(flat.shape).tolist()
