"""The families that share `model_type: "huginn_raven"`, told apart by the tensors of a checkpoint.

The config does not name the base model of a retrofit; the original has another file of remote code
for each. The names of a block's tensors tell them apart, and `rope_theta` confirms it.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import get_safetensors_metadata, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError
from safetensors import SafetensorError, safe_open

PARTS = ("prelude", "core_block", "coda")
EVERY_BLOCK = ("attn.Wqkv.weight", "attn.proj.weight", "mlp.fc.weight", "mlp.proj.weight")


@dataclass(frozen=True)
class Family:
    """What differs between the families.

    - `norms`: of a block. `placed`: `sum`, after a residual sum; `input`, before a branch;
      `output`, on the output of a branch.
    - `interleaved`: rotation of pairs (2j, 2j + 1), by `rope_base`; otherwise of (j, j + d/2), by
      `rope_theta`.
    - `norms_qk`: RMSNorm over the whole query and the whole key, before they are cut into heads.
    - `norms_state`: the final norm also comes before the coda.
    """

    name: str
    title: str
    norms: int
    placed: str
    interleaved: bool = False
    norms_qk: bool = False
    norms_state: bool = False

    def block(self, qk_bias: bool) -> set[str]:
        """The names of a block's tensors."""
        names = {*EVERY_BLOCK, *(f"norm_{i}.weight" for i in range(1, self.norms + 1))}
        if self.norms_qk:
            names |= {"attn.q_norm.weight", "attn.k_norm.weight"}
        return names | ({"attn.qk_bias"} if qk_bias else set())


HUGINN = Family("huginn", "Huginn", 4, "sum", interleaved=True, norms_state=True)
LLAMA = Family("llama", "retrofitted recurrence, Llama layout", 2, "input")
OLMO2 = Family("olmo2", "retrofitted recurrence, OLMo-2 layout", 2, "output", norms_qk=True)
FAMILIES = {family.name: family for family in (HUGINN, LLAMA, OLMO2)}


def family_of(names: Iterable[str], qk_bias: bool, rope_theta: float | None, source: str) -> Family:
    """The family of a checkpoint with tensors `names`.

    Without names, what `rope_theta` alone tells: Huginn, or the Llama layout. Raises `ValueError`
    if tensors or config fit no family.
    """
    blocks: dict[str, set[str]] = {}
    for name in names:
        if found := re.match(rf"transformer\.(?:{'|'.join(PARTS)})\.\d+\.", name):
            blocks.setdefault(found.group()[:-1], set()).add(name[found.end() :])
    if not blocks:
        if any(True for _ in names):
            raise ValueError(
                f"{source} is no checkpoint of model_type='huginn_raven': it has no tensors "
                f"'transformer.{PARTS[1]}.N...'; correct model_type or give another checkpoint"
            )
        return HUGINN if rope_theta is None else LLAMA
    place, block = next(iter(sorted(blocks.items())))
    for family in FAMILIES.values():
        if block == family.block(qk_bias):
            break
    else:
        known = "; ".join(
            f"{family.title}: {_listed(family.block(qk_bias))}" for family in FAMILIES.values()
        )
        raise ValueError(
            f"the tensors of {source} fit no family of model_type='huginn_raven' with "
            f"qk_bias={qk_bias}. Block '{place}' has {_listed(block)}; there are {known}. Give a "
            "checkpoint of one of them, or the config.json that belongs to it"
        )
    if family.interleaved == (rope_theta is not None):
        needed = "has none" if family.interleaved else "needs one"
        raise ValueError(
            f"rope_theta={rope_theta} does not fit the tensors of {source}, which are those of "
            f"{family.title}: that {needed}; give the config.json that belongs to them"
        )
    return family


def tensor_names(source: str, revision: str | None = None) -> list[str]:
    """The names of the tensors of a checkpoint, a folder or a repository of the hub; none if they
    cannot be had without reading the weights."""
    folder = Path(source)
    if folder.is_dir():
        return _names_in(folder)
    try:
        kept = snapshot_download(
            source,
            revision=revision,
            allow_patterns=["*.safetensors", "*.safetensors.index.json"],
            local_files_only=True,
        )
        if names := _names_in(Path(kept)):
            return names
    except (HfHubHTTPError, OSError, ValueError):  # nothing of it is here yet
        pass
    try:
        return list(get_safetensors_metadata(source, revision=revision).weight_map)
    except (NotASafetensorsRepoError, HfHubHTTPError, OSError, ValueError):
        return []


def _names_in(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return list(json.loads(index.read_text())["weight_map"])
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    names: list[str] = []
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                names += tensors.keys()
        except (SafetensorError, OSError):  # it is reported when it is loaded
            return []
    return names


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
