"""How good a looped model is: lm-evaluation-harness on our engine, base against looped."""

from vllm_loopus.extras import need

need("vllm-loopus eval", "eval", "datasets", "lm_eval", "tqdm")
