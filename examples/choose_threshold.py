"""Quality against passes for a range of exit thresholds: a table and a plot.

    python examples/choose_threshold.py --model loopus-tiny --out threshold.svg

Asks the same questions at every threshold, greedily, and counts right answers and the mean exit
depth. Questions of yours: `--questions FILE`, a JSON object a line with `prompt` and `answer`; an
output is right when it begins with the answer, blanks aside. See docs/choosing-a-threshold.md.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EMBEDDED = "loopus-tiny"
THRESHOLDS = [0.0, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 1.0]


@dataclass(frozen=True)
class Question:
    prompt: str
    answer: str


@dataclass(frozen=True)
class Point:
    """What one threshold gives: share of right answers, mean exit depth of the tokens."""

    threshold: float
    quality: float
    depth: float


def toy_questions(per_difficulty: int) -> list[Question]:
    """What loopus-tiny was trained for, from the split kept for evaluation."""
    from vllm_loopus.tiny.tasks import evaluation_set

    items = evaluation_set(seed=3, per_difficulty=per_difficulty)
    return [Question(item.question, item.answer) for item in items]


def read_questions(file: Path) -> list[Question]:
    lines = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
    return [Question(line["prompt"], line["answer"]) for line in lines]


def measure(llm: Any, questions: list[Question], threshold: float, args: Any) -> Point:
    from vllm import SamplingParams

    from vllm_loopus import exit_depths

    knobs = {"exit_threshold": threshold, "min_loops": args.min_loops}
    params = SamplingParams(temperature=0, max_tokens=args.max_tokens, extra_args=knobs)
    outputs = llm.generate([q.prompt for q in questions], params, use_tqdm=False)
    right = [
        output.outputs[0].text.strip().startswith(question.answer)
        for question, output in zip(questions, outputs, strict=True)
    ]
    depths = [depth for output in outputs for depth in exit_depths(output)]
    return Point(threshold, sum(right) / len(right), sum(depths) / len(depths))


def draw(points: list[Point], title: str, out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "loopus"})
    from matplotlib import pyplot

    ordered = sorted(points, key=lambda point: point.depth)
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    axes.plot([p.depth for p in ordered], [100 * p.quality for p in ordered], "o-")
    for (depth, quality), labels in _labels(ordered).items():
        place = {"xytext": (4, 6), "textcoords": "offset points", "fontsize": 8}
        axes.annotate(labels, (depth, 100 * quality), **place)
    axes.set(xlabel="mean exit depth (passes a token)", ylabel="right answers, %", title=title)
    axes.grid(alpha=0.3)
    axes.set_ylim(0, 1.15 * max(100 * p.quality for p in points))
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)


def _labels(points: list[Point]) -> dict[tuple[float, float], str]:
    """Thresholds by the place where they are drawn: several give the same."""
    places: dict[tuple[float, float], list[str]] = {}
    for point in points:
        places.setdefault((point.depth, point.quality), []).append(f"{point.threshold:g}")
    return {place: ", ".join(thresholds) for place, thresholds in places.items()}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument(
        "--questions", type=Path, help="JSON lines; default: loopus-tiny's own task"
    )
    parser.add_argument("--per-difficulty", type=int, default=50, help="of loopus-tiny's task")
    parser.add_argument("--max-loops", type=int, help="default: the checkpoint's")
    parser.add_argument("--min-loops", type=int, default=1)
    parser.add_argument("--max-tokens", type=int, default=2)
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--thresholds", type=float, nargs="+", default=THRESHOLDS)
    parser.add_argument("--out", type=Path, default=Path("threshold.svg"))
    args = parser.parse_args()
    if args.questions is None and args.model != EMBEDDED:
        parser.error("--questions is needed: the built-in ones are loopus-tiny's")
    return args


def main() -> None:
    args = parse()
    from vllm import LLM

    questions = (
        toy_questions(args.per_difficulty)
        if args.questions is None
        else read_questions(args.questions)
    )
    overrides = {"max_loops": args.max_loops} if args.max_loops else {}
    llm = LLM(args.model, hf_overrides=overrides, max_model_len=args.max_model_len)
    points = [measure(llm, questions, threshold, args) for threshold in args.thresholds]
    print(f"\n{len(questions)} questions\n\n| threshold | right | mean exit depth |\n|---|---|---|")
    for point in points:
        print(f"| {point.threshold:g} | {100 * point.quality:.1f}% | {point.depth:.2f} |")
    draw(points, f"{args.model}, {len(questions)} questions", args.out)
    print(f"\n{args.out} written")


if __name__ == "__main__":
    main()
