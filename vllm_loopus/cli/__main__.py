"""`python -m vllm_loopus.cli`: for launchers that start modules."""

from vllm_loopus.cli.entry import main

main()
