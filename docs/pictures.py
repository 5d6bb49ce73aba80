"""Draws the pictures of docs/looking-inside.md again, from what loopus-tiny answers today, or those
of docs/smollm2.md from a run of `make smollm2`.

    make pictures                      # TRACE_OPTIONS='--max-loops 8' goes to vllm-loopus trace
    .venv/bin/python docs/pictures.py --smollm2 runs/smollm2

A question with its answer is traced as a given text; the statistics are of the questions that
loopus-tiny is evaluated on. Chromium takes the screenshot of the page.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from vllm_loopus.tiny.tasks import evaluation_set

DOCS = Path(__file__).parent
MODEL = "loopus-tiny"
# The ball goes a b c d a b c d b: after every pair the state says where it is.
PROMPT = "a:"
ANSWER = "ab,bc,cd,da,ab,bc,cd,db=b"
PER_DIFFICULTY = 20
TEXTS, BEGINNING = 24, 400  # texts that are continued, and characters of each that are given
WIDTH, SCALE = 1280, 1.5


def vllm_loopus(*arguments: str | Path) -> None:
    """Runs a subcommand. Raises `CalledProcessError` where it fails."""
    command = [sys.executable, "-m", "vllm_loopus.cli", *map(str, arguments)]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}  # a small model gains nothing from more
    subprocess.run(command, check=True, env=environment)


def photograph(page_file: Path, out: Path) -> None:
    """The page as it opens, down to the grid's legend, with the mouse where the last token exited.
    Needs Chromium."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))))
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page(
            viewport={"width": WIDTH, "height": 900}, device_scale_factor=SCALE
        )
        page.goto(page_file.resolve().as_uri())
        tokens = page.locator("#grid thead th[data-token]").count()
        page.hover(f'#grid td.exit[data-token="{tokens - 1}"]')
        boxes = [page.locator(part).bounding_box() for part in (".legend", "#tip")]
        height = 20 + max(box["y"] + box["height"] for box in boxes if box is not None)
        page.screenshot(path=out, clip={"x": 0, "y": 0, "width": WIDTH, "height": height})
        chromium.close()


def draw_tiny(options: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        page, run, questions = (Path(folder) / n for n in ("t.html", "run.json", "questions.jsonl"))
        given = ("--prompt", PROMPT, "--answer", ANSWER, "--tokens", "2,8,14,20,24")
        states = ("--html", page, "--trajectories", DOCS / "trajectories.png")
        vllm_loopus("trace", MODEL, *given, *states, *options)
        photograph(page, DOCS / "trace.png")
        items = evaluation_set(seed=0, per_difficulty=PER_DIFFICULTY)
        rows = [
            {"prompt": item.question, "difficulty": f"{item.task} {item.difficulty}"}
            for item in items
        ]
        questions.write_text("\n".join(map(json.dumps, rows)))
        drawn = ("--max-tokens", "2", "--json", run, "--convergence", DOCS / "convergence.png")
        vllm_loopus("trace", MODEL, "--prompts", questions, *drawn, *options)
        vllm_loopus("depths", run, "--png", DOCS / "depths.png")


def draw_smollm2(run: Path, options: list[str]) -> None:
    """`run`: the folder of `make smollm2`. Its held-out texts are continued."""
    out = DOCS / "smollm2"
    out.mkdir(exist_ok=True)
    shutil.copy(run / "report" / "training.png", out / "training.png")
    photograph(run / "report" / "trace.html", out / "trace.png")
    rows = (run / "data" / "held-out.jsonl").read_text().splitlines()[:TEXTS]
    beginnings = [{"prompt": json.loads(row)["text"][:BEGINNING]} for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        texts, answers = Path(folder) / "texts.jsonl", Path(folder) / "run.json"
        texts.write_text("\n".join(map(json.dumps, beginnings)))
        given = ("--prompts", texts, "--max-tokens", "24", "--json", answers)
        vllm_loopus("trace", run / "looped" / "model", *given, *options)
        vllm_loopus("depths", answers, "--png", out / "depths.png")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--smollm2", type=Path)
    args, options = parser.parse_known_args()
    if args.smollm2:
        draw_smollm2(args.smollm2, options)
    else:
        draw_tiny(options)


if __name__ == "__main__":
    main()
