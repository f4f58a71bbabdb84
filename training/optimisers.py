"""What turns gradients into steps, by the name that a recipe gives it."""

from typing import Any

import torch
from torch import Tensor, nn

FEWEST_FILTERS = 8
"""Kernels of fewer filters, the classifying ones among them, are left to AdamW."""

KERNEL_RATE = 2.0
"""Rate of the other kernels under "muon", as a multiple of the recipe's."""

MOMENTUM = 0.95
"""Of Muon."""


def make_optimiser(name: str, model: nn.Module, weight_decay: float) -> "torch.optim.Optimizer | KernelMuon":
    """The optimiser of `model` that recipes call "sgd", "adamw" or "muon"; `set_rate` before every step.

    "sgd" has momentum 0.99 with Nesterov, as nnU-Net and the paper's framework.
    """
    parameters = list(model.parameters())
    if name == "sgd":
        return torch.optim.SGD(parameters, momentum=0.99, nesterov=True, weight_decay=weight_decay)
    if name == "adamw":
        return torch.optim.AdamW(parameters, weight_decay=weight_decay)
    return KernelMuon(parameters, weight_decay)


def set_rate(optimiser: "torch.optim.Optimizer | KernelMuon", rate: float) -> None:
    """Let the next step be taken at a recipe's rate."""
    for group in optimiser.param_groups:
        group["lr"] = rate * group.get("times", 1.0)


class KernelMuon:
    """Muon (Jordan et al. 2024) for the kernels of convolutions, AdamW for the other parameters and for small kernels.

    Args:
        parameters: of a network.
        weight_decay: of every parameter.
    """

    def __init__(self, parameters: list[nn.Parameter], weight_decay: float) -> None:
        kernels = [p for p in parameters if p.ndim == 5 and p.shape[0] >= FEWEST_FILTERS]
        taken = {id(kernel) for kernel in kernels}
        others = [p for p in parameters if id(p) not in taken]
        self.parts: dict[str, torch.optim.Optimizer] = {
            "adamw": torch.optim.AdamW(others, weight_decay=weight_decay),
            "muon": Muon(kernels, weight_decay),
        }

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Of both optimisers."""
        return [group for part in self.parts.values() for group in part.param_groups]

    def step(self) -> None:
        """Take one step along the parameters' gradients."""
        for part in self.parts.values():
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """The state of both, by name."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state that `state_dict` gave."""
        for name, part in self.parts.items():
            part.load_state_dict(state_dict[name])


class Muon(torch.optim.Optimizer):
    """Steps along the momentum made orthogonal: rare directions count as much as those that most gradients share.

    A kernel is a matrix with a row for each filter. Steps have the length that AdamW's have (Liu et al. 2025, section
    2.2), times `KERNEL_RATE`. torch has a Muon of its own from 2.9 on, for matrices alone; the images have 2.8, which
    knows older cards.

    Args:
        kernels: (filters, channels, depth, height, width).
        weight_decay: decoupled, as AdamW's.
    """

    def __init__(self, kernels: list[nn.Parameter], weight_decay: float) -> None:
        super().__init__(kernels, {"lr": 1e-3, "weight_decay": weight_decay, "times": KERNEL_RATE})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step along the kernels' gradients; those without one stay."""
        for group in self.param_groups:
            for kernel in group["params"]:
                if kernel.grad is None:
                    continue
                state = self.state[kernel]
                if not state:
                    state["momentum"] = torch.zeros_like(kernel)
                state["momentum"].lerp_(kernel.grad, 1.0 - MOMENTUM)
                # A step ahead, as Nesterov's.
                moved = orthogonal(kernel.grad.lerp(state["momentum"], MOMENTUM).flatten(1))
                length = 0.2 * max(moved.shape) ** 0.5
                kernel.mul_(1.0 - group["lr"] * group["weight_decay"])
                kernel.sub_(moved.view(kernel.shape), alpha=group["lr"] * length)


def orthogonal(matrix: Tensor) -> Tensor:
    """Nearly U V' of a matrix U S V': five steps of Newton and Schulz (Jordan et al. 2024).

    Singular values come to lie about 1, from 0.68 to 1.14 but for the least; 0 stays 0.
    """
    upright = matrix.shape[0] > matrix.shape[1]
    x: Tensor = matrix.T if upright else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if upright else x
