"""The vLLM side: looped models over paged attention, with K/V planes by recursion depth.

A request on its way to its token: `frontend` (HTTP, knobs checked) -> `core` (scheduler, blocks) ->
`messages` -> `runners` (vLLM's model runners) -> `worker` (running sequences, their memory, the
computing) with `step` (what a step does, in plain Python) and `model` (the parts of a model, planes
of K/V) -> back through `messages` to `core` and `frontend`. `hooks` tells vLLM about all of it.
`knobs` is what a user may set, `compat` what differs between vLLM releases.
"""
