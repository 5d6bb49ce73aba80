"""All checks for a real GPU in one command of ten minutes at most.

    python benchmarks/device/checks.py --write results.json
    python benchmarks/device/checks.py --tiny             # to its last step on a CPU, small

Each check is a process of its own with a time limit; one that fails, or runs out of time, does not
keep the next from running. The file is written after each, with date and machine; `--only NAME`
replaces that check alone in a file that is there. What each check measures is in `measures.py`;
`README.md` says how to read the numbers.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from probe import probe  # beside this file

HERE = Path(__file__).resolve().parent
MEAN, LOOPS, LAYERS = 3.0, 8, (1, 10, 1)  # of benchmarks/early_exit.py: encoder, reasoning, decoder
SEQUENCES = (64, 16, 1, 256)  # the one that counts first


@dataclass(frozen=True)
class Check:
    """`arguments` of `measures.py`, or of `early_exit.py` for speed-ups; `seconds` at most."""

    name: str
    arguments: list[str]
    seconds: int


def planned(tiny: bool) -> list[Check]:
    """The checks in the order of what they are worth."""
    if tiny:
        return [  # seconds each on an idle machine
            Check("golden_float32", ["golden", "--dtype", "float32", "--cases", "3"], 300),
            Check("golden_bfloat16", ["golden", "--dtype", "bfloat16", "--cases", "2"], 300),
            Check("graphs", ["passes", "--tiny", "--rows", "1", "3", "6"], 300),
            Check("golden_graphs", ["golden", "--cases", "2", "--graphs"], 300),
            Check("speedup_2", speedup(2, tokens=2, waves=1, policies=("last_exited",)), 300),
        ]
    return [
        Check("golden_float32", ["golden", "--dtype", "float32"], 90),
        Check("golden_bfloat16", ["golden", "--dtype", "bfloat16"], 50),
        Check("graphs", ["passes"], 100),
        Check("golden_graphs", ["golden", "--dtype", "float32", "--graphs"], 70),
        *(Check(f"speedup_{n}", speedup(n), 80 if n < 256 else 110) for n in SEQUENCES),
    ]


def speedup(
    sequences: int,
    tokens: int = 32,
    waves: int = 2,
    policies: tuple[str, ...] = ("last_exited", "exact"),
) -> list[str]:
    """The command line of `benchmarks/early_exit.py`."""
    return [
        *("--seqs", str(sequences), "--tokens", str(tokens), "--waves", str(waves)),
        *("--mean", str(MEAN), "--no-plain", "--policies", *policies),
    ]


def run(check: Check, limit: float) -> dict[str, Any]:
    """What came of a check: `status` is passed, failed, timeout or skipped. A result that cannot
    be read fails its check, `why` says how."""
    if limit < 5:
        return {"name": check.name, "status": "skipped", "why": "no time left"}
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "result.json"
        is_speedup = check.name.startswith("speedup")
        script = HERE.parent / "early_exit.py" if is_speedup else HERE / "measures.py"
        command = [sys.executable, str(script), *check.arguments, "--write", str(told)]
        started = time.monotonic()
        log = Path(folder) / "log"
        with log.open("w") as output:
            # A group of its own: what the check has started ends with it.
            process = subprocess.Popen(
                command, stdout=output, stderr=output, start_new_session=True, env=environment()
            )
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        outcome = {
            "name": check.name,
            "seconds": round(time.monotonic() - started, 1),
            "limit": round(limit, 1),
        }
        try:
            result = json.loads(told.read_text()) if told.is_file() else None
            if result is not None and is_speedup:
                result = against_ideal(result)
        except Exception as error:  # of a script that has changed, or was cut off
            result = None
            outcome["why"] = f"the result cannot be read: {type(error).__name__}: {error}"
        if code is None:
            return {**outcome, "status": "timeout", "result": result, "log": tail(log)}
        if code != 0 or result is None:
            return {**outcome, "status": "failed", "result": result, "log": tail(log)}
        return {**outcome, "status": "passed", "result": result}


def environment() -> dict[str, str]:
    root = str(HERE.parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    defaults = {
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    return {**defaults, **os.environ, "PYTHONPATH": path}


def against_ideal(result: dict[str, Any]) -> dict[str, Any]:
    """Speed-ups beside the ideal: cost follows the mean exit depth, layer by layer.

    `result`: of `early_exit.py`; its ratios are medians over rounds.
    """
    encoder, reasoning, decoder = LAYERS
    ideal = (encoder + LOOPS * reasoning + decoder) / (encoder + MEAN * reasoning + decoder)
    return {
        "ideal": round(ideal, 3),
        "rows": [
            {
                "policy": row["policy"],
                "sequences": row["seqs"],
                "speedup": round(row["on_over_off"]["median"], 3),
                "of_ideal": round(row["on_over_off"]["median"] / ideal, 3),
                "of_simulated": round(row["of_simulated"]["median"], 3),
                "costs_ms": row["costs"],
            }
            for row in result["runs"]
        ],
    }


def tail(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:]


def earlier(file: Path, tiny: bool, machine: dict[str, Any]) -> list[dict[str, Any]]:
    """The checks that `file` holds, none where there is no file. Raises `ValueError` for a file
    that is no report, or of another kind or machine."""
    if not file.exists():
        return []
    try:
        report = json.loads(file.read_text())
        checks = {check["name"]: check for check in report["checks"]}
        same = report["tiny"] == tiny and report["machine"]["gpus"] == machine["gpus"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no report of checks; name another file") from error
    if not same:
        raise ValueError(f"{file} is of another machine, or of --tiny; name another file")
    return list(checks.values())


def merged(
    before: list[dict[str, Any]], new: list[dict[str, Any]], names: list[str]
) -> list[dict[str, Any]]:
    """Checks by name, the newer of two, in the order of the plan."""
    found = {check["name"]: check for check in (*before, *new)}
    return [found[name] for name in dict.fromkeys((*names, *found)) if name in found]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="small models; any machine")
    parser.add_argument("--only", nargs="+", help="names of checks to repeat")
    parser.add_argument("--seconds", type=float, default=580, help="for all checks together")
    parser.add_argument("--write", type=Path, default=Path("device-checks.json"))
    given = parser.parse_args()
    plan = planned(given.tiny)
    names = [check.name for check in plan]
    if unknown := [name for name in given.only or () if name not in names]:
        parser.error(f"--only {unknown[0]} is no check; there are {', '.join(names)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the check in progress ends too
    machine = probe()
    if not given.tiny and not machine["gpus"]:
        print("no GPU here: nothing would be shown; --tiny runs on a CPU", file=sys.stderr)
        return 2
    try:
        before = earlier(given.write, given.tiny, machine) if given.only else []
    except ValueError as error:
        parser.error(str(error))
    checks = [check for check in plan if not given.only or check.name in given.only]
    outcomes: list[dict[str, Any]] = []
    report: dict[str, Any] = {"tiny": given.tiny, "machine": machine}
    deadline = time.monotonic() + given.seconds
    for check in checks:
        outcome = run(check, min(check.seconds, deadline - time.monotonic()))
        outcomes.append({**outcome, "date": machine["date"]})
        report["checks"] = merged(before, outcomes, names)
        given.write.write_text(json.dumps(report, indent=1))
        print(f"{outcome['name']:<16} {outcome['status']:<8} {outcome.get('seconds', 0):6.1f} s")
        print(f"    {json.dumps(outcome.get('result'))}"[:600], flush=True)
    failed = [outcome["name"] for outcome in outcomes if outcome["status"] != "passed"]
    print(f"{given.write}: {len(checks) - len(failed)} of {len(checks)} passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
