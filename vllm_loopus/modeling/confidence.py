"""The confidence head: predicts from a state how confident the model is."""

import torch
from torch import nn
from torch.nn import functional as F


class ConfidenceHead(nn.Sequential):
    """States [..., H] -> the logit of the confidence `q` [...].

    Checkpoints store it as `q_head.0` and `q_head.1`. It always computes in float32: bfloat16 has
    steps of 0.004 near 1, so that all exit thresholds above 0.996 would be the same.
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
    """The input of the confidence head after a pass, shapes [..., H].

    The gated state `after` for `confidence_input="state"`, and `update - before`, the difference
    between the update and the state before the pass, for `"update"`.
    """
    return after if confidence_input == "state" else update - before
