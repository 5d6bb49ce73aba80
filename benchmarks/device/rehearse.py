"""Rehearses on a CPU what is to run on a GPU, as far as that goes.

    python benchmarks/device/rehearse.py --out runs/rehearsal [--triton FOLDER] [--no-wheels]

Packs; unpacks in an empty folder with an empty home; imports everything under a pretended GPU, with
no packages but those in the archive or on the machine; runs the measures dry, with the
smallest model on this CPU's vLLM, and again, where nothing may be left to do. With Triton
(installed, or in FOLDER: `pip install --no-deps --target FOLDER triton==3.6.0`), the stand-ins are
compared with vLLM's CPU operations, and an engine is built under the pretended GPU. A line of JSON
for each step is in `rehearsal.jsonl`.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from results import Line, append, endings, read

HERE = Path(__file__).resolve().parent
TAIL = 1200  # characters of the end of an output


class StepError(Exception):
    """A step does not hold; the message says why."""


class NotCheckedError(Exception):
    """A step cannot run here; the message says why."""


class Rehearsal:
    """The steps, in the order in which they need one another."""

    def __init__(self, out: Path, triton: Path | None, wheels: bool) -> None:
        """`out`: an empty folder. `triton`: where Triton is, None where it is installed or not
        there."""
        self._packed, self._work, self._home = out / ".gpu", out / "work", out / "home"
        self._results, self._wheels, self._triton = out / "results", wheels, triton
        for folder in (self._work, self._home):
            folder.mkdir(parents=True)

    def steps(self) -> Iterator[tuple[str, Callable[[], Line]]]:
        yield "pack", self.pack
        yield "unpack", self.unpack
        yield "imports", self.imports
        yield "stand-ins", self.stand_ins
        yield "engine", self.engine
        rows = "1,2,4,8,16,32,64"
        yield "padded", partial(self.engine, "llama", padded=True, VLLM_LOOPUS_PADDED_ROWS=rows)
        yield "V2 runner", partial(self.engine, runner="V2Adapter", VLLM_USE_V2_MODEL_RUNNER="1")
        yield "dry run", self.dry_run
        yield "second call", self.second_call

    def pack(self) -> Line:
        options = []
        if not self._wheels:
            (empty := self._home.parent / "no-wheels").mkdir()
            options = ["--wheels", str(empty)]
        self._run([sys.executable, str(HERE / "pack.py"), str(self._packed), *options])
        size = sum(file.stat().st_size for file in self._packed.iterdir())
        return {"mib": round(size / 2**20, 1), "wheels": self._wheels}

    def unpack(self) -> Line:
        """`run.sh` unpacks; there is no GPU, so it ends after that."""
        done = self._run(["bash", str(self._packed / "run.sh")], expected=2, **self._own())
        if "no GPU here" not in done.stderr:
            raise StepError(f"run.sh should have found no GPU: {done.stderr[-TAIL:]}")
        contents = json.loads((self._work / "contents.json").read_text())
        if list(self._work.rglob("*.so")):
            raise StepError("compiled files are in the archive")
        return {"commit": contents["commit"], "wheels": len(contents["wheels"])}

    def imports(self) -> Line:
        with suppress(NotCheckedError):
            self._triton_path()
            return self._looked(with_triton=True)
        return self._looked(with_triton=False)

    def _looked(self, with_triton: bool) -> Line:
        seen = self._pretended("look.py", with_triton)[-1]
        wrong = {name: at for name, at in seen["files"].items() if str(self._work) not in at}
        if wrong:
            raise StepError(f"not from the archive: {wrong}")
        if seen["platform"] != "NvmlCudaPlatform" or not seen["registered"]:
            raise StepError(f"vLLM does not take this for a GPU with our plugin: {seen}")
        del seen["files"]
        return seen

    def stand_ins(self) -> Line:
        path = os.pathsep.join([*self._triton_path(), str(HERE)])
        done = self._run([sys.executable, "-m", "stand_ins.compare"], PYTHONPATH=path)
        lines = lines_of(done.stdout)
        worst = {
            dtype: max(line["worst"] for line in lines if line["dtype"] == dtype)
            for dtype in {line["dtype"] for line in lines}
        }
        return {"compared": len(lines), "worst": worst}

    def engine(
        self,
        backbone: str = "qwen3",
        runner: str = "V1Adapter",
        padded: bool = False,
        **variables: str,
    ) -> Line:
        """Golden answers under the pretended GPU, from the engine that `variables` of the
        environment ask for."""
        self._triton_path()
        lines = self._pretended("engine.py", True, backbone, fails=True, **variables)
        reached = [line["reached"] for line in lines if "reached" in line]
        if "answers" not in reached:
            raise StepError(f"{reached}, then {lines[-1:]}")
        answers = lines[-1]
        if not answers["cases"] == answers["equal_tokens"] == answers["equal_depths"]:
            raise StepError(f"the golden answers are others: {answers}")
        expected = {"attention": "TRITON_ATTN", "runner": runner, "padded": padded}
        if not expected.items() <= answers.items():
            raise StepError(f"this is another engine than {expected}: {answers}")
        return {**answers, "reached": reached}

    def dry_run(self) -> Line:
        done = self._measure()
        ended = endings(read(self._results / "results.jsonl"))
        if done.returncode or set(ended.values()) != {"passed"}:
            raise StepError(f"{ended}: {(done.stderr + done.stdout)[-TAIL:]}")
        return {"measures": ended}

    def second_call(self) -> Line:
        before = len(read(self._results / "results.jsonl"))
        self._measure()
        added = read(self._results / "results.jsonl")[before:]
        if [line for line in added if "call" not in line]:
            raise StepError(f"measures that had passed ran again: {added}")
        return {}

    def _measure(self) -> "subprocess.CompletedProcess[str]":
        command = ["bash", str(self._packed / "run.sh"), "--tiny", "--seconds", "2400"]
        return self._run(command, expected=None, OUT=str(self._results), **self._own())

    def _own(self) -> dict[str, str]:
        return {"LOOPUS_WORK": str(self._work), "LOOPUS_OWN_VLLM": "1"}

    def _triton_path(self) -> list[str]:
        if self._triton is not None:
            return [str(self._triton)]
        spec = find_spec("triton")
        if spec is None or spec.origin is None:
            raise NotCheckedError("needs Triton: install it, or give --triton FOLDER")
        return [str(Path(spec.origin).parents[1])]

    def _pretended(
        self,
        program: str,
        with_triton: bool,
        backbone: str = "qwen3",
        fails: bool = False,
        **variables: str,
    ) -> list[Line]:
        """The lines of a program of `pretend/`, on what was unpacked."""
        device = self._work / "repository" / "benchmarks" / "device"
        paths = [device / "pretend", self._work / "vllm", self._work / "repository", device]
        triton = self._triton_path() if with_triton else []
        done = self._run(
            [
                sys.executable,
                str(device / "pretend" / program),
                str(self._work / "golden" / backbone),
            ],
            expected=None if fails else 0,
            PYTHONPATH=os.pathsep.join([*map(str, paths), *triton]),
            PRETEND_CUDA="1",
            PRETEND_PACKAGES=f"{device / 'there.txt'}:{device / 'wheels.txt'}",
            **({"TRITON_INTERPRET": "1"} if with_triton else {}),
            **variables,
        )
        if lines := lines_of(done.stdout):
            return lines
        raise StepError(done.stderr[-TAIL:])

    def _run(
        self, command: Sequence[str], expected: int | None = 0, **variables: str
    ) -> "subprocess.CompletedProcess[str]":
        """Runs a command with an empty home and no variables but these.

        Raises `StepError` with the end of its output where it ends otherwise than `expected`.
        """
        python = str(Path(sys.executable).parent)
        environment: Mapping[str, str] = {
            "PATH": os.pathsep.join([python, os.environ["PATH"]]),
            "HOME": str(self._home),
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            **{name: value for name, value in os.environ.items() if name.startswith("PIP_")},
            **variables,
        }
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if expected is not None and done.returncode != expected:
            text = (done.stdout + done.stderr)[-TAIL:]
            raise StepError(f"{command[1]} ended with {done.returncode}: {text}")
        return done


def lines_of(text: str) -> list[Line]:
    """The lines of an output that are JSON objects."""
    found: list[Line] = []
    for line in text.splitlines():
        if line.startswith("{"):
            found.append(json.loads(line))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="an empty folder")
    parser.add_argument("--triton", type=Path, help="a folder that has Triton")
    parser.add_argument("--no-wheels", action="store_true", help="where there is no network")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="after pack and unpack")
    given = parser.parse_args()
    out: Path = given.out.resolve()
    if out.exists() and any(out.iterdir()):
        parser.error(f"--out {given.out} is not empty")
    triton = given.triton and given.triton.resolve()
    rehearsal = Rehearsal(out, triton, not given.no_wheels)
    failed = False
    for name, step in rehearsal.steps():
        if given.only and name not in ("pack", "unpack", *given.only):
            continue
        began, outcome = time.monotonic(), dict[str, Any]()
        try:
            outcome = {"status": "passed", **step()}
        except NotCheckedError as error:
            outcome = {"status": "not checked", "why": str(error)}
        except StepError as error:
            outcome, failed = {"status": "failed", "why": str(error)}, True
        outcome["seconds"] = round(time.monotonic() - began, 1)
        append(out / "rehearsal.jsonl", {"step": name, **outcome})
        print(f"{name:<12} {json.dumps(outcome)}", flush=True)
        if failed and name in ("pack", "unpack"):
            break
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
