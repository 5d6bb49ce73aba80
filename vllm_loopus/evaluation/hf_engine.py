"""lm-evaluation-harness's `hf` model type on the reference model.

lm-eval's `hf` type cuts the last token off and pads without a mask. That changes nothing at a fixed
depth, but lets other tokens decide about early exit: `TransformersModel` scores the whole text
instead.
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
    """lm-eval's `hf` on the reference model: a text's depth is that of its last token."""

    overrides: dict[str, Any]  # of the model's config

    def apply(self, setting: Setting) -> None:
        """What follows is asked at this depth."""
        self.model.config.update(self.overrides | setting.knobs())

    def work(self) -> Work:
        """Nothing is counted here."""
        return Work()

    def close(self) -> None:
        """Nothing runs beside it."""

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """For each (key, context, continuation): log-likelihood, and whether it is the greedy one.

        Texts above `max_length + 1` tokens lose their beginning, as in lm-eval.
        """
        scores: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        size = override_bs or int(self.batch_size)
        order = sorted(
            range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2])
        )
        starts = range(0, len(order), size)
        for start in tqdm(starts, desc="Scoring texts", disable=disable_tqdm):
            chosen = order[start : start + size]
            rows = [[*requests[i][1], *requests[i][2]][-(self.max_length + 1) :] for i in chosen]
            for index, row, logits in zip(chosen, rows, self._logits(rows), strict=True):
                length = min(len(requests[index][2]), len(row) - 1)
                predicted = logits[len(row) - 1 - length : len(row) - 1].float().log_softmax(-1)
                wanted = torch.tensor(row[-length:], device=predicted.device)
                found = predicted.gather(-1, wanted[:, None]).sum().item()
                scores[index] = found, bool((predicted.argmax(-1) == wanted).all())
                key = requests[index][0]
                if key is not None:  # rolling windows have none
                    self.cache_hook.add_partial("loglikelihood", key, scores[index])
        return scores

    @torch.inference_mode()
    def _logits(self, rows: Sequence[list[int]]) -> torch.Tensor:
        """Logits [B, T, V] of token ids, padded on the right."""
        ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        mask = pad_sequence(
            [torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True
        )
        device = self.device
        return self.model(ids.to(device), attention_mask=mask.to(device)).logits
