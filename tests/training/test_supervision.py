"""One supervised step: where gradients go, what is kept in memory, what is drawn."""

from collections import Counter
from typing import Any

import pytest
import torch

from tests.training.conftest import random_loopus
from vllm_loopus.modeling.model import LoopUSForCausalLM
from vllm_loopus.training.objective import Counts, Labelled, token_losses
from vllm_loopus.training.settings import Supervision
from vllm_loopus.training.supervision import (
    Carried,
    TrainableLoopUS,
    draw_steps,
    measure_by_depth,
    supervised_step,
)


def step(
    model: TrainableLoopUS, batch: dict[str, Any], carried: Carried, at: int, **options: Any
) -> dict[str, torch.Tensor]:
    supervision = Supervision(**{"n_supervision": 1, "n_reasoning_steps": 64, **options})
    counts = Counts(len(batch["labelled"]), batch["labelled"].documents)
    inputs = batch["input_ids"], batch["position_ids"]
    return model(supervised_step, *inputs, carried, at, supervision, counts)


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, bool]:
    """Names of parameters, and whether the loss reaches them."""
    model.zero_grad()
    loss.backward()
    return {
        name: parameter.grad is not None and bool(parameter.grad.any())
        for name, parameter in model.named_parameters()
    }


def blocks_reached(reached: dict[str, bool]) -> set[str]:
    return {name.split(".")[0] for name, value in reached.items() if value}


def by_hand(model: TrainableLoopUS, batch: dict[str, Any], passes: int) -> list[torch.Tensor]:
    """States h^0.. of a batch, by the parts of the reference model."""
    embedded = model.encoder.embed_tokens(batch["input_ids"])
    positions = model.positions(embedded, None, batch["position_ids"])
    states = [model.encode(embedded, positions)]
    for _ in range(passes):
        states.append(model.refine(states[-1], positions)[1])
    batch["positions"] = positions
    return states


def test_losses_are_those_of_the_states(model: TrainableLoopUS, batch: dict[str, Any]) -> None:
    """Steps 2 and 5 of a batch: terms equal what the reference's states give."""
    labelled = batch["labelled"]
    states = by_hand(model, batch, 6)
    carried = Carried(labelled)
    for at in (2, 5):
        told = step(model, batch, carried, at)
        new, old = (
            token_losses(
                model.decode(h, batch["positions"]).flatten(0, 1)[labelled.where], labelled.targets
            )
            for h in (states[at + 1], states[at])
        )
        torch.testing.assert_close(told["lm_loss"], new.mean())
        per_document = [new[labelled.document == d] - old[labelled.document == d] for d in range(3)]
        mono = sum(len(d) * torch.nn.functional.silu(d.mean()) for d in per_document) / len(new)
        torch.testing.assert_close(told["mono_loss"], mono)
        total = told["lm_loss"] + told["mono_loss"] + told["confidence_loss"]
        torch.testing.assert_close(told["loss"], total)
        assert carried.state is not None and not carried.state.requires_grad
        torch.testing.assert_close(carried.state, states[at + 1])


@pytest.mark.parametrize("confidence_input", ["state", "update"])
@pytest.mark.parametrize("target", ["sequence", "token"])
def test_what_the_head_is_trained_on(
    model: TrainableLoopUS, batch: dict[str, Any], confidence_input: str, target: str
) -> None:
    labelled = batch["labelled"]
    (state,) = by_hand(model, batch, 0)
    update, new_state = model.refine(state, batch["positions"])
    seen = (new_state if confidence_input == "state" else update - state).flatten(0, 1)
    logits = model.decode(new_state, batch["positions"]).flatten(0, 1)[labelled.where]
    right = (logits.argmax(-1) == labelled.targets).float()
    if target == "sequence":
        q = model.q_head(seen[labelled.last])
        wanted = torch.stack([right[labelled.document == d].mean() for d in range(3)])
    else:
        q, wanted = model.q_head(seen[labelled.where]), right
    expected = torch.nn.functional.binary_cross_entropy_with_logits(q, wanted)
    told = step(
        model,
        batch,
        Carried(labelled),
        0,
        confidence_input=confidence_input,
        confidence_target=target,
    )
    torch.testing.assert_close(told["confidence_loss"], expected)


