"""Trajectories and convergence: the mathematics, and the pictures."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.trace.conftest import trace_case, varied
from vllm_loopus.modeling.model import LoopUSForCausalLM
from vllm_loopus.trace import pictures
from vllm_loopus.trace.convergence import convergence
from vllm_loopus.trace.record import json_of
from vllm_loopus.trace.reference import DepthValues
from vllm_loopus.trace.tokens import Vocabulary
from vllm_loopus.trace.trajectories import (
    DRAWN,
    MOST,
    chosen_tokens,
    principal_components,
    trajectories,
)


def test_components_of_a_plane() -> None:
    """States in a plane: both axes explain everything, and distances are kept."""
    generator = torch.Generator().manual_seed(0)
    places = torch.randn(30, 2, generator=generator) * torch.tensor([5.0, 1.0])
    axes = torch.linalg.qr(torch.randn(16, 2, generator=generator)).Q
    states = places @ axes.T + 3
    points, shares = principal_components(states)
    assert shares.sum() == pytest.approx(1) and shares[0] > shares[1] > 0
    found = torch.from_numpy(points)
    torch.testing.assert_close(
        torch.cdist(found, found), torch.cdist(states.double(), states.double()), atol=1e-4, rtol=0
    )
    again, _ = principal_components(torch.cat([states, states]))
    np.testing.assert_allclose(again[:30], points, atol=1e-6)


def test_components_against_torch() -> None:
    states = torch.randn(40, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    points, shares = principal_components(states)
    _, singular, axes = torch.pca_lowrank(states, q=12, niter=20)
    expected = (states - states.mean(0)) @ axes[:, :2]
    np.testing.assert_allclose(np.abs(points), expected.abs().numpy(), atol=1e-6)
    np.testing.assert_allclose(shares, (singular**2 / (singular**2).sum())[:2], atol=1e-8)


def test_states_that_do_not_move() -> None:
    points, shares = principal_components(torch.ones(9, 4))
    assert not points.any() and not shares.any()
    points, shares = principal_components(torch.arange(3.0).repeat(4, 1).T)
    assert shares.tolist() == pytest.approx([1.0, 0.0]) and not points[:, 1].any()


def test_trajectories(golden_models: dict[str, LoopUSForCausalLM], vocabulary: Vocabulary) -> None:
    values = trace_case(golden_models["qwen3"], vocabulary, varied("qwen3", "threshold")[0]).values
    every = trajectories(values)
    assert every["tokens"] == list(range(20)) and len(every["drawn"]) == DRAWN
    assert np.shape(every["points"]) == (20, 9, 2)
    chosen = trajectories(values, [3, 7])
    assert chosen["tokens"] == chosen["drawn"] == [3, 7]
    states = values.states[:, [3, 7]].transpose(0, 1).flatten(0, 1)
    expected, _ = principal_components(states)
    np.testing.assert_allclose(np.reshape(chosen["points"], (18, 2)), expected, rtol=1e-5)
    long = replace(values, states=values.states[:, :1].repeat(1, 3 * MOST, 1))
    assert len(trajectories(long)["tokens"]) == MOST


@pytest.mark.parametrize(
    ("asked", "expected"), [("0", [0]), ("4, 1", [1, 4]), ("0,2..4", [0, 2, 3, 4])]
)
def test_chosen_tokens(asked: str, expected: list[int]) -> None:
    assert chosen_tokens(asked, 5) == expected


@pytest.mark.parametrize("asked", ["", "x", "1..", "..1", "5", "-1", "3..1", "0..5", "1.5"])
def test_tokens_that_are_not_there(asked: str) -> None:
    with pytest.raises(ValueError, match=r"tokens=.*(indices such as|is not within 0\.\.4)"):
        chosen_tokens(asked, 5)


def values_of(step: list[list[float]], best: list[list[int]]) -> DepthValues:
    """Values with these columns [N, n]; what they do not matter for is the step length again."""
    column = torch.tensor(step)
    return DepthValues(
        states=torch.zeros(1, 1, 1),
        by_name={"step_length": column},
        distance_to_last=column,
        kl_to_last=column,
        probability=column,
        top_ids=torch.tensor(best).unsqueeze(-1),
        top_probabilities=column.unsqueeze(-1),
        logit_gap=column,
    )


def test_convergence() -> None:
    """Over the tokens of all answers, not a mean of means."""
    found = convergence(
        [
            values_of([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]], [[4, 5, 6], [4, 5, 7]]),
            values_of([[4.0], [1.0]], [[9], [1]]),
        ]
    )
    assert found["num_tokens"] == 4
    first, second = found["depths"]
    assert (first["depth"], first["agreement"]) == (1, 0.5)
    assert (second["depth"], second["agreement"]) == (2, 1.0)
    assert first["step_length"]["mean"] == 2.5
    assert first["kl_to_last"]["quantiles"] == {"0.1": 1.3, "0.5": 2.5, "0.9": 3.7}
    assert second["step_length"]["mean"] == 0.25


def test_pictures(
    golden_models: dict[str, LoopUSForCausalLM], vocabulary: Vocabulary, tmp_path: Path
) -> None:
    """Texts of a model are drawn, not typeset: a dollar begins no formula."""
    traced = trace_case(golden_models["llama"], vocabulary, varied("llama", "threshold")[0])
    trace = json_of(replace(traced.trace, trajectories=trajectories(traced.values)))
    for token in trace["tokens"]:
        token["text"] = "$\\frac{$ <b>\x1b"
    figure = pictures.draw_trajectories(trace, "m$\\x$")
    places = figure.axes[0]
    assert len(places.lines) == DRAWN
    for line, path in zip(
        places.lines, (trace["trajectories"]["points"][i] for i in trace["trajectories"]["drawn"]),
        strict=True,
    ):  # fmt: skip
        np.testing.assert_allclose(line.get_xydata(), path)
    pictures.save(figure, tmp_path / "states.png")
    found = convergence([traced.values])
    pictures.save(pictures.draw_convergence(found, "m"), tmp_path / "convergence.svg")
    assert (tmp_path / "states.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "convergence.svg").read_text()
