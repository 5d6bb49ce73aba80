"""The confidence head: how sure the model is of a state."""

import torch
from torch import nn
from torch.nn import functional as F


class ConfidenceHead(nn.Sequential):
    """States [..., H] -> the logit of `q` [...]. Its tensors are `q_head.0` and `q_head.1` on disk.

    It computes in float32, whatever the dtype of states and weights: bfloat16 has steps of 0.004
    near 1, so that all thresholds above 0.996 would be one.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__(nn.LayerNorm(hidden_size), nn.Linear(hidden_size, 1))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        norm, linear = self
        assert isinstance(norm, nn.LayerNorm) and isinstance(linear, nn.Linear)
        with torch.autocast(input.device.type, enabled=False):
            normed = F.layer_norm(
                input.float(),
                norm.normalized_shape,
                norm.weight.float(),
                norm.bias.float(),
                norm.eps,
            )
            logit = F.linear(normed, linear.weight.float(), linear.bias.float())
        return logit.squeeze(-1)


def head_input(
    confidence_input: str, update: torch.Tensor, before: torch.Tensor, after: torch.Tensor
) -> torch.Tensor:
    """What the head reads after a pass, shapes [..., H]: the gated state `after` (`state`), or how
    far the `update` is from the state `before` (`update`)."""
    return after if confidence_input == "state" else update - before
