"""Writes the model card, the provenance file and the analysis report of a recast checkpoint."""

import hashlib
import json
import platform
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined
from tqdm import tqdm

from vllm_loopus.config import LoopUSConfig
from vllm_loopus.files import object_in
from vllm_loopus.recast.analysis import Analysis
from vllm_loopus.recast.base import Base
from vllm_loopus.recast.cut import Cut
from vllm_loopus.recast.gguf_file import GgufFile
from vllm_loopus.recast.tensors import PIECE

PACKAGES = ("vllm-loopus", "transformers", "torch", "safetensors")
RUNNERS_UP = 5


@dataclass(frozen=True)
class RecastRecord:
    """How a checkpoint was recast, for its model card and provenance file."""

    base: Base
    cut: Cut
    config: LoopUSConfig
    seed: int
    by_hand: Sequence[str]  # which of encoder and decoder the user gave
    command: Sequence[str]
    analysis: Analysis | None = None

    def write(self, folder: Path, weights: dict[str, str]) -> None:
        """Adds the card, the provenance file and, if there is an analysis, its report to `folder`.

        `weights`: the SHA-256 of each weight file.
        """
        if self.analysis is not None:
            from vllm_loopus.recast.report import write_report  # imports matplotlib

            write_report(folder, self.analysis.to_dict(), self.cut, self.chosen_by)
        (folder / "provenance.json").write_text(json.dumps(self._provenance(weights), indent=1))
        self._card(folder).save(folder / "README.md")

    @property
    def chosen_by(self) -> str:
        """How the cut was chosen: a sentence without its full stop."""
        whole = {"encoder", "decoder"} == set(self.by_hand)
        if whole:
            chosen = "The cut was given by hand"
        elif self.by_hand:
            chosen = f"The {self.by_hand[0]} was given by hand, the rest is the best by the rule"
        else:
            chosen = "The cut is the best by the rule"
        published = self.analysis and self.analysis.against_published
        return chosen + (f". {published}" if published else "")

    def _provenance(self, weights: dict[str, str]) -> dict[str, Any]:
        return {
            "made": now(),
            "command": shlex.join(self.command),
            "base": base_entry(self.base),
            "cut": self.cut.runs,
            "seed": self.seed,
            "weights_sha256": weights,
            "versions": versions(),
        }

    def _card(self, folder: Path) -> ModelCard:
        repository = self.base.repository
        data = ModelCardData(
            base_model=repository,
            library_name="vllm-loopus",
            pipeline_tag="text-generation",
            tags=["loopus", "looped-transformer"],
        )
        loader = PackageLoader("vllm_loopus.recast")
        environment = Environment(loader=loader, undefined=StrictUndefined)
        link = f"[{repository}](https://huggingface.co/{repository})"
        parts = [part for part, run in self.cut.runs.items() for _ in run]
        text = environment.get_template("card.md.j2").render(
            name=folder.name,
            base=link if repository else f"`{self.base.name}`",
            gguf=self.base.gguf and self.base.gguf.description,
            cut=self.cut,
            num_layers=self.base.num_layers,
            config=self.config,
            seed=self.seed,
            representation=self.analysis and self.analysis.representation,
            ranking=self.analysis.ranking[:RUNNERS_UP] if self.analysis else (),
            base_loss=self.analysis.untrained.base
            if self.analysis and self.analysis.untrained
            else None,
            sample=self.analysis.sample if self.analysis else "",
            parts=parts,
            chosen_by=self.chosen_by,
            command=shlex.join(self.command),
            versions=versions(),
        )
        return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")


@dataclass(frozen=True)
class ConversionRecord:
    """How a checkpoint was converted from one format to the other."""

    source: str
    checkpoint_format: str
    command: Sequence[str]

    def write(self, folder: Path, weights: dict[str, str]) -> None:
        """Adds the record to `provenance.json` in `folder`. `weights`: as in `RecastRecord`."""
        file = folder / "provenance.json"
        provenance = object_in(file)
        entry = {
            "made": now(),
            "command": shlex.join(self.command),
            "source": self.source,
            "format": self.checkpoint_format,
            "weights_sha256": weights,
            "versions": versions(),
        }
        earlier = provenance.get("conversions")
        provenance["conversions"] = [*(earlier if isinstance(earlier, list) else ()), entry]
        file.write_text(json.dumps(provenance, indent=1))


def base_entry(base: Base) -> dict[str, Any]:
    """What a provenance file says of the base model."""
    own_config = [] if base.gguf else [base.folder / "config.json"]
    files = [*own_config, *base.files]
    return {
        "name": base.name,
        "revision": base.revision,
        "sha256": {file.name: file_hash(file) for file in tqdm(files, desc="hash the base")},
        "tensors_left_out": list(base.left_out),
        **({"gguf": base.gguf.facts} if base.gguf else {}),
    }


def unpacked_record(file: GgufFile, command: Sequence[str]) -> dict[str, Any]:
    """The content of `provenance.json` of a plain checkpoint that was made from a GGUF file."""
    return {
        "made": now(),
        "command": shlex.join(command),
        "gguf": {**file.facts, "sha256": file_hash(file.path)},
        "versions": versions(),
    }


def now() -> str:
    """The current time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that write a checkpoint."""
    found = {name: metadata.version(name) for name in PACKAGES}
    return {**found, "python": platform.python_version()}


def file_hash(file: Path) -> str:
    """The SHA-256 of a file."""
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        while piece := stream.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()
