"""Checkpoints of a run: the last complete one, and the final model."""

import json
import re
import shlex
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined
from transformers import GenerationConfig, PreTrainedModel

from vllm_loopus.recast.output import complete_folder
from vllm_loopus.recast.provenance import file_hash, now, versions
from vllm_loopus.training.settings import Settings
from vllm_loopus.training.thresholds import suggestion

MODEL = "model"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def last_complete(folder: Path, processes: int) -> Path | None:
    """The last complete checkpoint in `folder`; None if there is none.

    A checkpoint is complete if it has `trainer_state.json`, which the main process writes last, and
    the random state of each of the `processes`.
    """
    found = [path for path in folder.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name)]
    for path in sorted(found, key=lambda path: -int(path.name.split("-")[1])):
        try:
            json.loads((path / "trainer_state.json").read_text())
        except (OSError, ValueError):
            continue
        if len(list(path.glob("rng_state*.pth"))) >= processes:
            return path
    return None


@dataclass(frozen=True)
class FinalModel:
    """Writes the final model of a run."""

    settings: Settings
    tokenizer: Any
    start: Path
    tokens: int
    metrics: dict[str, float]
    command: tuple[str, ...] = ("vllm-loopus", *sys.argv[1:])

    def write(self, model: PreTrainedModel, state_dict: dict[str, torch.Tensor]) -> Path:
        """Writes the folder `model` of the output, with card and provenance, atomically."""
        out = self.settings.output / MODEL
        dtype = getattr(torch, self.settings.save_dtype or self._start_dtype())
        state_dict = {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in state_dict.items()
        }
        with complete_folder(out) as folder:
            before = model.config.dtype
            model.config.dtype = dtype
            model.save_pretrained(folder, state_dict=state_dict)
            saved = type(model.config).from_pretrained(folder)
            saved.dtype = dtype
            saved.save_pretrained(folder)
            model.config.dtype = before
            self.tokenizer.save_pretrained(folder)
            self._generation_config().save_pretrained(folder)
            files = sorted(folder.glob("*.safetensors"))
            for file in files:
                file.chmod(0o644)  # safetensors creates files that only the owner can read
            weights = {file.name: file_hash(file) for file in files}
            provenance = json.dumps(self._provenance(weights), indent=1)
            (folder / "provenance.json").write_text(provenance)
            self._card(model, folder).save(folder / "README.md")
        return out

    def _start_dtype(self) -> str:
        try:
            config = json.loads((self.start / "config.json").read_text())
        except (OSError, ValueError):
            config = {}
        found = config.get("dtype") or config.get("torch_dtype")
        return found if found in ("float32", "bfloat16", "float16") else "float32"

    def _generation_config(self) -> GenerationConfig:
        if (self.start / "generation_config.json").is_file():
            return GenerationConfig.from_pretrained(self.start)
        return GenerationConfig(
            eos_token_id=self.tokenizer.eos_token_id, pad_token_id=self.tokenizer.pad_token_id
        )

    def _provenance(self, weights: dict[str, str]) -> dict[str, Any]:
        files = [self.start / "config.json", *sorted(self.start.glob("*.safetensors"))]
        sources = (*self.settings.data.sources, *self.settings.data.eval)
        data = [source.path.expanduser() for source in sources if source.path is not None]
        return {
            "made": now(),
            "command": shlex.join(self.command),
            "start": {
                "name": self.settings.model,
                "sha256": {file.name: file_hash(file) for file in files if file.is_file()},
            },
            "data_sha256": {str(file): file_hash(file) for file in data},
            "settings": self.settings.model_dump(mode="json"),
            "tokens": self.tokens,
            "metrics": self.metrics,
            "weights_sha256": weights,
            "versions": {**versions(), "datasets": metadata.version("datasets")},
        }

    def _card(self, model: PreTrainedModel, folder: Path) -> ModelCard:
        objective = self.settings.objective
        tag = {"looped": "loopus", "recursive": "recursive-transformer"}.get(objective)
        data = ModelCardData(
            library_name="vllm-loopus" if tag else "transformers",
            pipeline_tag="text-generation",
            tags=[tag, "looped-transformer"] if tag else [],
        )
        environment = Environment(
            loader=PackageLoader("vllm_loopus.training"), undefined=StrictUndefined
        )
        text = environment.get_template("card.md.j2").render(
            name=self.settings.output.resolve().name,
            objective=objective,
            config=model.config,
            settings=self.settings,
            shown=yaml.safe_dump(self.settings.model_dump(mode="json"), sort_keys=False).strip(),
            tokens=self.tokens,
            metrics=self.metrics,
            suggestion=suggestion(self.metrics, getattr(model.config, "max_loops", 0)),
            command=shlex.join(self.command),
            versions=versions(),
        )
        return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")
