"""The `vllm-loopus` command, with one module for each subcommand."""
