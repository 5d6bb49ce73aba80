"""Draws the pictures of docs/looking-inside.md again, from what loopus-tiny answers today.

    make pictures                      # TRACE_OPTIONS='--max-loops 8' goes to vllm-loopus trace

A question with its answer is traced as a given text; the statistics are of the questions that
loopus-tiny is evaluated on. Chromium takes the screenshot of the page.
"""

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
        page.goto(page_file.as_uri())
        tokens = page.locator("#grid thead th[data-token]").count()
        page.hover(f'#grid td.exit[data-token="{tokens - 1}"]')
        boxes = [page.locator(part).bounding_box() for part in (".legend", "#tip")]
        height = 20 + max(box["y"] + box["height"] for box in boxes if box is not None)
        page.screenshot(path=out, clip={"x": 0, "y": 0, "width": WIDTH, "height": height})
        chromium.close()


def main() -> None:
    options = sys.argv[1:]
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


if __name__ == "__main__":
    main()
