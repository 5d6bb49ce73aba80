"""The selective gate that is applied after each pass of the reasoning block."""

import math

import torch
from torch import nn
from torch.nn import functional as F

DELTA_MIN, DELTA_MAX, DELTA_FLOOR = 0.001, 0.1, 1e-4


class SelectiveGate(nn.Module):
    """`G(u, h)`: moves the state `h` towards the update `u`, by a different amount per channel.

    A gate with zero-order-hold discretisation as in Mamba (paper section 3.2):
    `delta = softplus(W_dt W_in (u - h) + b)`, `a = exp(-exp(A_log) delta)`,
    `h' = a u + (1 - a) h`. Computed in the dtype of the parameters.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        rank = math.ceil(hidden_size / 16)
        self.A_log = nn.Parameter(torch.empty(hidden_size))
        self.dt_input_proj = nn.Linear(hidden_size, rank, bias=False)
        self.delta_proj = nn.Linear(rank, hidden_size, bias=True)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """The paper's initialisation, drawn from `generator` (None: the global one)."""
        hidden_size, rank = self.A_log.numel(), self.delta_proj.in_features
        self.A_log.copy_(torch.log(torch.arange(1, hidden_size + 1, dtype=torch.float32)))
        bound = 1 / math.sqrt(hidden_size)
        self.dt_input_proj.weight.uniform_(-bound, bound, generator=generator)
        self.delta_proj.weight.uniform_(-(rank**-0.5), rank**-0.5, generator=generator)
        share = torch.rand(hidden_size, generator=generator)
        log_range = math.log(DELTA_MAX) - math.log(DELTA_MIN)
        delta = torch.exp(share * log_range + math.log(DELTA_MIN)).clamp(min=DELTA_FLOOR)
        # The inverse of softplus, so that softplus(bias) is the sampled delta.
        self.delta_proj.bias.copy_(delta + torch.log(-torch.expm1(-delta)))

    def coefficient(self, update: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """`a` in (0, 1), [..., H] -> [..., H]. 1 gives the update, 0 leaves the state unchanged."""
        change = (update - state).to(self.A_log.dtype)
        delta = F.softplus(self.delta_proj(self.dt_input_proj(change)))
        return torch.exp(-torch.exp(self.A_log) * delta)

    def forward(self, update: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """`update` and `state` [..., H] -> the new state [..., H], in the dtype of `state`."""
        a = self.coefficient(update, state)
        return (a * update + (1 - a) * state).to(state.dtype)
