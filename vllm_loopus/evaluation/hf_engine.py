"""The `hf` model type of lm-evaluation-harness on the reference model.

lm-eval's `hf` type removes the last token and pads without a mask. This has no effect at a fixed
depth, but with early exit other tokens would determine the exit depth. So `TransformersModel`
scores the whole text.
"""

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from vllm_loopus.evaluation.models import Setting
from vllm_loopus.evaluation.work import Work


class TransformersModel(HFLM):
    """lm-eval's `hf` on the reference model. A text has the exit depth of its last token."""

    overrides: dict[str, Any]  # fields of the model's config

    def apply(self, setting: Setting) -> None:
        """Applies a setting to all later requests."""
        self.model.config.update(self.overrides | setting.knobs())

    def work(self) -> Work:
        """Empty: this engine does not count its work."""
        return Work()

    def close(self) -> None:
        """Nothing to do: there is no other process."""

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """For each (key, context, continuation): log-likelihood, and whether it is greedy.

        Texts of more than `max_length + 1` tokens are truncated at their start, as in lm-eval.
        """
        scores: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        size = override_bs or int(self.batch_size)
        order = sorted(
            range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2])
        )
        starts = range(0, len(order), size)
        for start in tqdm(starts, desc="Scoring texts", disable=disable_tqdm):
            chosen = order[start : start + size]
            texts = [[*requests[i][1], *requests[i][2]][-(self.max_length + 1) :] for i in chosen]
            for index, text, logits in zip(chosen, texts, self._logits(texts), strict=True):
                length = min(len(requests[index][2]), len(text) - 1)
                predicted = logits[len(text) - 1 - length : len(text) - 1].float().log_softmax(-1)
                wanted = torch.tensor(text[-length:], device=predicted.device)
                found = predicted.gather(-1, wanted[:, None]).sum().item()
                scores[index] = found, bool((predicted.argmax(-1) == wanted).all())
                key = requests[index][0]
                if key is not None:  # requests of rolling windows have no key
                    self.cache_hook.add_partial("loglikelihood", key, scores[index])
        return scores

    @torch.inference_mode()
    def _logits(self, texts: Sequence[list[int]]) -> torch.Tensor:
        """Logits [B, T, V] of texts as token ids, padded on the right."""
        ids = pad_sequence([torch.tensor(text) for text in texts], batch_first=True)
        mask = pad_sequence(
            [torch.ones(len(text), dtype=torch.long) for text in texts], batch_first=True
        )
        device = self.device
        return self.model(ids.to(device), attention_mask=mask.to(device)).logits
