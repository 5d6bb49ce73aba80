"""Tokens a second with early exit off and on, by sequences at once.

    python -m measures.speed --size 4b --policy exact [--graphs]

Off and on take turns over the same requests; on exits at a mean depth of 3 of 8, replayed from a
seeded law. `ideal` is the ratio of the weights that are read.
"""

import tempfile
import time
from pathlib import Path

from measures.engines import MEAN, SHAPES, answer, build_shape, wait
from measures.program import end, parser, saying
from vllm_loopus.bench.workloads import Generator, Workload

PROMPT, TOKENS, WAVES, ROUNDS = 4, 32, 2, 2


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--size", choices=SHAPES, default="4b")
    options.add_argument("--policy", choices=("exact", "last_exited"), default="exact")
    options.add_argument("--sequences", type=int, nargs="+", default=[64, 16, 1, 256])
    options.add_argument("--graphs", action="store_true")
    given = options.parse_args()
    size, sequences = ("tiny", [2]) if given.tiny else (given.size, given.sequences)
    tokens = 4 if given.tiny else TOKENS
    shape, say = SHAPES[size], saying(given)
    loops = shape.base.max_loops
    with tempfile.TemporaryDirectory() as folder:
        llm = build_shape(
            size,
            Path(folder),
            given.graphs,
            max_num_seqs=max(sequences),
            additional_config={"loopus": {"kv_policy": given.policy}},
        )
    generator = Generator(shape.base.vocabulary, loops, MEAN)

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
