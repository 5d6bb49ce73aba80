"""The `vllm-loopus` command: one file a subcommand."""
