"""The original implementation, from a checkout of it, in an environment of its own.

    PYTHON vllm_loopus/bench/workers/original_worker.py CHECKOUT     # JSON lines, see channel.py

Needs what the checkout needs (transformers of its time, torch, safetensors) and nothing of ours.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from channel import serve  # type: ignore[import-not-found]  # run by path: beside this file
from safetensors.torch import load_file


class Original:
    """Its model class with a checkpoint in the released format."""

    def __init__(self, checkout: str) -> None:
        sys.path.insert(0, checkout)
        self._model: Any = None

    def start(self, model: str, dtype: str, device: str) -> Any:
        from models import (  # type: ignore[import-not-found]  # the checkout's
            LDSConfig,
            LDSForCausalLM,
        )

        folder = Path(model)
        # Not `from_pretrained`: it asks the hub for a default base and needs a tokenizer.
        fields = json.loads((folder / "config.json").read_text())
        fields.pop("model_type", None)
        built = LDSForCausalLM(LDSConfig(**fields))
        built.load_state_dict(load_file(folder / "model.safetensors"))
        self._model = built.to(device=device, dtype=getattr(torch, dtype)).eval()
        return {"transformers": transformers.__version__, "threads": torch.get_num_threads()}

    @torch.inference_mode()
    def cached(self, prompts: list[list[int]], tokens: list[int], threshold: float) -> Any:
        """Its own `generate` over one padded batch; as many tokens as the longest answer."""
        model = self._model
        model.q_threshold = threshold
        width = max(map(len, prompts))
        padded = [[0] * (width - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        model.set_runtime_stats_enabled(True)
        model.reset_runtime_stats()
        started = time.perf_counter()
        rows = model.generate(
            torch.tensor(padded, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            max_new_tokens=max(tokens),
            do_sample=False,
            repetition_penalty=1.0,
        ).tolist()
        seconds = time.perf_counter() - started
        answers = [row[width : width + count] for row, count in zip(rows, tokens, strict=True)]
        steps = model.get_runtime_stats()["avg_reasoning_steps"]
        return {"seconds": seconds, "answers": answers, "mean_depth": steps}

    @torch.inference_mode()
    def verify(self, prompt: list[int], answer: list[int], threshold: float) -> Any:
        """How many tokens of an answer its uncached forward says after the tokens before."""
        self._model.q_threshold = threshold
        same = 0
        for end, token in enumerate(answer, len(prompt)):
            ids = torch.tensor([(prompt + answer)[:end]], device=self._model.device)
            logits = self._model(input_ids=ids, use_cache=False).logits
            same += int(logits[0, -1].argmax()) == token
        return {"tokens": len(answer), "same": same}


def main() -> None:
    original = Original(sys.argv[1])
    commands = (original.start, original.cached, original.verify)
    serve({command.__name__: command for command in commands})


if __name__ == "__main__":
    main()
