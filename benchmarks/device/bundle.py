"""What a machine without network needs, in pieces that a call can carry.

    python benchmarks/device/bundle.py pack OUT [--wheels FOLDER] [--piece MIB]
    python OUT/bundle.py unpack OUT TARGET        # there; checks every byte first

The pieces hold the package with what vLLM finds its plugin by, the benchmarks, the golden answers,
and the wheels given (vLLM and what it needs, where the machine has none). `OUT` holds this file
too.
"""

import argparse
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MANIFEST = "bundle.json"
PACKAGE = "vllm-loopus"
CONTENTS = ("vllm_loopus", "benchmarks", "tests", "pyproject.toml", "README.md", "LICENSE")
GOLDEN = Path("shared/golden")
LEFT_OUT = ("__pycache__", ".ruff_cache", ".mypy_cache", ".pytest_cache")


class Pieces(io.RawIOBase):
    """A file that goes on in the next one when it is full."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size
        self.written: list[dict] = []
        self._open = None
        self._hash, self._length = hashlib.sha256(), 0

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:
        rest = memoryview(data)
        while rest:
            if self._open is None:
                self._open = (self.folder / f"piece.{len(self.written):03}").open("wb")
                self._hash, self._length = hashlib.sha256(), 0
            part = rest[: self.size - self._length]
            self._open.write(part)
            self._hash.update(part)
            self._length += len(part)
            rest = rest[len(part) :]
            if self._length == self.size:
                self._end()
        return len(data)

    def _end(self) -> None:
        if self._open is not None:
            self._open.close()
            name = Path(self._open.name).name
            self.written.append(
                {"name": name, "bytes": self._length, "sha256": self._hash.hexdigest()}
            )
            self._open = None

    def close(self) -> None:
        self._end()
        super().close()


def pack(out: Path, wheels: "Path | None", piece: int) -> dict:
    """Writes pieces of at most `piece` MiB and their manifest. Raises `SystemExit` where something
    is missing."""
    golden = (ROOT / ".." / GOLDEN).resolve()
    golden = golden if golden.is_dir() else ROOT / GOLDEN
    if not golden.is_dir():
        raise SystemExit(f"{golden} is missing: the golden answers have to come along")
    if out.exists() and any(out.iterdir()):
        raise SystemExit(f"{out} is not empty")
    out.mkdir(parents=True, exist_ok=True)
    pieces = Pieces(out, piece * 2**20)
    with tarfile.open(fileobj=pieces, mode="w|gz") as archive:
        for name in CONTENTS:
            archive.add(ROOT / name, f"repository/{name}", filter=wanted)
        for name, text in distribution().items():
            entry = tarfile.TarInfo(f"repository/{name}")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text))
        archive.add(golden, f"{GOLDEN}", filter=wanted)
        for wheel in sorted(wheels.glob("*.whl")) if wheels else ():
            archive.add(wheel, f"wheels/{wheel.name}")
    pieces.close()
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    manifest = {"commit": commit, "pieces": pieces.written}
    (out / MANIFEST).write_text(json.dumps(manifest, indent=1))
    shutil.copy(__file__, out / "bundle.py")
    return manifest


def distribution() -> "dict[str, bytes]":
    """The `dist-info` of the installed package, by path: vLLM looks for plugins in entry points,
    which a folder of sources on `PYTHONPATH` has not. Raises `SystemExit` where it is missing."""
    try:
        found = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        raise SystemExit(f"{PACKAGE} is not installed here: pip install -e .") from None
    folder = f"{PACKAGE.replace('-', '_')}-{found.version}.dist-info"
    files = {}
    for name in ("METADATA", "entry_points.txt"):
        text = found.read_text(name)
        if not text:
            raise SystemExit(f"{PACKAGE} is installed without {name}: pip install -e .")
        files[f"{folder}/{name}"] = text.encode()
    return files


def wanted(entry: tarfile.TarInfo) -> "tarfile.TarInfo | None":
    return None if any(part in LEFT_OUT for part in Path(entry.name).parts) else entry


def unpack(source: Path, target: Path) -> None:
    """Checks the pieces and unpacks them. Raises `SystemExit` for a piece that is missing or other
    than it was."""
    manifest = json.loads((source / MANIFEST).read_text())
    for piece in manifest["pieces"]:
        path = source / piece["name"]
        if not path.is_file():
            raise SystemExit(f"{path} is missing: send it again")
        if hashlib.sha256(path.read_bytes()).hexdigest() != piece["sha256"]:
            raise SystemExit(f"{path} is damaged: send it again")
    whole = target / "bundle.tar.gz"
    target.mkdir(parents=True, exist_ok=True)
    with whole.open("wb") as joined:
        for piece in manifest["pieces"]:
            joined.write((source / piece["name"]).read_bytes())
    with tarfile.open(whole) as archive:
        archive.extractall(target, filter="data")
    whole.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack")
    packing.add_argument("out", type=Path)
    packing.add_argument("--wheels", type=Path, help="folder of wheels to take along")
    packing.add_argument("--piece", type=int, default=60, help="MiB a piece")
    unpacking = commands.add_parser("unpack")
    unpacking.add_argument("source", type=Path)
    unpacking.add_argument("target", type=Path)
    given = parser.parse_args()
    if given.command == "unpack":
        unpack(given.source, given.target)
        print(f"next: cd {given.target}/repository && python benchmarks/device/checks.py")
        return
    for piece in pack(given.out, given.wheels, given.piece)["pieces"]:
        print(f"{piece['name']}  {piece['bytes'] / 2**20:6.1f} MiB")


if __name__ == "__main__":
    sys.exit(main())
