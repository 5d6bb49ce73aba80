"""`vllm-loopus batch`: a file of requests answered on Ray Data LLM.

`rows` reads and checks the input, `journal` keeps what is done, `answers` says what a row of the
output holds, `pipeline` is the work on Ray, `run` puts them together. Nothing is sent to Ray before
every row was checked.
"""

from vllm_loopus.extras import need

need("vllm-loopus batch", "ray", "pydantic", "ray")
