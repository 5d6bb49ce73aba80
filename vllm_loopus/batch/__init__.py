"""`vllm-loopus batch`: answers a file of requests with Ray Data LLM.

`rows` reads and checks the input, `journal` stores finished answers, `answers` builds the rows of
the output, `pipeline` runs the requests on Ray with the `stages` around the engine, and `run`
combines them. All rows are checked before anything is sent to Ray.
"""

from vllm_loopus.extras import need

need("vllm-loopus batch", "ray", "pydantic", "ray")
