"""What every depth would have said, on the transformers side.

One uncached pass of prompt and answer to the full depth has all of it: attention is causal, so the
state of position t at depth r, and what the decoder makes of it with all positions at that depth,
`D(h^r_{1..t})_t`, do not depend on what comes after t nor on where other tokens left. These are the
states that the reference model decodes with, by definition (`modeling/model.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from vllm_loopus.config import LoopUSConfig
from vllm_loopus.modeling.model import LoopUSForCausalLM
from vllm_loopus.trace.tokens import Vocabulary

LOGITS_AT_ONCE = 2**26  # over all depths; 256 MiB in float32
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class DepthValues:
    """Of n tokens at depths 1..N (N first in every shape), in float32 on the CPU.

    `h` below is the state of the position that a token is predicted from, `p` the distribution over
    next tokens that the decoder gives there.
    """

    states: torch.Tensor  # [N + 1, n, H]: h^0 .. h^N
    confidence: torch.Tensor  # [N, n]: q
    gate_mean: torch.Tensor  # [N, n]: the gate's coefficient a, mean over channels
    step_length: torch.Tensor  # [N, n]: ||h^r - h^(r-1)||_2
    distance_to_last: torch.Tensor  # [N, n]: ||h^r - h^N||_2
    kl_to_last: torch.Tensor  # [N, n]: KL(p^N || p^r) in nats
    probability: torch.Tensor  # [N, n]: of the token that came
    top_ids: torch.Tensor  # [N, n, k], most probable first
    top_probabilities: torch.Tensor  # [N, n, k]
    logit_gap: torch.Tensor  # [N, n]: between the best two logits


def load_model(source: str, config: LoopUSConfig, dtype: str, device: str) -> LoopUSForCausalLM:
    """The reference model of a checkpoint.

    Raises `ValueError` for a device or dtype that cannot be, `ValueError` or `OSError` for weights.
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


def load_vocabulary(source: str, config: LoopUSConfig, tokenizer: str | None) -> Vocabulary:
    """The model's tokens: `tokenizer` where given, or the checkpoint's own, or its base's.

    Without `tokenizer` a model may have none. Raises `ValueError` for one that cannot be loaded.
    """
    for name in [tokenizer] if tokenizer else [source, config.base_model_name_or_path]:
        try:
            loaded = AutoTokenizer.from_pretrained(name) if name else None
        except Exception as error:  # of the hub, of tokenizer files
            if tokenizer:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise ValueError(f"tokenizer={tokenizer!r} cannot be loaded: {reason}") from error
            continue
        if loaded is not None:
            return Vocabulary(loaded, config.vocab_size, source)
    return Vocabulary(None, config.vocab_size, source)


def stop_tokens(model: LoopUSForCausalLM, vocabulary: Vocabulary) -> list[int]:
    """The tokens that end an answer: those of generation config, base and tokenizer."""
    found = [
        getattr(model.generation_config, "eos_token_id", None),
        model.config.base.eos_token_id,
        getattr(vocabulary.tokenizer, "eos_token_id", None),
    ]
    ids = {i for ids in found for i in (ids if isinstance(ids, list | tuple) else [ids])}
    return sorted(i for i in ids if i is not None)


@torch.no_grad()
def generate(
    model: LoopUSForCausalLM, prompt: Sequence[int], max_tokens: int, stops: Sequence[int]
) -> list[int]:
    """Greedy tokens by transformers' `generate`, a stop token included."""
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_tokens,
        eos_token_id=list(stops) or None,
        pad_token_id=stops[0] if stops else None,
    )
    ids = torch.tensor([list(prompt)], device=model.device)
    own = model.generation_config
    model.generation_config = greedy  # or it would fill in what `greedy` leaves open
    try:
        output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=greedy)
    finally:
        model.generation_config = own
    return list(output[0, len(prompt) :].tolist())


@torch.no_grad()
def depth_values(
    model: LoopUSForCausalLM, prompt: Sequence[int], answer: Sequence[int], top: int = 5
) -> DepthValues:
    """Values of the answer's tokens at all depths up to the model's `max_loops`."""
    sequence = torch.tensor([[*prompt, *answer[:-1]]], device=model.device)
    asked = slice(len(prompt) - 1, None)  # a token is predicted from the position before it
    embedded = model.encoder.embed_tokens(sequence)
    positions = model.positions(embedded)
    state = model.encode(embedded, positions)
    states, decoded, judged, gate_mean = [state[0, asked]], [], [], []
    for one in model.passes(state, positions):
        before, after, moved = (h[0, asked] for h in (one.before, one.state, one.update))
        gate_mean.append(model.reasoning.gate.coefficient(moved, before).float().mean(-1))
        judged.append(model.judged(one, (0, asked)))
        decoded.append(model.decoder.norm(model.decoder.run_layers(one.state, positions))[0, asked])
        states.append(after)
    every = torch.stack(states).float()
    return DepthValues(
        states=every.cpu(),
        confidence=torch.stack([one["confidence"] for one in judged]).cpu(),
        gate_mean=torch.stack(gate_mean).cpu(),
        step_length=torch.stack([one["step_length"] for one in judged]).cpu(),
        distance_to_last=torch.linalg.vector_norm(every[1:] - every[-1], dim=-1).cpu(),
        **_said(model, torch.stack(decoded), torch.tensor(answer, device=model.device), top),
    )


def _said(
    model: LoopUSForCausalLM, hidden: torch.Tensor, answer: torch.Tensor, top: int
) -> dict[str, Any]:
    """What normed hidden states [N, n, H] say, a few tokens at a time: logits are large."""
    num_depths, num_tokens = hidden.shape[:2]
    vocabulary = model.config.vocab_size
    at_once = max(1, LOGITS_AT_ONCE // (num_depths * vocabulary))
    parts: dict[str, list[torch.Tensor]] = {}
    for start in range(0, num_tokens, at_once):
        logits = model.decoder.logits(hidden[:, start : start + at_once]).float()
        log_p = F.log_softmax(logits, dim=-1)
        came = answer[start : start + at_once].expand(num_depths, -1).unsqueeze(-1)
        best = log_p.topk(min(top, vocabulary), dim=-1)
        best_logits = logits.topk(2, dim=-1).values
        last = log_p[-1]
        found = {
            "kl_to_last": (last.exp() * (last - log_p)).sum(-1).clamp(min=0),
            "probability": log_p.gather(-1, came).squeeze(-1).exp(),
            "top_ids": best.indices,
            "top_probabilities": best.values.exp(),
            "logit_gap": best_logits[..., 0] - best_logits[..., 1],
        }
        for name, value in found.items():
            parts.setdefault(name, []).append(value.cpu())
    return {name: torch.cat(values, dim=1) for name, values in parts.items()}