def test_gradients_reach_what_they_should(model: TrainableLoopUS, batch: dict[str, Any]) -> None:
    labelled = batch["labelled"]
    reached = gradients(model, step(model, batch, Carried(labelled), 0)["loss"])
    # The encoder is frozen, as in the released code; everything else learns.
    assert blocks_reached(reached) == {"reasoning", "decoder", "q_head"}
    assert all(value for name, value in reached.items() if not name.startswith("encoder"))

    trained = gradients(model, step(model, batch, Carried(labelled), 0, train_encoder=True)["loss"])
    assert all(trained.values())
    # After an unsupervised step the state has no graph: nothing reaches the encoder.
    late = gradients(model, step(model, batch, Carried(labelled), 1, train_encoder=True)["loss"])
    assert late == reached

    # L_Q alone: with the head's gradient cut, it trains the head only.
    alone: dict[str, Any] = {"beta": 0.0, "confidence_weight": 1.0}
    body = step(model, batch, Carried(labelled), 0, **alone)
    only = body["loss"] - (body["loss"] - body["confidence_loss"]).detach()
    assert "reasoning" in blocks_reached(gradients(model, only))
    lm = {**alone, "confidence_weight": 0.0}
    without = gradients(model, step(model, batch, Carried(labelled), 0, **lm)["loss"])
    assert blocks_reached(without) == {"reasoning", "decoder"}


def test_confidence_gradient_into_the_head_only(
    model: TrainableLoopUS, batch: dict[str, Any]
) -> None:
    """The body's gradients are then those without L_Q."""

    def grads(**options: Any) -> dict[str, torch.Tensor]:
        model.zero_grad()
        step(model, batch, Carried(batch["labelled"]), 0, **options)["loss"].backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    none = grads(confidence_weight=0.0)
    head, body = grads(confidence_gradient="head"), grads(confidence_gradient="body")
    for name in none:
        if name.startswith("q_head"):
            assert head[name].any() and not none[name].any()
            torch.testing.assert_close(head[name], body[name])
        else:
            torch.testing.assert_close(head[name], none[name])
    assert not torch.equal(body["reasoning.gate.A_log"], none["reasoning.gate.A_log"])


def test_a_step_is_all_that_a_gradient_sees(model: TrainableLoopUS, batch: dict[str, Any]) -> None:
    """The gradient of a step is that of the detached state before it: no other step counts."""
    labelled = batch["labelled"]
    carried = Carried(labelled)
    step(model, batch, carried, 1)
    before = carried.state
    assert before is not None
    late = step(model, batch, carried, 4)
    model.zero_grad()
    late["loss"].backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    with torch.no_grad():
        for _ in range(2):
            _, before = model.refine(before, carried.positions)
    alone = Carried(labelled, state=before, positions=carried.positions, steps_done=4)
    model.zero_grad()
    step(model, batch, alone, 4)["loss"].backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad)


def saved_bytes(model: TrainableLoopUS, batch: dict[str, Any], at: int, **options: Any) -> int:
    """Bytes of distinct tensors that the graph of a step holds on to."""
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        kept.append(tensor)  # so that no address comes twice
        return tensor

    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step(model, batch, Carried(batch["labelled"]), at, **options)
    return sum(saved.values())


def test_memory_does_not_grow_with_the_steps(model: TrainableLoopUS, batch: dict[str, Any]) -> None:
    one = saved_bytes(model, batch, 0)
    assert one > 0
    assert saved_bytes(model, batch, 1) == saved_bytes(model, batch, 40) == one
    # It does grow where gradients run through more passes.
    assert saved_bytes(model, batch, 0, supervised_passes=2) > 1.3 * one


