"""How much of the device's time is used, and what the host leaves between two calls of the model.

    python -m measures.host --size 4b --policy exact --graphs

Events on the device's own clock around every call (encoder, pass, decoder, LM head). `report.py
--predict` sets beside it what the emulated device (`benchmarks/host.py`) says for the same costs.
What else runs between the calls (sampler, exit rule, copies) is in the gaps.
"""

import statistics
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from measures.engines import answer, build_policy, options_of_policy, runner_of
from measures.program import end, parser, saying

PROMPT, TOKENS, WAVES = 4, 32, 2


class Mark:
    """A point of time on the device; on a CPU, on the host."""

    def __init__(self) -> None:
        self._event: Any = None
        self._at = 0.0
        if torch.cuda.is_available():
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()
        else:
            self._at = time.perf_counter()

    def until(self, later: "Mark") -> float:
        """Milliseconds."""
        if self._event is not None:
            return float(self._event.elapsed_time(later._event))
        return 1e3 * (later._at - self._at)


@dataclass(frozen=True)
class Call:
    """Of a part of the model: `rows` it had, and when it ran."""

    part: str
    rows: int
    began: Mark
    ended: Mark

    @property
    def ms(self) -> float:
        return self.began.until(self.ended)


def watch(runner: Any) -> list[Call]:
    """A list that gets every call of the model's parts from now on."""
    regions, model = runner._sequences._executor._regions, type(runner.get_model())
    parts = {id(getattr(regions, part)): part for part in ("encoder", "reasoning", "decoder")}
    region, calls = type(regions.reasoning), list[Call]()
    run, head = region.__call__, model.compute_logits

    def called(self: Any, layout: Any, first: torch.Tensor, *others: Any, **options: Any) -> Any:
        began = Mark()
        result = run(self, layout, first, *others, **options)
        calls.append(Call(parts[id(self)], len(first), began, Mark()))
        return result

    def compute_logits(self: Any, hidden: torch.Tensor) -> Any:
        began = Mark()
        result = head(self, hidden)
        calls.append(Call("head", len(hidden), began, Mark()))
        return result

    region.__call__, model.compute_logits = called, compute_logits
    return calls


def of_calls(calls: list[Call]) -> dict[str, float]:
    """Shares and medians, times in ms. A pass costs `pass_ms` and `row_us` for each row."""
    passes = [call for call in calls if call.part == "reasoning"]
    gaps = [one.ended.until(other.began) for one, other in pairwise(calls)]
    rows = np.array([call.rows for call in passes], dtype=float)
    took = np.array([call.ms for call in passes])
    # With nearly equal numbers of rows a slope cannot be told; most of a pass is reading weights.
    most = 0.5 * float(np.median(took)) / float(rows.mean())
    slope = min(max(float(np.polyfit(rows, took, 1)[0]), 0.0), most) if np.ptp(rows) else 0.0
    boundary = [
        statistics.median(call.ms for call in calls if call.part == part)
        for part in ("decoder", "head", "encoder")
    ]
    return {
        "of_device": sum(call.ms for call in calls) / calls[0].began.until(calls[-1].ended),
        "calls": len(calls),
        "gap_ms": statistics.median(gaps),
        "gap_ms_mean": statistics.fmean(gaps),
        "pass_ms": float(np.median(took - slope * rows)),
        "row_us": 1e3 * slope,
        "boundary_ms": sum(boundary),
    }


def main() -> None:
    options = parser(__doc__)
    options_of_policy(options, [64, 16, 1])
    given = options.parse_args()
    say = saying(given)
    size, sequences, llm, generator = build_policy(given)
    calls = watch(runner_of(llm))
    for count in sequences:
        answer(llm, generator.decode(1, count, PROMPT, 3).requests, count)
        calls.clear()
        work = generator.decode(11, WAVES * count, PROMPT, 4 if given.tiny else TOKENS)
        began = time.perf_counter()
        tokens = answer(llm, work.requests, count)
        end_of_work = Mark()
        if end_of_work._event is not None:
            end_of_work._event.synchronize()
        took = time.perf_counter() - began
        say(
            size=size,
            policy=given.policy,
            graphs=given.graphs,
            sequences=count,
            tokens_s=tokens / took,
            **of_calls(calls),
        )
    end(True)


if __name__ == "__main__":
    main()
