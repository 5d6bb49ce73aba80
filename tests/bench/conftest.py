"""A small looped model on disk, and one tiny run of the benchmark for all tests of its report."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from vllm_loopus.bench.models import SIZES, write_looped
from vllm_loopus.cli.main import app

# What `original_worker.py` needs of a checkout, over the reference model.
CHECKOUT = """
import torch
from vllm_loopus.config import ReleasedLoopUSConfig
from vllm_loopus.modeling.model import LoopUSForCausalLM


class LDSConfig:
    def __init__(self, **fields):
        self.fields = fields


class LDSForCausalLM(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.inner = LoopUSForCausalLM(ReleasedLoopUSConfig.from_dict(config.fields))
        self.device = torch.device("cpu")

    def load_state_dict(self, tensors):
        return self.inner.load_state_dict(tensors)

    def set_runtime_stats_enabled(self, enabled):
        pass

    def reset_runtime_stats(self):
        self.depths = []

    def get_runtime_stats(self):
        return {"avg_reasoning_steps": sum(self.depths) / len(self.depths)}

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        self.inner.config.exit_threshold = self.q_threshold
        return self.inner(input_ids, attention_mask=attention_mask)

    def generate(self, ids, attention_mask, max_new_tokens, do_sample, repetition_penalty):
        for _ in range(max_new_tokens):
            output = self(ids, attention_mask)
            self.depths.append(int(output.exit_depths.max()))
            ids = torch.cat([ids, output.logits[:, -1:].argmax(-1)], dim=1)
            attention_mask = torch.cat([attention_mask, attention_mask[:, -1:]], dim=1)
        return ids
"""


@pytest.fixture(scope="session")
def looped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A checkpoint in float32, and the threshold at which tokens leave at depth 3 on average."""
    folder = tmp_path_factory.mktemp("models") / "looped"
    return folder, write_looped(SIZES["tiny"], folder, "float32", mean=3.0)


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stand-in for the original implementation."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "models").mkdir()
    (folder / "models" / "__init__.py").write_text("from .modeling_lds import *\n")
    (folder / "models" / "modeling_lds.py").write_text(CHECKOUT)
    return folder


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of `vllm-loopus bench --plan tiny`."""
    out = tmp_path_factory.mktemp("results")
    handler = signal.getsignal(signal.SIGTERM)
    arguments = ["--plan", "tiny", "--only", "decode,sweep,mixed", "--out", str(out)]
    done = CliRunner().invoke(app, ["bench", *arguments])
    signal.signal(signal.SIGTERM, handler)
    assert done.exit_code == 0, done.stderr[-3000:]
    (out / "printed").write_text(done.stdout)
    return out


@pytest.fixture(scope="session")
def report(results: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((results / "report.json").read_text())
    return loaded
