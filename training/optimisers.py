"""What turns gradients into steps, by the name that a recipe gives it."""

from typing import Any

import torch
from torch import Tensor, nn

FEWEST_FILTERS = 8
"""Kernels of fewer filters, the classifying ones among them, are left to AdamW."""

KERNEL_RATE = 2.0
"""Rate of the other kernels under "muon", as a multiple of the recipe's."""


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

    To Muon a kernel is a matrix with a row for each filter. It makes the momentum orthogonal before it takes a step, so
    that rare directions count as much as those that most gradients share. Steps have the length that AdamW's have (Liu
    et al. 2025, section 2.2), times `KERNEL_RATE`.

    Args:
        parameters: of a network whose place and layout in memory are final.
        weight_decay: of every parameter.
    """

    def __init__(self, parameters: list[nn.Parameter], weight_decay: float) -> None:
        self.kernels = [p for p in parameters if p.ndim == 5 and p.shape[0] >= FEWEST_FILTERS]
        # torch's Muon takes matrices alone: these share the kernels' memory.
        self.matrices = [nn.Parameter(_as_matrix(kernel.detach(), kernel)) for kernel in self.kernels]
        taken = {id(kernel) for kernel in self.kernels}
        others = [p for p in parameters if id(p) not in taken]
        kernels = {"params": self.matrices, "times": KERNEL_RATE}
        self.parts: dict[str, torch.optim.Optimizer] = {
            "adamw": torch.optim.AdamW(others, weight_decay=weight_decay),
            "muon": torch.optim.Muon([kernels], weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        }

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Of both optimisers."""
        return [group for part in self.parts.values() for group in part.param_groups]

    def step(self) -> None:
        """Take one step along the parameters' gradients."""
        for kernel, matrix in zip(self.kernels, self.matrices, strict=True):
            matrix.grad = None if kernel.grad is None else _as_matrix(kernel.grad, kernel)
        for part in self.parts.values():
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """The state of both, by name."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state that `state_dict` gave."""
        for name, part in self.parts.items():
            part.load_state_dict(state_dict[name])


def _as_matrix(values: Tensor, kernel: Tensor) -> Tensor:
    """(filters, channels x taps) in the order in which `kernel` lies in memory, of which its own values are a view."""
    return values.flatten(1) if kernel.is_contiguous() else values.permute(0, 2, 3, 4, 1).flatten(1)
