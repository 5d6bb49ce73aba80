"""The trace as one HTML page that needs nothing but itself, not even a network."""

import base64
import hashlib
from collections.abc import Mapping
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from vllm_loopus.trace.tokens import visible

MOST_TRACES = 50  # a page of hundreds opens slowly


def render(document: Mapping[str, Any]) -> str:
    """The page of a trace's JSON.

    Texts of a model are data, never markup: the template escapes, the script sets text only, and
    the page's security policy lets no other script run and nothing be fetched.
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
    """How token texts are shown, for those that are not shown as they are."""
    texts = set()
    for trace in traces:
        for token in trace["tokens"]:
            texts.add(token["text"])
            texts.update(guess["text"] for depth in token["depths"] for guess in depth["top"])
    return {text: visible(text) for text in sorted(texts) if visible(text) != text}
