"""Writes the model card, the provenance file and the report of a recursive transformer."""

import base64
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from vllm_loopus.recast.provenance import base_entry, now, versions
from vllm_loopus.recast.recursive import RecursivePlan

MATRIX = re.compile(r"model\.layers\.(\d+)\.(?:.+\.)?(\w+)\.weight")


@dataclass(frozen=True)
class RecursiveRecord:
    """How a recursive transformer was made, for its model card, provenance file and report."""

    plan: RecursivePlan
    seed: int
    command: Sequence[str]

    def numbers(self) -> dict[str, Any]:
        """All values of the report, for JSON: sizes, and the share of each residual that its LoRA
        has, by layer of the base and matrix."""
        config = self.plan.config
        return {
            "base": self.plan.base.name,
            "loops": config.loops,
            "layers": config.base.num_hidden_layers,
            "block_size": config.block_size,
            "tie": config.tie,
            "lora_rank": config.lora_rank,
            "parameters": self.plan.parameters,
            "kept": self._kept(),
        }

    def write(self, folder: Path, weights: dict[str, str]) -> None:
        """Adds card, provenance and report to `folder`. `weights`: the SHA-256 of each weight
        file, all written."""
        numbers = self.numbers()
        provenance = {
            "made": now(),
            "command": shlex.join(self.command),
            "base": base_entry(self.plan.base),
            "method": "recursive",
            **{name: numbers[name] for name in ("loops", "tie", "lora_rank")},
            "seed": self.seed,
            "weights_sha256": weights,
            "versions": versions(),
        }
        (folder / "provenance.json").write_text(json.dumps(provenance, indent=1))
        (folder / "analysis.json").write_text(json.dumps(numbers, indent=1))
        picture = _picture(numbers["kept"]) if numbers["kept"] else None
        page = _render("recursive_report.html.j2", autoescape=True, **numbers, picture=picture)
        (folder / "report.html").write_text(page)
        self._card(folder, numbers).save(folder / "README.md")

    def _kept(self) -> dict[str, dict[int, float]]:
        """By matrix (`q_proj`) and layer of the base."""
        kept: dict[str, dict[int, float]] = {}
        for name, residual in self.plan.residuals.items():
            match = MATRIX.fullmatch(name)
            if match is not None and residual.kept is not None:
                kept.setdefault(match[2], {})[int(match[1])] = residual.kept
        return {name: dict(sorted(by_layer.items())) for name, by_layer in kept.items()}

    def _card(self, folder: Path, numbers: Mapping[str, Any]) -> ModelCard:
        repository = self.plan.base.repository
        data = ModelCardData(
            base_model=repository,
            library_name="vllm-loopus",
            pipeline_tag="text-generation",
            tags=["recursive-transformer", "looped-transformer"],
        )
        link = f"[{repository}](https://huggingface.co/{repository})"
        shares = [share for by_layer in numbers["kept"].values() for share in by_layer.values()]
        text = _render(
            "recursive_card.md.j2",
            **{
                **numbers,
                "name": folder.name,
                "base": link if repository else f"`{self.plan.base.name}`",
                "least": min(shares, default=None),
                "mean": sum(shares) / len(shares) if shares else None,
                "command": shlex.join(self.command),
                "versions": versions(),
            },
        )
        return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")


def _render(template: str, autoescape: bool = False, **values: Any) -> str:
    environment = Environment(
        loader=PackageLoader("vllm_loopus.recast"), undefined=StrictUndefined, autoescape=autoescape
    )
    return environment.get_template(template).render(**values)


def _picture(kept: Mapping[str, Mapping[int, float]]) -> str:
    """A heat map of the shares by matrix and layer: a PNG in base64."""
    from matplotlib.figure import Figure

    rows = [list(by_layer.values()) for by_layer in kept.values()]
    figure = Figure(figsize=(2 + 0.45 * len(rows[0]), 1.5 + 0.4 * len(rows)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(rows, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    figure.colorbar(image, ax=axes)
    axes.set_yticks(range(len(rows)), list(kept))
    axes.set_xticks(range(len(rows[0])))
    axes.set_xlabel("layer of the base")
    written = BytesIO()
    figure.savefig(written, format="png", dpi=110)
    return base64.b64encode(written.getvalue()).decode()
