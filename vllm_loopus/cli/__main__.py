"""`python -m vllm_loopus.cli`: for launchers that start modules."""

from vllm_loopus.cli.main import app

app()
