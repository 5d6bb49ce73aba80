"""The vLLM side: looped models over paged attention, with K/V planes by recursion depth.

The path of a request: `frontend` (HTTP, checks of knobs) -> `core` (scheduler, blocks) ->
`messages` -> `runners` (adapters of vLLM's model runners) -> `worker` (running sequences, their
memory, the computation) with `step` (the logic of a step, in plain Python) and `model` (the parts
of a model, K/V planes) -> back through `messages` to `core` and `frontend`. `hooks` registers all
of it with vLLM. `knobs` has the options of users, `compat` the differences between vLLM releases.
"""
