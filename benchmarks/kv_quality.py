"""What does smaller K/V cost in quality: perplexity, accuracy, logits and exit depths by setting?

For whoever chooses `--kv-cache-dtype` or `kv_planes`; docs/kv-layout.md has the numbers.

    python benchmarks/kv_quality.py                     # loopus-tiny: three minutes, two cores
    python benchmarks/kv_quality.py --model my-loopus --texts texts.jsonl   # {"text": ...} lines

Computed with the reference model in float32, whose K/V is what each setting stores
(`vllm_loopus/bench/kv_reference.py`; tests compare the engine with it). Every position is decoded
at every depth. Without `--texts` the texts are conversations of loopus-tiny's tasks, and only
answers count.
"""

from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

from vllm_loopus.bench.kv_reference import INT8, KVReference, KVSetting
from vllm_loopus.bench.script import begin, finish, script_parser
from vllm_loopus.bench.texts import Text, add_options, chosen_texts
from vllm_loopus.cli.info import resolve
from vllm_loopus.modeling.exit_rule import ExitTracker


@dataclass(frozen=True)
class Scores:
    """Of the counted positions [M] of all texts, at depths 1..N.

    `logits` [N, M, V]; `losses` [N, M] of the text's next token; `right` [N, M]: whether it was the
    likeliest; `depths` [M]: where the exit rule lets the position exit.
    """

    logits: torch.Tensor
    losses: torch.Tensor
    right: torch.Tensor
    depths: torch.Tensor

    def perplexity(self, depth: int) -> float:
        return float(self.losses[depth - 1].mean().exp())

    def accuracy(self, depth: int) -> float:
        return float(self.right[depth - 1].mean())

    def at_exit(self, of: torch.Tensor) -> torch.Tensor:
        """Values `of` [N, M] at the exit depth of each position."""
        return of.gather(0, (self.depths - 1)[None])[0]


@torch.inference_mode()
def score(model: KVReference, texts: list[Text]) -> Scores:
    """Every counted position at every depth."""
    rule = model.exit_rule
    parts = []
    for text in texts:
        ids, counts = torch.tensor([text.ids]), torch.tensor(text.counts[1:])
        asked = counts.nonzero()[:, 0]  # positions whose next token counts
        target = ids[0, 1:][asked]
        embedded = model.embed(ids)
        positions = model.positions(embedded)
        exits, logits = ExitTracker(rule, len(asked)), []
        for loop_pass in model.loop(embedded, positions):
            values = model.exit_values(loop_pass, positions, (torch.zeros_like(asked), asked))
            exits.update(loop_pass.depth, rule.evidence(values))
            logits.append(model.decode(loop_pass.state, positions, asked)[0])
        by_depth = torch.stack(logits)
        losses = torch.stack([cross_entropy(at, target, reduction="none") for at in logits])
        parts.append((by_depth, losses, (by_depth.argmax(-1) == target).float(), exits.depths))
    logits, losses, right, depths = zip(*parts, strict=True)
    by_position = [torch.cat(part, 1) for part in (logits, losses, right)]
    return Scores(*by_position, torch.cat(depths))


def row(setting: KVSetting, found: Scores, exact: Scores, shown: list[int]) -> dict[str, Any]:
    """One line of the table. `exact`: the scores with all K/V in float32."""
    far = (found.logits - exact.logits).abs()
    same = found.logits[-1].argmax(-1) == exact.logits[-1].argmax(-1)
    losses, right = found.at_exit(found.losses), found.at_exit(found.right)
    return {
        "setting": str(setting),
        "perplexity": {depth: found.perplexity(depth) for depth in shown},
        "accuracy": {depth: found.accuracy(depth) for depth in shown},
        "logits": {depth: float(far[depth - 1].mean()) for depth in shown},
        "farthest": float(far.max()),
        "same_token": float(same.float().mean()),
        "exit": {
            "perplexity": float(losses.mean().exp()),
            "accuracy": float(right.mean()),
            "mean_depth": float(found.depths.float().mean()),
            "same_depth": float((found.depths == exact.depths).float().mean()),
        },
    }


def table_of(rows: list[dict[str, Any]], shown: list[int]) -> Table:
    depths = ", ".join(map(str, shown))
    table = Table(
        "K/V", f"perplexity at {depths}", f"accuracy in % at {depths}",
        f"mean distance of logits at {depths}", "same likeliest token",
        "early exit: accuracy, perplexity", "mean depth", "same depth",
    )  # fmt: skip
    for of in rows:
        leave = of["exit"]
        table.add_row(
            of["setting"],
            ", ".join(f"{of['perplexity'][d]:.3f}" for d in shown),
            ", ".join(f"{100 * of['accuracy'][d]:.1f}" for d in shown),
            ", ".join(f"{of['logits'][d]:.3f}" for d in shown),
            f"{100 * of['same_token']:.1f} %",
            f"{100 * leave['accuracy']:.1f}, {leave['perplexity']:.3f}",
            f"{leave['mean_depth']:.2f}",
            f"{100 * leave['same_depth']:.1f} %",
        )
    return table


def settings(max_loops: int) -> list[KVSetting]:
    """What is compared: dtypes, planes up to each depth, and differences to the plane before."""
    lasts = [last for last in (1, 2, 3, 4, 6) if last < max_loops]
    return [
        KVSetting(),
        *(KVSetting(kv_dtype) for kv_dtype in ("fp8", "fp8_e5m2", INT8)),
        *(KVSetting(last=last) for last in lasts),
        *(KVSetting("fp8", last=last) for last in lasts if last in (3, 4)),
        *(KVSetting(residual_bits=bits) for bits in (1, 2, 4)),
    ]


def main() -> None:
    parser = script_parser(__doc__)
    add_options(parser)
    parser.add_argument("--threshold", type=float, help="exit threshold; default: the model's")
    args = parser.parse_args()
    report = begin()
    folder = resolve(args.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = chosen_texts(parser, args, tokenizer)
    config = {} if args.threshold is None else {"exit_threshold": args.threshold}
    model = KVReference.of(folder, KVSetting(), **config)
    most = model.config.max_loops
    shown = sorted({depth for depth in (2, 4, most) if depth <= most})
    exact = score(model, texts)
    rows = []
    for setting in settings(most):
        model.use(setting)
        rows.append(row(setting, score(model, texts), exact, shown))
    print(f"{exact.losses.shape[1]} tokens of {len(texts)} texts count")
    Console(width=200).print(table_of(rows, shown))
    finish({**report, "rows": rows}, args.write)


if __name__ == "__main__":
    main()
