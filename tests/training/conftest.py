"""A small random LoopUS model and rows of all three forms to train it on."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import set_seed

from tests.bases import base_config, save_base
from vllm_loopus.config import LoopUSConfig
from vllm_loopus.tiny.tokenizer import build_tokenizer
from vllm_loopus.training.objective import Labelled
from vllm_loopus.training.packing import collate
from vllm_loopus.training.supervision import TrainableLoopUS

LENGTH = 24


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """So that the same numbers come out in this process and in others."""
    torch.set_num_threads(1)


def random_loopus(seed: int = 1, **fields: Any) -> TrainableLoopUS:
    set_seed(seed)
    config = LoopUSConfig(
        base_config=base_config("qwen3"),
        encoder_layer_indices=[0],
        reasoning_layer_indices=[1, 2],
        decoder_layer_indices=[3],
        **{"max_loops": 3, **fields},
    )
    return TrainableLoopUS(config)


@pytest.fixture
def model() -> TrainableLoopUS:
    return random_loopus()


def document(seed: int, length: int, targets_from: int = 1) -> dict[str, list[int]]:
    generator = random.Random(seed)
    ids = [generator.randrange(6, 100) for _ in range(length)]
    return {"input_ids": ids, "labels": [-100] * targets_from + ids[targets_from:]}


@pytest.fixture
def batch() -> dict[str, Any]:
    """Two rows of three documents and padding, and where they are labelled."""
    rows = [[document(1, 9), document(2, 11, targets_from=7)], [document(3, LENGTH)]]
    tensors = collate(rows, LENGTH, 0)
    tensors["labelled"] = Labelled.of(tensors["labels"], tensors["position_ids"])
    return tensors


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`looped` and `plain` models, and `rows` and `held_out` as JSONL."""
    root = tmp_path_factory.mktemp("training")
    found = {name: root / name for name in ("looped", "plain", "rows.jsonl", "held_out.jsonl")}
    random_loopus().save_pretrained(found["looped"])
    build_tokenizer().save_pretrained(found["looped"])
    save_base("qwen3", found["plain"])
    for seed, name in enumerate(("rows.jsonl", "held_out.jsonl")):
        generator = random.Random(seed)
        lines = []
        for number in range(90 if seed == 0 else 12):
            a, b = generator.randrange(10), generator.randrange(10)
            question, answer = f"{a}+{b}=", str((a + b) % 10)
            turns = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
            forms: list[dict[str, Any]] = [
                {"text": question + answer},
                {"messages": turns},
                {"prompt": question, "completion": answer},
            ]
            lines.append(json.dumps(forms[number % 3]))
        found[name].write_text("\n".join(lines) + "\n")
    return found


@pytest.fixture
def content(folders: dict[str, Path], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`content(**changes)`: what a settings file of a short run holds."""

    def make(**changes: Any) -> dict[str, Any]:
        return {
            "model": str(folders["looped"]),
            "output": str(tmp_path / "run"),
            "tokens": 2000,
            "batch_size": 8,
            "micro_batch_size": 4,
            "supervision": {"n_supervision": 2, "n_reasoning_steps": 4},
            "data": {
                "max_length": LENGTH,
                "shuffle_documents": 40,
                "sources": [{"path": str(folders["rows.jsonl"])}],
                "eval": [{"path": str(folders["held_out.jsonl"])}],
            },
            "optimizer": {"learning_rate": 1e-2, "warmup_tokens": 200},
            "log_every": 1,
            "save_every": 2,
            "report_to": "none",
            **changes,
        }

    return make
