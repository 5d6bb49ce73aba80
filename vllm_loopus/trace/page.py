"""The trace as a self-contained HTML page that works without a network."""

import base64
import hashlib
from collections.abc import Mapping
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from vllm_loopus.trace.tokens import visible

MOST_TRACES = 50  # pages with more open slowly


def render(document: Mapping[str, Any]) -> str:
    """The HTML page of a JSON trace.

    Texts of a model are never markup: the template escapes them, and the script only sets text
    content. The content security policy forbids other scripts and any network access.
    """
    folder = resources.files("vllm_loopus.trace") / "templates"
    script = (folder / "trace.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(
        loader=PackageLoader("vllm_loopus.trace"), undefined=StrictUndefined, autoescape=True
    )
    traces = document["traces"]
    shown = {**document, "traces": traces[:MOST_TRACES]}
    return environment.get_template("trace.html.j2").render(
        document=shown,
        left_out=max(0, len(traces) - MOST_TRACES),
        texts=_texts(shown["traces"]),
        style=(folder / "trace.css").read_text(),
        script=script,
        policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
    )


def _texts(traces: list[Mapping[str, Any]]) -> dict[str, str]:
    """The displayed form of the token texts that are not displayed unchanged."""
    texts = set()
    for trace in traces:
        for token in trace["tokens"]:
            texts.add(token["text"])
            texts.update(guess["text"] for depth in token["depths"] for guess in depth["top"])
    return {text: visible(text) for text in sorted(texts) if visible(text) != text}
