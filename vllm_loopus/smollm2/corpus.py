"""The text: documentation that the locked environment already has, so every machine has the same.

One document per module: its docstrings, without doctest lines; per topic of Python's language
reference; and per installed distribution: its long description. Sources and licences are counted in
`sources.json`. Documents are held out by a hash of their name, and a paragraph that occurs twice is
kept once, so that no paragraph is in both parts.
"""

import ast
import hashlib
import json
import random
import re
import sysconfig
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message
from email.parser import Parser
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from vllm_loopus.recast.output import complete_folder

# Packages of the locked environment whose documentation is prose, not only signatures.
PACKAGES = ("numpy", "networkx", "matplotlib", "nltk", "scipy", "pandas", "sympy")
HELD_OUT = 12  # one in so many documents is held out
SHORTEST, LONGEST = 400, 2000  # characters of a row: a document, or some of its paragraphs
DOCSTRING = 200  # characters of a docstring
DOCTEST = re.compile(r"^\s*(>>>|\.\.\. ).*$")
LINE = re.compile(r"^\s*[-=~^*#]{3,}\s*$")


@dataclass(frozen=True)
class Document:
    name: str
    source: str
    licence: str
    text: str


def documents(packages: tuple[str, ...] = PACKAGES) -> Iterator[Document]:
    """All documents, in the same order on every machine with the same environment."""
    python = "PSF-2.0"
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield Document(f"topics/{name}", "Python reference", python, text)
    library = Path(sysconfig.get_paths()["stdlib"])
    yield from _modules(library, "Python standard library", python)
    for name in packages:
        spec = find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            licence = _licence(_about(metadata.distribution(_distribution(name))))
            yield from _modules(Path(spec.submodule_search_locations[0]), name, licence)
    for found in sorted(metadata.distributions(), key=lambda d: d.metadata["Name"].lower()):
        about = _about(found)
        text = about.get("Description") or str(about.get_payload())
        yield Document(f"readme/{about['Name']}", "README files", _licence(about), text)


def _modules(folder: Path, source: str, licence: str) -> Iterator[Document]:
    for file in sorted(folder.rglob("*.py")):
        parts = file.relative_to(folder).parts
        if {"test", "tests", "testing", "site-packages", "idlelib", "lib2to3"} & set(parts):
            continue
        try:
            tree = ast.parse(file.read_text())
        except (SyntaxError, ValueError, OSError):
            continue
        texts = [
            f"{getattr(node, 'name', file.stem)}: {text}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and (text := ast.get_docstring(node))
            and len(text) >= DOCSTRING
        ]
        if texts:
            yield Document(f"{source}/{'/'.join(parts)}", source, licence, "\n\n".join(texts))


def _distribution(module: str) -> str:
    return metadata.packages_distributions()[module][0]


def _about(distribution: metadata.Distribution) -> Message:
    return Parser().parsestr(distribution.read_text("METADATA") or "")


def _licence(about: Message) -> str:
    stated = about.get("License-Expression") or about.get("License") or ""
    if len(stated) > 60 or not stated:
        classifiers = about.get_all("Classifier") or []
        named = [line.rpartition(" :: ")[2] for line in classifiers if line.startswith("License")]
        stated = named[0] if named else "see its distribution"
    return stated.replace("\n", " ")


def prose(text: str) -> str:
    """Without doctests, rulers and blank lines in a row."""
    lines = [line for line in text.splitlines() if not DOCTEST.match(line) and not LINE.match(line)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def pieces(paragraphs: list[str]) -> Iterator[str]:
    """Runs of whole paragraphs of about `LONGEST` characters at most."""
    waiting = ""
    for paragraph in paragraphs:
        if waiting and len(waiting) + len(paragraph) > LONGEST:
            yield waiting
            waiting = ""
        waiting = f"{waiting}\n\n{paragraph}".strip("\n")
    yield waiting


def is_held_out(name: str) -> bool:
    """Whether the document with this name is held out."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT == 0


def write(out: Path, packages: tuple[str, ...] = PACKAGES) -> dict[str, dict[str, object]]:
    """Writes `train.jsonl`, `held-out.jsonl` and `sources.json` to the folder `out`, atomically.

    Returns what `sources.json` has: by source, its licences, documents and characters.
    """
    sources: dict[str, dict[str, object]] = {}
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])  # both parts, characters
    licences: dict[str, set[str]] = defaultdict(set)
    seen: set[bytes] = set()
    rows: dict[bool, list[str]] = {True: [], False: []}
    # Held-out documents first, so that it is the other part that loses what both have.
    for document in sorted(documents(packages), key=lambda d: not is_held_out(d.name)):
        paragraphs = []
        for paragraph in prose(document.text).split("\n\n"):
            key = hashlib.sha256(" ".join(paragraph.split()).encode()).digest()
            if key not in seen:
                seen.add(key)
                paragraphs.append(paragraph)
        held_out = is_held_out(document.name)
        found = [text for text in pieces(paragraphs) if len(text) >= SHORTEST]
        for text in found:
            row = {"text": text, "name": document.name, "source": document.source}
            rows[held_out].append(json.dumps(row))
        if found:
            counts[document.source][held_out] += 1
            counts[document.source][2] += sum(map(len, found))
            licences[document.source].add(document.licence)
    for source, (train, apart, characters) in counts.items():
        sources[source] = {
            "licences": sorted(licences[source]),
            "documents": train,
            "held_out_documents": apart,
            "characters": characters,
        }
    for part in rows.values():  # the first rows, which are evaluated, come from all sources
        random.Random(0).shuffle(part)
    with complete_folder(out) as folder:
        (folder / "train.jsonl").write_text("\n".join(rows[False]) + "\n")
        (folder / "held-out.jsonl").write_text("\n".join(rows[True]) + "\n")
        (folder / "sources.json").write_text(json.dumps(sources, indent=1))
    return sources
