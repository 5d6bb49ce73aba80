"""Generation as the released code does it: K/V caches by depth, and a loop that stops with a batch.

A stand-in for it where it cannot be had, over the reference model's layers: all rows of a padded
batch go as deep as the deepest; a depth that the batch did not reach has no K/V for that token.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

from vllm_loopus.modeling.exit_rule import ExitTracker
from vllm_loopus.modeling.halting import HaltingRule
from vllm_loopus.modeling.layers import LayerRun, Positions
from vllm_loopus.modeling.model import LoopUSForCausalLM, LoopUSPass


class CachedLoop:
    """A batch of sequences, padded on the left, that grows by a token at a time."""

    def __init__(self, model: LoopUSForCausalLM, prompts: Sequence[Sequence[int]]) -> None:
        width = max(map(len, prompts))
        padded = [[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        valid = [[False] * (width - len(prompt)) + [True] * len(prompt) for prompt in prompts]
        self._model = model
        self._device = model.device
        self._valid = torch.tensor(valid, device=self._device)
        self._next = torch.tensor(padded, device=self._device)
        self._rule = HaltingRule.from_config(model.config)
        depths = range(model.config.max_loops + 1)  # 0: the encoder's
        self._caches = [DynamicCache() for _ in depths]
        self._columns: list[list[int]] = [[] for _ in depths]  # positions that a cache holds
        self._decoder = DynamicCache()

    @torch.inference_mode()
    def step(self, *, fixed: bool) -> tuple[torch.Tensor, int]:
        """The next tokens [B], and the depth that all of them went to; `fixed`: the full one."""
        model = self._model
        end = self._valid.shape[1]
        start = end - self._next.shape[1]
        ids = (self._valid.long().cumsum(-1) - 1).clamp(min=0)[:, start:]
        embedded = model.get_input_embeddings()(self._next)
        state = self._run(model.encoder, embedded, ids, 0, start)
        exits = ExitTracker(self._rule, len(self._next), self._device)
        chosen, depth = state, 0
        for depth in range(1, model.config.max_loops + 1):
            update = self._run(model.reasoning, state, ids, depth, start)
            one = LoopUSPass(depth, state, model.reasoning.gate(update, state), update)
            state = one.state
            halting_inputs = model.halting_inputs(one, (slice(None), -1))
            now = exits.update(depth, self._rule.evidence(halting_inputs))
            chosen = torch.where(now[:, None, None], state, chosen)
            if not exits.running.any() and not fixed:
                break
        if fixed:
            chosen = state
        hidden = self._layers(model.decoder, chosen, ids, range(end), start, self._decoder)
        tokens = model.decoder.logits(model.decoder.norm(hidden)[:, -1:])[:, -1].argmax(-1)
        self._next = tokens[:, None]
        self._valid = torch.cat([self._valid, torch.ones_like(self._valid[:, :1])], dim=1)
        return tokens, depth

    def _run(
        self, block: LayerRun, hidden: torch.Tensor, ids: torch.Tensor, depth: int, start: int
    ) -> torch.Tensor:
        columns = self._columns[depth]
        columns += range(start, start + hidden.shape[1])
        return self._layers(block, hidden, ids, columns, start, self._caches[depth])

    def _layers(
        self,
        block: LayerRun,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        columns: Sequence[int],
        start: int,
        cache: Any,
    ) -> torch.Tensor:
        """`hidden` [B, T, H] at positions from `start` on, attending to the positions `columns`."""
        keys = torch.tensor(columns, device=self._device)
        queries = torch.arange(start, start + hidden.shape[1], device=self._device)
        seen = (keys <= queries[:, None]) & self._valid[:, None, keys]
        seen = seen | (keys == queries[:, None])  # padding sees itself: no row is NaN
        kinds = set(block.attention_types)
        rotary = self._model.rotary_emb(hidden, ids)
        positions = Positions(
            ids, dict.fromkeys(kinds, rotary), dict.fromkeys(kinds, seen[:, None])
        )
        for layer, kind in zip(block.layers, block.attention_types, strict=True):
            hidden = layer(
                hidden,
                attention_mask=positions.masks[kind],
                position_ids=ids,
                position_embeddings=positions.rotary[kind],
                past_key_values=cache,
                use_cache=True,
            )
        return hidden


def generate_cached(
    model: LoopUSForCausalLM,
    prompts: Sequence[Sequence[int]],
    tokens: Sequence[int],
    *,
    fixed: bool,
) -> dict[str, Any]:
    """Greedy answers of `tokens` tokens each, in one batch that runs as long as its longest.

    `seconds`: of each step; `depths`: that the batch went to.
    """
    loop = CachedLoop(model, prompts)
    steps, seconds, depths = [], [], []
    for _ in range(max(tokens)):
        started = time.perf_counter()
        found, depth = loop.step(fixed=fixed)
        steps.append(found.tolist())
        seconds.append(time.perf_counter() - started)
        depths.append(depth)
    answers = [[step[row] for step in steps[:count]] for row, count in enumerate(tokens)]
    return {"seconds": seconds, "depths": depths, "answers": answers}