def test_supervised_passes(model: TrainableLoopUS, batch: dict[str, Any]) -> None:
    """Two passes in a supervised step, as released: loss and old loss stand two passes apart."""
    labelled = batch["labelled"]
    states = by_hand(model, batch, 3)
    carried = Carried(labelled)
    told = step(model, batch, carried, 1, supervised_passes=2)
    torch.testing.assert_close(carried.state, states[3])
    logits = model.decode(states[3], batch["positions"]).flatten(0, 1)[labelled.where]
    torch.testing.assert_close(told["lm_loss"], token_losses(logits, labelled.targets).mean())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_gradient_checkpointing_changes_no_gradient(batch: dict[str, Any], attention: str) -> None:
    found: list[dict[str, torch.Tensor]] = []
    sizes = []
    for checkpointing in (False, True):
        model = random_loopus().train()
        model.set_attn_implementation(attention)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        carried = Carried(batch["labelled"])
        step(model, batch, carried, 2)["loss"].backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        sizes.append(saved_bytes(model, batch, 2))
    torch.testing.assert_close(found[1], found[0])
    assert sizes[1] < 0.7 * sizes[0]


def test_autocast_keeps_gradients(model: TrainableLoopUS, batch: dict[str, Any]) -> None:
    """Weights cast to bf16 in a step without gradient must not be reused in one with it."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        told = step(model, batch, Carried(batch["labelled"]), 3)
    reached = gradients(model, told["loss"])
    assert all(value for name, value in reached.items() if not name.startswith("encoder"))


def test_draws() -> None:
    supervision = Supervision(n_supervision=3, n_reasoning_steps=8)
    draws = [draw_steps(5, batch, supervision) for batch in range(2000)]
    assert draws[7] == draw_steps(5, 7, supervision)
    assert draws[7] != draw_steps(6, 7, supervision) or draws[8] != draw_steps(6, 8, supervision)
    assert all(len(set(d)) == 3 and d == sorted(d) for d in draws)
    counted = Counter(i for d in draws for i in d)
    assert set(counted) == set(range(8))
    assert all(abs(count / 2000 - 3 / 8) < 0.06 for count in counted.values())  # 5 sigma
    everything = Supervision(n_supervision=4, n_reasoning_steps=4)
    assert draw_steps(0, 0, everything) == [0, 1, 2, 3]


@pytest.mark.parametrize("confidence_input", ["state", "update"])
def test_measured_at_exit_is_what_the_reference_serves(confidence_input: str) -> None:
    """Every token measured in a pack leaves where it does when its prefix is served alone."""
    model = random_loopus(max_loops=4, exit_threshold=0.5, confidence_input=confidence_input).eval()
    torch.manual_seed(1)
    torch.nn.init.normal_(model.q_head[1].weight, std=1.0)
    ids = torch.randint(6, 90, (1, 12), generator=torch.Generator().manual_seed(2))
    labelled = Labelled.of(ids, torch.arange(12)[None])
    measured = measure_by_depth(model, ids, torch.arange(12)[None], labelled)
    depths, losses, right = [], [], []
    for t in range(1, 12):
        out = LoopUSForCausalLM.forward(model, ids[:, :t], logits_to_keep=1)
        assert out.logits is not None and out.exit_depths is not None
        depths.append(out.exit_depths.item())
        losses.append(token_losses(out.logits[0], ids[0, t : t + 1]).item())
        right.append(out.logits[0, -1].argmax().item() == ids[0, t].item())
    assert len(set(depths)) > 1
    assert measured["exit_depth"].item() == sum(depths)
    assert measured["exit_accuracy"].item() == sum(right)
    assert measured["exit_loss"].item() == pytest.approx(sum(losses), rel=1e-5)
    assert measured["loss"].shape == measured["confidence"].shape == (4,)
