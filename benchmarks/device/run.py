"""Measures what a GPU can tell, in the order of what it is worth.

    python run.py --out FOLDER                # what has not passed yet, until the time is used
    python run.py --out FOLDER --only speed_4b_exact_graphs
    python run.py --out FOLDER --tiny         # a dry run on a CPU

Each measure is a process of its own with a time limit. One that fails or takes too long does not
keep the next from running. Every result is in `FOLDER/results.jsonl` as soon as it is known, the
whole output of what failed in `FOLDER/logs.txt`. A call repeats only what has not passed in
`FOLDER/results.jsonl` and in the files of `--earlier`.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from measures.probe import probe
from plan import CALL, LEAST, Measure, Round, chosen
from results import (
    FAILED,
    PASSED,
    SKIPPED,
    TIMEOUT,
    append,
    check_same,
    endings,
    mend,
    merged,
    read,
)

HERE = Path(__file__).resolve().parent
LOG = 2000  # characters of the end of what a failed measure said


@dataclass
class Running:
    """A measure in progress."""

    measure: Measure
    process: "subprocess.Popen[bytes]"
    log: Path
    began: float
    limit: float

    def kill(self) -> None:
        """Ends it, and whatever it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Runner:
    """Runs rounds and writes how each measure ended."""

    def __init__(self, file: Path, tiny: bool, deadline: float) -> None:
        """`deadline`: by `time.monotonic`."""
        self._file, self._tiny, self._deadline = file, tiny, deadline
        self._logs = Path(tempfile.mkdtemp())
        self._running: list[Running] = []

    def run(self, measures: Sequence[Measure]) -> None:
        """One round: all at once. Returns when the last has ended."""
        left = self._deadline - time.monotonic()
        if left < LEAST:
            for measure in measures:
                self._write(measure, {"status": SKIPPED, "why": "no time left"})
            return
        try:
            for measure in measures:
                self._running.append(self._start(measure, min(measure.seconds, left)))
            while self._running:
                time.sleep(0.1)
                for running in list(self._running):
                    self._look_at(running)
        finally:
            self.stop()

    def stop(self) -> None:
        """Ends what is in progress."""
        while self._running:
            self._running.pop().kill()

    def close(self) -> None:
        shutil.rmtree(self._logs, ignore_errors=True)

    def _start(self, measure: Measure, limit: float) -> Running:
        log = self._logs / measure.name
        command = [sys.executable, "-m", f"measures.{measure.module}", *measure.arguments]
        command += ["--name", measure.name, "--results", str(self._file)]
        if self._tiny:
            command.append("--tiny")
        with log.open("w") as output:
            # A group of its own: what the measure has started ends with it.
            process = subprocess.Popen(
                command,
                cwd=HERE,
                env=environment(),
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        return Running(measure, process, log, time.monotonic(), limit)

    def _look_at(self, running: Running) -> None:
        code, took = running.process.poll(), time.monotonic() - running.began
        if code is None and took < running.limit:
            return
        running.kill()
        self._running.remove(running)
        status = TIMEOUT if code is None else PASSED if code == 0 else FAILED
        found = {"status": status, "seconds": round(took, 1), "limit": round(running.limit, 1)}
        if status != PASSED:
            text = running.log.read_text(errors="replace")
            found["log"] = text[-LOG:]
            with self._file.with_name("logs.txt").open("a") as logs:
                logs.write(f"\n=== {running.measure.name}, {status}\n{text}")
        self._write(running.measure, found)

    def _write(self, measure: Measure, found: Mapping[str, object]) -> None:
        append(self._file, {"measure": measure.name, **found})
        seconds = f"{found['seconds']} s" if "seconds" in found else ""
        print(f"{measure.name:<30} {found['status']:<8} {seconds}", flush=True)


def environment() -> dict[str, str]:
    """Of a measure: its programs are found, nothing is fetched, logs are short."""
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    defaults = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
    }
    return {**defaults, **os.environ, "PYTHONPATH": path}


def pending(rounds: Sequence[Round], ended: Mapping[str, str]) -> list[Round]:
    """What has not passed yet."""
    left = (tuple(m for m in measures if ended.get(m.name) != PASSED) for measures in rounds)
    return [measures for measures in left if measures]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of the results")
    parser.add_argument("--earlier", type=Path, nargs="*", default=[], help="files of results")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these, passed or not")
    parser.add_argument("--seconds", type=float, default=CALL, help="of this call at most")
    parser.add_argument("--tiny", action="store_true", help="a dry run on a CPU")
    given = parser.parse_args()
    deadline = time.monotonic() + given.seconds
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what is in progress ends too
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / "results.jsonl"
    mend(file)
    machine = probe()
    if not given.tiny and not machine["gpus"]:
        print("no GPU here: nothing would be shown; --tiny is a dry run", file=sys.stderr)
        return 2
    try:
        rounds = chosen(given.only, given.tiny)
        before = merged([read(path) for path in (*given.earlier, file)])
        check_same(before, machine, given.tiny)
    except ValueError as error:
        parser.error(str(error))
    if given.only is None:
        rounds = pending(rounds, endings(before))
    here = read(file)
    for line in before:  # a file of results is complete by itself
        if line not in here:
            append(file, line)
    append(file, {"call": sys.argv[1:], "tiny": given.tiny, "machine": machine})
    runner = Runner(file, given.tiny, deadline)
    try:
        for measures in rounds:
            runner.run([m for m in measures if m.on_cpu or not given.tiny])
    finally:
        runner.close()
    names = [measure.name for measures in rounds for measure in measures]
    ended = endings(read(file))
    passed = [name for name in names if ended.get(name) == PASSED]
    print(f"{file}: {len(passed)} of {len(names)} passed")
    return 0 if len(passed) == len(names) else 1


if __name__ == "__main__":
    sys.exit(main())
