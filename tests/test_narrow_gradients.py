"""Gradients by matrix products are those of torch."""

import copy

import pytest
import torch
from torch import nn

from fastorgan.networks import DenseVNet, SlimRoiUNet
from training.narrow_gradients import MOST_CHANNELS, NarrowConv3d, narrow_gradients


def gradients(network: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    network.zero_grad()
    result = network(x)
    (result * torch.linspace(-1, 1, result.numel(), dtype=x.dtype).view_as(result)).sum().backward()
    found = [x.grad, *(p.grad for p in network.parameters())]
    assert all(g is not None for g in found)
    return [g for g in found if g is not None]


@pytest.mark.parametrize("shape", [(5, 4, 3), (1, 1, 1), (2, 7, 2)])
@pytest.mark.parametrize(("channels", "out", "cases", "bias"), [(3, 2, 1, True), (1, 1, 2, False), (4, 16, 3, True)])
def test_gradients_equal_those_of_torch(
    shape: tuple[int, int, int], channels: int, out: int, cases: int, bias: bool
) -> None:
    torch.manual_seed(0)
    plain = nn.Conv3d(channels, out, 3, padding=1, bias=bias, dtype=torch.float64)
    narrow = copy.deepcopy(plain)
    narrow_gradients(narrow)
    assert type(narrow) is NarrowConv3d
    x = torch.randn(cases, channels, *shape, dtype=torch.float64)
    assert torch.equal(narrow(x), plain(x))
    for found, expected in zip(gradients(narrow, x), gradients(plain, x), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "other",
    [
        nn.Conv3d(4, MOST_CHANNELS + 1, 3, padding=1),
        nn.Conv3d(4, 4, 3, 2, padding=1),
        nn.Conv3d(4, 4, 3),
        nn.Conv3d(4, 4, 5, padding=2),
        nn.Conv3d(4, 4, 3, padding=2, dilation=2),
        nn.Conv3d(4, 4, 3, padding=1, groups=2),
    ],
)
def test_other_convolutions_are_left_alone(other: nn.Conv3d) -> None:
    narrow_gradients(other)
    assert type(other) is nn.Conv3d


@pytest.mark.parametrize("build", [lambda: DenseVNet(drop=0.0), SlimRoiUNet])
def test_networks_learn_the_same(build: type[nn.Module]) -> None:
    torch.manual_seed(0)
    plain = build().double()
    narrow = copy.deepcopy(plain)
    narrow_gradients(narrow)
    assert any(type(m) is NarrowConv3d for m in narrow.modules())
    assert list(narrow.state_dict()) == list(plain.state_dict())
    x = torch.randn(1, 1, 32, 32, 32, dtype=torch.float64).contiguous(memory_format=torch.channels_last_3d)
    for found, expected in zip(gradients(narrow, x), gradients(plain, x), strict=True):
        torch.testing.assert_close(found, expected)
