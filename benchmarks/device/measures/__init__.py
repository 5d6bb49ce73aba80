"""One program a measure. Each takes `--results FILE` and `--name NAME` and adds lines to the file.

It exits with 0 where what must hold does hold. `--tiny` is for a CPU: the same code with the
smallest model, in seconds. What is measured then means nothing.
"""
