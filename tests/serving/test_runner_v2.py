"""vLLM's own V2 runner, where Triton is installed for its interpreter: see `v2_on_cpu.py`."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="not checked: needs Triton, which CPUs do without (tests/serving/v2_on_cpu.py)",
)
def test_golden_on_the_v2_runner(tmp_path: Path) -> None:
    told = tmp_path / "result.json"
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    subprocess.run(
        [sys.executable, "-m", "tests.serving.v2_on_cpu", str(told)],
        check=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        timeout=600,
    )
    result = json.loads(told.read_text())
    assert result["runner"][:2] == ["LoopUSCPUModelRunner", "V2Adapter"]
    assert len(result["golden"]) == 8 and all(result["golden"])
    assert all(result["prompts_scored"]) and all(result["first_scores"])
    assert result["seeds_repeat"] and result["preemptions"] > 0
