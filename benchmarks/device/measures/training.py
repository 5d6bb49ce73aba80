"""`vllm-loopus train` for eight minutes: losses by depth, and those of a control on equal tokens.

    python -m measures.training --seconds 480 [--data FOLDER]

`FOLDER` has what a training takes: `looped/` (a recast checkpoint), `plain/` (its base),
`train.jsonl` and `held-out.jsonl`. Without it, the base of `loopus-tiny` is recast and its own rows
are drawn. A short run of each first says how many tokens fit into the time; both then get as many.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from measures.program import Say, end, parser, saying

SHARE = 0.8  # of the time; the rest is for starting and evaluating
RUNS = ("looped", "plain")


def tool(*arguments: str) -> str:
    """Standard output of a `vllm-loopus` command.

    Raises `RuntimeError` with the end of what it said where it fails.
    """
    command = [sys.executable, "-m", "vllm_loopus.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: {(done.stderr or done.stdout)[-1500:]}")
    return done.stdout


def tiny_data(folder: Path) -> Path:
    """Of `loopus-tiny`: what `FOLDER` has to hold."""
    from vllm_loopus.aliases import CHECKPOINTS
    from vllm_loopus.tiny.dataset import write_all

    write_all(folder, base=1, post=20_000, held_out=20)
    (folder / "post.jsonl").rename(folder / "train.jsonl")
    plain = CHECKPOINTS / "loopus-tiny-base"
    cut = ("--encoder", "0..0", "--decoder", "3..3", "--no-analysis")
    tool("recast", str(plain), "--out", str(folder / "looped"), *cut)
    (folder / "plain").symlink_to(plain)
    return folder


def settings(data: Path, kind: str, output: Path, tokens: int, tiny: bool) -> dict[str, Any]:
    """Of a run; `kind`: of `RUNS`."""
    cuda = torch.cuda.is_available()
    found: dict[str, Any] = {
        "model": str(data / kind),
        "objective": kind,
        "output": str(output),
        "tokens": tokens,
        "batch_size": 32,
        "mixed_precision": "bf16" if cuda else "no",
        "data": {
            "max_length": 96 if tiny else 512,
            "sources": [{"path": str(data / "train.jsonl")}],
            "eval": [{"path": str(data / "held-out.jsonl")}],
        },
        "optimizer": {"learning_rate": 2e-3 if tiny else 5e-5, "warmup_tokens": tokens // 20},
        "save_every": 0,
        "eval_every": 0,
        "report_to": "none",
    }
    if kind == "looped":
        found["supervision"] = {
            "n_supervision": 3,
            "n_reasoning_steps": 8,
            "confidence_target": "token",
            "train_encoder": True,
        }
    return found


def run(data: Path, kind: str, folder: Path, tokens: int, tiny: bool) -> dict[str, Any]:
    """Trains; what `--json` says, the metrics of its last evaluation among it, and of its first."""
    output = folder / f"{kind}-{tokens}"
    file = output.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(settings(data, kind, output, tokens, tiny)))
    summary: dict[str, Any] = json.loads(tool("train", str(file), "--json"))
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    first = next(line for line in lines if any(name.startswith("eval_") for name in line))
    return {**summary, "before": {k: v for k, v in first.items() if k.startswith("eval_")}}


def train(say: Say, data: Path, folder: Path, seconds: float, tiny: bool) -> None:
    began = time.monotonic()
    trial, rates = 3_000 if tiny else 200_000, {}
    for kind in RUNS:
        summary = run(data, kind, folder, trial, tiny)
        rates[kind] = summary["tokens"] / summary["seconds"]
        say(trial=kind, tokens_s=rates[kind])
    left = SHARE * (seconds - (time.monotonic() - began))
    tokens = max(2 * trial, int(left / sum(1 / rate for rate in rates.values())))
    if tiny:
        tokens = 2 * trial
    for kind in RUNS:
        say(trained=kind, **run(data, kind, folder, tokens, tiny))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--seconds", type=float, default=480)
    options.add_argument("--data", type=Path)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = given.data or tiny_data(folder / "data")
        train(saying(given), data, folder, given.seconds, given.tiny or given.data is None)
    end(True)


if __name__ == "__main__":
    main()
