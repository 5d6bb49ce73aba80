"""Tokens a second with early exit off and on, by sequences at once.

    python -m measures.speed --size 4b --policy exact [--graphs]

Off and on take turns over the same requests; on exits at a mean depth of 3 of 8, replayed from a
seeded law. `ideal` is the ratio of the weights that are read.
"""

import time

from measures.engines import MEAN, SHAPES, answer, build_policy, options_of_policy, wait
from measures.program import end, parser, saying
from vllm_loopus.bench.workloads import Workload

PROMPT, TOKENS, WAVES, ROUNDS = 4, 32, 2, 2


def main() -> None:
    options = parser(__doc__)
    options_of_policy(options, [64, 16, 1, 256])
    given = options.parse_args()
    say = saying(given)
    size, sequences, llm, generator = build_policy(given)
    tokens = 4 if given.tiny else TOKENS
    shape = SHAPES[size]
    loops = shape.base.max_loops

    def rate(work: Workload, count: int) -> float:
        wait()
        began = time.perf_counter()
        answered = answer(llm, work.requests, count)
        wait()
        return answered / (time.perf_counter() - began)

    for count in sequences:
        on = generator.decode(11, WAVES * count, PROMPT, tokens)
        off = on.at_depth(loops)
        short = generator.decode(1, count, PROMPT, 3)
        for warm in (short, short.at_depth(loops)):
            rate(warm, count)
        rates: dict[str, list[float]] = {"off": [], "on": []}
        for _ in range(1 if given.tiny else ROUNDS):
            rates["off"].append(rate(off, count))
            rates["on"].append(rate(on, count))
        best = {name: max(found) for name, found in rates.items()}
        ideal = shape.token_weights(loops) / shape.token_weights(MEAN)
        say(
            size=size,
            policy=given.policy,
            graphs=given.graphs,
            sequences=count,
            off_tokens_s=best["off"],
            on_tokens_s=best["on"],
            ratio=best["on"] / best["off"],
            ideal=ideal,
            of_ideal=best["on"] / best["off"] / ideal,
            all_rates=rates,
        )
    end(True)


if __name__ == "__main__":
    main()
