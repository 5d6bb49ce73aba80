"""Packs one archive with all that a GPU machine without vLLM and without a network needs.

    python benchmarks/device/pack.py .gpu        # then carry .gpu there, and: bash .gpu/run.sh

In it: vLLM's Python with the stand-ins for its compiled part, this project and what vLLM finds it
by, wheels of what is missing there (`there.txt` has what is not), golden answers, the measures. For
Python 3.12 with torch and Triton. Its size is printed; over 55 MiB it is refused.
"""

import argparse
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LARGEST = 55 * 2**20
OURS, THEIRS = "vllm-loopus", "vllm"
OF_PROJECT = ("vllm_loopus", "benchmarks", "configs", "pyproject.toml", "README.md", "LICENSE")
LEFT_OUT = ("__pycache__", ".ruff_cache", ".mypy_cache", ".pytest_cache")
# vLLM's names of its compiled parts, and what stands there instead.
COMPILED = {
    "_C_stable_libtorch.py": '"""In place of what is compiled."""\n\n'
    "from vllm._stand_ins.register import register\n\nregister()\n",
    "_moe_C_stable_libtorch.py": '"""In place of what is compiled: none of it is asked for."""\n',
}
# FlashAttention is compiled as well. vLLM asks its interface about versions, which needs no kernel.
FLASH = Path("vllm_flash_attn", "__init__.py")
FLASH_CHECK = "if not (FA2_AVAILABLE or FA3_AVAILABLE):"
MANYLINUX = (*range(39, 25, -1), 24, 17, 12, 5)


class Archive:
    """A tar file that counts what it holds by its first folder."""

    def __init__(self, file: Path) -> None:
        self._tar = tarfile.open(file, "w:gz", compresslevel=6)  # noqa: SIM115
        self.bytes: dict[str, int] = {}

    def add(self, source: Path, name: str) -> None:
        """A file or a folder, without what only this machine can use."""
        self._tar.add(source, name, filter=self._wanted)

    def write(self, name: str, text: bytes) -> None:
        entry = tarfile.TarInfo(name)
        entry.size = len(text)
        self._tar.addfile(self._counted(entry), io.BytesIO(text))

    def close(self) -> None:
        self._tar.close()

    def _wanted(self, entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        path = Path(entry.name)
        if path.suffix == ".so" or any(part in LEFT_OUT for part in path.parts):
            return None
        return self._counted(entry)

    def _counted(self, entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = "root"
        place = entry.name.split("/")[0]
        self.bytes[place] = self.bytes.get(place, 0) + entry.size
        return entry


def pack(out: Path, wheels: Path) -> dict[str, Any]:
    """Writes the archive, its hash and `run.sh` to `out`; what is in it. `wheels`: a folder of
    them, possibly empty.

    Raises `SystemExit` where something is missing, or the archive is too large.
    """
    out.mkdir(parents=True, exist_ok=True)
    file = out / "archive.tgz"
    archive = Archive(file)
    contents = {
        "commit": commit(),
        "packages": {name: version(name) for name in (OURS, THEIRS)},
        "wheels": sorted(path.name for path in wheels.glob("*.whl")),
    }
    add_vllm(archive)
    for name in OF_PROJECT:
        archive.add(ROOT / name, f"repository/{name}")
    for name, text in distribution():
        archive.write(f"repository/{name}", text)
    archive.add(golden(), "golden")
    for path in sorted(wheels.glob("*.whl")):
        archive.add(path, f"wheels/{path.name}")
    archive.write("contents.json", json.dumps(contents, indent=1).encode())
    archive.close()
    size = file.stat().st_size
    if size > LARGEST:
        file.unlink()
        raise SystemExit(f"the archive has {size / 2**20:.1f} MiB: 55 at most; nothing was kept")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    (out / "archive.sha256").write_text(f"{digest}  archive.tgz\n")
    shutil.copy(HERE / "run.sh", out)
    return {**contents, "bytes": size, "unpacked": archive.bytes}


def add_vllm(archive: Archive) -> None:
    """vLLM's Python, with stand-ins for what is compiled."""
    spec = find_spec(THEIRS)
    if spec is None or spec.origin is None:
        raise SystemExit("vLLM is not installed here: its Python code has to come along")
    folder = Path(spec.origin).parent
    interface = (folder / FLASH).read_text()
    if interface.count(FLASH_CHECK) != 1:
        raise SystemExit(f"{folder / FLASH} is not as expected: look for {FLASH_CHECK!r}")
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name) / THEIRS
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.so", *LEFT_OUT))
        (copy / FLASH).write_text(interface.replace(FLASH_CHECK, "if False:"))
        shutil.copytree(HERE / "stand_ins", copy / "_stand_ins")
        for module, text in COMPILED.items():
            (copy / module).write_text(text)
        archive.add(copy, f"vllm/{THEIRS}")
    number = version(THEIRS).split("+")[0]
    text = f"Metadata-Version: 2.1\nName: {THEIRS}\nVersion: {number}\n"
    archive.write(f"vllm/{THEIRS}-{number}.dist-info/METADATA", text.encode())


def distribution() -> Iterator[tuple[str, bytes]]:
    """The `dist-info` of this project, name and content: vLLM looks for plugins in entry points,
    which a folder of sources has not."""
    found = metadata.distribution(OURS)
    folder = f"{OURS.replace('-', '_')}-{found.version}.dist-info"
    for name in ("METADATA", "entry_points.txt"):
        text = found.read_text(name)
        if not text:
            raise SystemExit(f"{OURS} is installed without {name}: pip install -e .")
        yield f"{folder}/{name}", text.encode()


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        raise SystemExit(f"{package} is not installed here: make .venv") from None


def golden() -> Path:
    folder = ROOT.parent / "shared" / "golden"
    if not folder.is_dir():
        raise SystemExit(f"{folder} is missing: the golden answers have to come along")
    return folder


def commit() -> str:
    """Of the working tree, with a word where it has changes."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    return git("rev-parse", "HEAD") + (" with changes" if git("status", "--porcelain") else "")


def download(folder: Path, python: str) -> None:
    """The wheels of `wheels.txt` for a Python on x86-64 Linux.

    Raises `SystemExit` with what pip says where one is not to be had.
    """
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in MANYLINUX]
    platforms += ["manylinux2014_x86_64", "manylinux1_x86_64"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    command += [part for platform in platforms for part in ("--platform", platform)]
    command += ["--dest", str(folder), "--requirement", str(HERE / "wheels.txt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"pip download failed: {done.stderr.strip()[-1500:]}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="a folder, such as .gpu")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels, instead of downloading")
    parser.add_argument("--python", default="3.12", help="of the machine")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if given.wheels is None:
            download(Path(folder), given.python)
        packed = pack(given.out, given.wheels or Path(folder))
    parts = ", ".join(f"{name} {size / 2**20:.0f}" for name, size in packed["unpacked"].items())
    print(f"{given.out}: {packed['bytes'] / 2**20:.1f} MiB, unpacked (MiB): {parts}")
    print(f"there: bash {given.out.name}/run.sh, with {given.out.name} carried along")


if __name__ == "__main__":
    main()
