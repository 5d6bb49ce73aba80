"""Streaming statistics against the same numbers computed at once, from transformers' own states."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from tests.bases import BASES, save_base
from vllm_loopus.recast import representation
from vllm_loopus.recast.base import Base
from vllm_loopus.recast.hidden_states import HiddenStates
from vllm_loopus.recast.representation import Representation, analyse

CPU = torch.device("cpu")


def plain_states(folder: Path, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """States [L+1, T, H] before the final norm, and logits of each [L+1, T, V], of ids [T]."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    found: list[torch.Tensor] = []
    layers = model.model.layers
    layers[0].register_forward_pre_hook(
        lambda _m, args, kwargs: found.append(args[0]), with_kwargs=True
    )
    for layer in layers:
        layer.register_forward_hook(
            lambda _m, _a, output: found.append(output[0] if isinstance(output, tuple) else output)
        )
    with torch.no_grad():
        final = model(ids.unsqueeze(0)).logits[0]
        states = torch.cat(found)
        logits = model.lm_head(model.model.norm(states))
        cap = getattr(model.config, "final_logit_softcapping", None)
        logits = logits if cap is None else torch.tanh(logits / cap) * cap
    torch.testing.assert_close(logits[-1], final, atol=1e-5, rtol=0)
    return states, logits


def expected(folder: Path, sequences: list[torch.Tensor]) -> dict[str, Any]:
    pairs = [plain_states(folder, ids) for ids in sequences]
    states = torch.cat([s[:, 1:] for s, _ in pairs], dim=1)  # the first position is left out
    log_p = torch.cat([logits[:, 1:] for _, logits in pairs], dim=1).log_softmax(-1)
    norms = states.norm(dim=-1)
    angle = F.cosine_similarity(states, states[-1:], dim=-1).clamp(-1, 1).acos()
    return {
        "cosine": F.cosine_similarity(states[:, None], states[None], dim=-1).mean(-1),
        "norm": norms.mean(-1),
        "step": ((states[1:] - states[:-1]).norm(dim=-1) / norms[:-1]).mean(-1),
        "angle_to_final": angle.mean(-1) * 180 / math.pi,
        "lens_entropy": -(log_p.exp() * log_p).sum(-1).mean(-1),
        "lens_kl": (log_p[-1].exp() * (log_p[-1] - log_p)).sum(-1).mean(-1),
    }


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of two sequences, statistics of five tokens, slices of the vocabulary."""
    monkeypatch.setattr(representation, "STATE_BYTES", 2 * 20 * 4 * 5 * 64)
    monkeypatch.setattr(representation, "SLICE", 5)
    monkeypatch.setattr(representation, "VOCABULARY_SLICE", 48)


@pytest.mark.parametrize("model_type", BASES)
@pytest.mark.parametrize("device_map", [None, "cpu"], ids=["streamed", "device_map"])
@pytest.mark.usefixtures("small_steps")
def test_statistics(model_type: str, device_map: str | None, tmp_path: Path) -> None:
    save_base(model_type, tmp_path)
    base = Base.open(str(tmp_path))
    sequences = [torch.randint(2, 128, (20,)) for _ in range(3)] + [torch.randint(2, 128, (7,))]
    model = HiddenStates(base, CPU, torch.float32, device_map)
    found = analyse(base, iter(sequences), model)
    assert found.num_tokens == found.lens_tokens == 3 * 19 + 6
    for name, values in expected(tmp_path, sequences).items():
        # acos is steep at the last state itself: rounding of the cosine shows as hundredths
        tolerance = 5e-2 if name == "angle_to_final" else 1e-4
        torch.testing.assert_close(
            torch.tensor(getattr(found, name)), values, atol=tolerance, rtol=1e-4, msg=name
        )


def test_memory_does_not_grow_with_the_sample(tmp_path: Path) -> None:
    save_base("llama", tmp_path)
    base = Base.open(str(tmp_path))
    model = HiddenStates(base, CPU, torch.float32)
    alive: list[int] = []
    original = model.states

    def states(ids: torch.Tensor) -> torch.Tensor:
        alive.append(ids.numel())
        return original(ids)

    model.states = states  # type: ignore[method-assign]
    sequences = (torch.randint(2, 128, (100,)) for _ in range(800))
    analyse(base, sequences, model)
    assert sum(alive) == 80_000
    assert max(alive) * model.bytes_per_token <= representation.STATE_BYTES


def test_states_that_are_not_finite(tmp_path: Path) -> None:
    save_base("llama", tmp_path)
    base = Base.open(str(tmp_path))
    model = HiddenStates(base, CPU, torch.float32)
    nan = torch.full((5, 1, 4, 64), math.nan)
    model.states = lambda ids: nan  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="states or logits are not finite"):
        analyse(base, [torch.tensor([1, 2, 3, 4])], model)


def test_similarity_is_of_neighbours() -> None:
    cosine = [[1.0, 0.5, 0.2], [0.5, 1.0, 0.7], [0.2, 0.7, 1.0]]
    found = Representation(1, 1, cosine, [1, 1, 1], [1, 1], [0, 0, 0], [0, 0, 0], [0, 0, 0])
    assert found.similarity == [0.5, 0.7]
