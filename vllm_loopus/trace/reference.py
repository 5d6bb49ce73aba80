"""The predictions and other values at every depth, computed with the reference model.

One uncached run of prompt and answer to full depth gives all of them. Attention is causal, so the
state of position t at depth r and the logits `D(h^r_{1..t})_t`, with all positions at that depth,
do not depend on later positions or on exit depths of other tokens. By definition, these are the
states that the reference model decodes (`modeling/model.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from vllm_loopus.architectures import LoopedConfig
from vllm_loopus.modeling.looped_model import LoopedReference
from vllm_loopus.trace.tokens import Vocabulary

LOGITS_AT_ONCE = 2**26  # maximum number of logits computed at a time; 256 MiB in float32
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class DepthValues:
    """Values of n tokens at depths 1..N, in float32 on the CPU. N is the first dimension.

    `h`: the state of the position from which the token is predicted. `p`: the distribution over
    next tokens that the decoder gives for it.
    """

    states: torch.Tensor  # [N + 1, n, H]: h^0 .. h^N
    by_name: dict[str, torch.Tensor]  # [N, n]: `LoopedReference.traced_values`
    distance_to_last: torch.Tensor  # [N, n]: ||h^r - h^N||_2
    kl_to_last: torch.Tensor  # [N, n]: KL(p^N || p^r) in nats
    probability: torch.Tensor  # [N, n]: of the answer's token
    top_ids: torch.Tensor  # [N, n, k], most probable first
    top_probabilities: torch.Tensor  # [N, n, k]
    logit_gap: torch.Tensor  # [N, n]: difference of the two largest logits


def load_model(source: str, config: LoopedConfig, dtype: str, device: str) -> LoopedReference:
    """Loads the reference model of a checkpoint.

    Raises `ValueError` for an invalid device or dtype, `ValueError` or `OSError` for bad weights.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
    try:
        place = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={device!r} cannot be used: {reason}") from error
    model = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=getattr(torch, dtype))
    return model.to(place).eval()


def load_vocabulary(source: str, config: LoopedConfig, tokenizer: str | None) -> Vocabulary:
    """The vocabulary with `tokenizer` if given, else with that of the checkpoint or its base model.

    The vocabulary may have no tokenizer. Raises `ValueError` if `tokenizer` cannot be loaded.
    """
    for name in [tokenizer] if tokenizer else [source, config.base_model_name_or_path]:
        try:
            loaded = AutoTokenizer.from_pretrained(name) if name else None
        except Exception as error:  # transformers raises many types
            if tokenizer:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise ValueError(f"tokenizer={tokenizer!r} cannot be loaded: {reason}") from error
            continue
        if loaded is not None:
            return Vocabulary(loaded, config.vocab_size, source)
    return Vocabulary(None, config.vocab_size, source)


def stop_tokens(model: LoopedReference, vocabulary: Vocabulary) -> list[int]:
    """The end tokens of an answer: those of generation config, base config and tokenizer."""
    found = [
        getattr(model.generation_config, "eos_token_id", None),
        model.config.get_text_config().eos_token_id,
        getattr(vocabulary.tokenizer, "eos_token_id", None),
    ]
    ids = {i for ids in found for i in (ids if isinstance(ids, list | tuple) else [ids])}
    return sorted(i for i in ids if i is not None)


@torch.no_grad()
def generate(
    model: LoopedReference,
    prompt: Sequence[int],
    max_tokens: int,
    stops: Sequence[int],
    said: Callable[[int], None] | None = None,
) -> list[int]:
    """Generates greedily with transformers. Returns the token ids, including a stop token.

    `said`: called with the number of tokens so far, after each.
    """
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_tokens,
        eos_token_id=list(stops) or None,
        pad_token_id=stops[0] if stops else None,
    )
    ids = torch.tensor([list(prompt)], device=model.device)
    own = model.generation_config
    model.generation_config = greedy  # else its fields would override unset ones of `greedy`
    try:
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=greedy,
            streamer=None if said is None else _Said(said),
        )
    finally:
        model.generation_config = own
    return list(output[0, len(prompt) :].tolist())


class _Said(BaseStreamer):
    """Counts generated tokens; the first call has the prompt."""

    def __init__(self, said: Callable[[int], None]) -> None:
        self.said, self.count = said, -1

    def put(self, value: torch.Tensor) -> None:
        self.count += 1
        if self.count:
            self.said(self.count)

    def end(self) -> None:
        """Nothing to do."""


@torch.no_grad()
def depth_values(
    model: LoopedReference, prompt: Sequence[int], answer: Sequence[int], top: int = 5
) -> DepthValues:
    """The values of the answer's tokens at all depths up to `max_loops`."""
    sequence = torch.tensor([[*prompt, *answer[:-1]]], device=model.device)
    predicting = slice(len(prompt) - 1, None)  # a token is predicted from the position before it
    embedded = model.embed(sequence)
    positions = model.positions(embedded)
    states: list[torch.Tensor] = []
    decoded, found = [], []
    for loop_pass in model.loop(embedded, positions):
        states += [] if states else [loop_pass.before[0, predicting]]
        states.append(loop_pass.state[0, predicting])
        found.append(model.traced_values(loop_pass, positions, (0, predicting)))
        decoded.append(model.decode_hidden(loop_pass.state, positions)[0, predicting])
    all_states = torch.stack(states).float()
    return DepthValues(
        states=all_states.cpu(),
        by_name={name: torch.stack([one[name] for one in found]).cpu() for name in found[0]},
        distance_to_last=torch.linalg.vector_norm(all_states[1:] - all_states[-1], dim=-1).cpu(),
        **_predictions(model, torch.stack(decoded), torch.tensor(answer, device=model.device), top),
    )


def _predictions(
    model: LoopedReference, hidden: torch.Tensor, answer: torch.Tensor, top: int
) -> dict[str, Any]:
    """The fields of `DepthValues` that come from logits, from normed hidden states [N, n, H].

    Computed for a few tokens at a time, because the logits of all tokens may not fit in memory.
    """
    num_depths, num_tokens = hidden.shape[:2]
    vocabulary = model.config.vocab_size
    at_once = max(1, LOGITS_AT_ONCE // (num_depths * vocabulary))
    parts: dict[str, list[torch.Tensor]] = {}
    for start in range(0, num_tokens, at_once):
        logits = model.head(hidden[:, start : start + at_once]).float()
        log_p = F.log_softmax(logits, dim=-1)
        actual = answer[start : start + at_once].expand(num_depths, -1).unsqueeze(-1)
        best = log_p.topk(min(top, vocabulary), dim=-1)
        best_logits = logits.topk(2, dim=-1).values
        last = log_p[-1]
        found = {
            "kl_to_last": (last.exp() * (last - log_p)).sum(-1).clamp(min=0),
            "probability": log_p.gather(-1, actual).squeeze(-1).exp(),
            "top_ids": best.indices,
            "top_probabilities": best.values.exp(),
            "logit_gap": best_logits[..., 0] - best_logits[..., 1],
        }
        for name, value in found.items():
            parts.setdefault(name, []).append(value.cpu())
    return {name: torch.cat(values, dim=1) for name, values in parts.items()}
