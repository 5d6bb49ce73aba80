"""Writes the table of the installed vLLM."""

from tests.serving.upstream import FOLDER, table, version

lines = [f"{symbol} {signature}" for symbol, signature in table().items()]
(FOLDER / f"{version()}.txt").write_text("\n".join(lines) + "\n")
