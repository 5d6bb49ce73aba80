"""`python -m vllm_loopus.cli`, for launchers that need a module."""

from vllm_loopus.cli.entry import main

main()
