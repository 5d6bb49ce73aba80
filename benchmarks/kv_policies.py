"""How much quality does the K/V policy `last_exited` cost, on the same held-out text as `exact`?

For whoever chooses the policy of a model, or changes what it stores; docs/loopus-tiny/README.md has
the numbers.

    python benchmarks/kv_policies.py                  # loopus-tiny: three minutes, two cores
    python benchmarks/kv_policies.py --model my-loopus --texts texts.jsonl   # {"text": ...} lines

Every token of a text after the first is decoded, not prefilled: a logits processor forces the
sampler to take the text's next token, while vLLM reports log-probabilities from before it. So every
position exits at its own depth, and later tokens that go deeper read what the policy stored for it
at their depth. Without `--texts` the texts are conversations of loopus-tiny's tasks, and only
answers count.
"""

import gc
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer
from vllm import LLM, SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from vllm_loopus import exit_depths
from vllm_loopus.bench.script import begin, finish, script_parser
from vllm_loopus.bench.texts import Text, add_options, chosen_texts
from vllm_loopus.cli.info import resolve
from vllm_loopus.serving.knobs.engine import KV_POLICIES
from vllm_loopus.tiny.evaluate import standard_error

FORCED = "forced_token_ids"


class Forced(AdapterLogitsProcessor):
    """Allows only the next token of a given text."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(
        self, params: SamplingParams
    ) -> Callable[[list[int], torch.Tensor], torch.Tensor] | None:
        forced = (params.extra_args or {}).get(FORCED)
        if forced is None:
            return None

        def only_the_next(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            allowed = torch.full_like(logits, -math.inf)
            allowed[forced[len(output_ids)]] = 0.0
            return allowed

        return only_the_next


@dataclass(frozen=True)
class Result:
    """One policy at one threshold. `accuracy`: counted tokens that were the likeliest;
    `mean_exit_depth`: of all decoded tokens, `counted_exit_depth`: of those that count."""

    policy: str
    threshold: float
    counted: int
    accuracy: float
    standard_error: float
    perplexity: float
    mean_exit_depth: float
    counted_exit_depth: float


def measure(llm: LLM, texts: list[Text], policy: str, threshold: float) -> Result:
    """Decodes all texts as they stand. Raises `RuntimeError` if the engine took other tokens."""
    params = [
        SamplingParams(
            temperature=0,
            max_tokens=len(text.ids) - 1,
            ignore_eos=True,
            logprobs=1,
            extra_args={FORCED: text.ids[1:], "exit_threshold": threshold},
        )
        for text in texts
    ]
    outputs = llm.generate([{"prompt_token_ids": text.ids[:1]} for text in texts], params)
    right, losses, counted_depths, depths = [], [], [], []
    for text, output in zip(texts, outputs, strict=True):
        (completion,) = output.outputs
        if list(completion.token_ids) != text.ids[1:]:
            raise RuntimeError("the engine did not follow the text")
        depths += exit_depths(completion)
        for token, counts, found, depth in zip(
            text.ids[1:], text.counts[1:], completion.logprobs, exit_depths(completion), strict=True
        ):
            if counts:
                losses.append(-found[token].logprob)
                right.append(found[token].rank == 1)
                counted_depths.append(depth)
    accuracy = sum(right) / len(right)
    return Result(
        policy=policy,
        threshold=threshold,
        counted=len(right),
        accuracy=accuracy,
        standard_error=standard_error(accuracy, len(right)),
        perplexity=math.exp(sum(losses) / len(losses)),
        mean_exit_depth=sum(depths) / len(depths),
        counted_exit_depth=sum(counted_depths) / len(counted_depths),
    )


def main() -> None:
    parser = script_parser(__doc__)
    add_options(parser)
    parser.add_argument("--thresholds", type=float, nargs="+", help="default: the model's, and 1")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    report = begin()
    texts = chosen_texts(parser, args, AutoTokenizer.from_pretrained(resolve(args.model)))
    results = []
    for policy in KV_POLICIES:
        llm = LLM(
            args.model,
            dtype=args.dtype,
            max_model_len=args.max_length,
            max_num_seqs=64,
            logits_processors=[Forced],
            additional_config={"loopus": {"kv_policy": policy}},
        )
        default = llm.model_config.hf_config.exit_threshold
        for threshold in args.thresholds or [default, 1.0]:
            results.append(measure(llm, texts, policy, threshold))
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
    names = list(asdict(results[0]))
    table = Table(*(name.replace("_", " ") for name in names))
    for result in results:
        values = asdict(result).values()
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in values))
    Console(width=160).print(table)
    finish({**report, "results": [asdict(result) for result in results]}, args.write)


if __name__ == "__main__":
    main()
