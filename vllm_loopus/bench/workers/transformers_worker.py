"""The transformers side: the reference model, uncached; a cached loop over it; the base model.

python -m vllm_loopus.bench.workers.transformers_worker     # JSON lines, see channel.py
"""

import time
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from vllm_loopus.bench.cached_loop import generate_cached
from vllm_loopus.bench.workers.channel import serve
from vllm_loopus.modeling.model import LoopUSForCausalLM
from vllm_loopus.trace.exits import exits
from vllm_loopus.trace.reference import depth_values

LEAST_MARGIN = 1e-4  # of the best logit and of the halting rule: closer ones may go either way


class Reference:
    """A LoopUS checkpoint, or a plain config with made-up weights."""

    def __init__(self) -> None:
        self._model: Any = None

    def start(self, model: str, dtype: str, device: str, made_up: bool = False) -> Any:
        precision = getattr(torch, dtype)
        if made_up:
            config = transformers.AutoConfig.from_pretrained(model)
            self._model = AutoModelForCausalLM.from_config(config, dtype=precision)
        else:
            self._model = LoopUSForCausalLM.from_pretrained(model, dtype=precision)
        self._model = self._model.to(device).eval()
        return {"transformers": transformers.__version__, "threads": torch.get_num_threads()}

    def cached(
        self,
        prompts: list[list[int]],
        tokens: list[int],
        threshold: float | None = None,
    ) -> Any:
        """One padded batch through the loop with caches; no threshold: to the full depth."""
        if threshold is not None:
            self._model.config.exit_threshold = threshold
        return generate_cached(self._model, prompts, tokens, fixed=threshold is None)

    @torch.inference_mode()
    def uncached(self, prompt: list[int], tokens: int, counted: int = 0) -> Any:
        """One sequence to the full depth, computed anew for every token. `counted`: of its tokens,
        the last ones whose seconds are wanted, the others being made up; 0 for all."""
        made_up = tokens - counted if counted else 0
        ids = torch.tensor([prompt + [prompt[-1]] * made_up], device=self._model.device)
        self._model.config.min_loops = self._model.config.max_loops
        seconds = []
        for _ in range(tokens - made_up):
            started = time.perf_counter()
            found = self._model(ids, logits_to_keep=1).logits[:, -1].argmax(-1)
            ids = torch.cat([ids, found[:, None]], dim=1)
            found.tolist()
            seconds.append(time.perf_counter() - started)
        self._model.config.min_loops = 1
        return {"seconds": seconds}

    @torch.inference_mode()
    def base(self, prompts: list[list[int]], tokens: int) -> Any:
        """The base model's own cached generation; prompts of one length."""
        ids = torch.tensor(prompts, device=self._model.device)
        started = time.perf_counter()
        result = self._model.generate(
            ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, use_cache=True
        )
        result.tolist()
        return {"seconds": time.perf_counter() - started}

    def verify(self, prompt: list[int], answer: list[int], threshold: float) -> Any:
        """How many tokens of an answer are what the uncached model says after the tokens before."""
        self._model.config.exit_threshold = threshold
        values = depth_values(self._model, prompt, answer, top=1)
        found = exits(self._model.exit_rule, values.by_name)
        at = (torch.tensor(found.depths) - 1, torch.arange(len(answer)))
        same = values.top_ids[..., 0][at] == torch.tensor(answer)
        margins = torch.tensor(found.margins)
        sure = (values.logit_gap[at] > LEAST_MARGIN) & (margins > LEAST_MARGIN)
        return {
            "tokens": len(answer),
            "same": int(same.sum()),
            "different_and_sure": int((~same & sure).sum()),
            "exit_depths": found.depths,
        }


def main() -> None:
    side = Reference()
    commands = (side.start, side.cached, side.uncached, side.base, side.verify)
    serve({command.__name__: command for command in commands})


if __name__ == "__main__":
    main()
