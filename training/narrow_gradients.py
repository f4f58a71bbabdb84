"""Faster gradients, on a CPU in float32, of convolutions with few output channels, of which the organ net is made.

oneDNN computes the weights' gradient of such a convolution at a tenth of the processor's speed. As one matrix product
over the unfolded gradient, which is small where the output has few channels, it takes a quarter of the time.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

MOST_CHANNELS = 16
"""Of the output; beyond, unfolding the gradient costs more than it saves."""

SLICES = 2
"""Unfolded at once: few enough to stay in the processor's cache."""


def narrow_gradients(network: nn.Module) -> None:
    """Let the convolutions of `network` that gain by it compute their gradients this way; results stay the same.

    Those are 3 x 3 x 3, of stride 1, padded to the input's size, with at most `MOST_CHANNELS` output channels.
    """
    for module in network.modules():
        if not isinstance(module, nn.Conv3d):
            continue
        plain = module.kernel_size == (3, 3, 3) and module.stride == module.padding == module.dilation == (1, 1, 1)
        if plain and module.groups == 1 and module.out_channels <= MOST_CHANNELS:
            module.__class__ = NarrowConv3d
        elif module.in_channels == 1:
            # torch cannot tell the layout of an image with one channel, and goes on in the slower one.
            module.register_forward_hook(_channels_last)


class NarrowConv3d(nn.Conv3d):
    """A 3 x 3 x 3 convolution whose weights' gradient is a matrix product."""

    def forward(self, input: Tensor) -> Tensor:
        """Convolve (N, in, D, H, W) to (N, out, D, H, W)."""
        result: Tensor = _Convolution.apply(input, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return result


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return nn.functional.conv3d(x, weight, bias, padding=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_input, of_weight, of_bias = ctx.needs_input_grad
        gradient = gradient.contiguous(memory_format=torch.channels_last_3d)
        ones, zeros = [1, 1, 1], [0, 0, 0]
        back = None
        if of_input:
            back = torch.ops.aten.convolution_backward(
                gradient, x, weight, None, ones, ones, ones, False, zeros, 1, (True, False, False)
            )[0]
        return (
            back,
            _weight_gradient(x, gradient) if of_weight else None,
            gradient.sum((0, 2, 3, 4)) if of_bias else None,
        )


def _weight_gradient(x: Tensor, gradient: Tensor) -> Tensor:
    """Of (N, in, D, H, W) and (N, out, D, H, W), both channels last: (out, in, 3, 3, 3)."""
    _, out, depth, height, width = gradient.shape
    result = x.new_zeros(27 * out, x.shape[1])
    for voxels, slopes in zip(x.movedim(1, -1), gradient.movedim(1, -1), strict=True):
        padded = nn.functional.pad(slopes, (0, 0, 1, 1, 1, 1, 1, 1))
        z_step, y_step, x_step, _ = padded.stride()
        for z in range(0, depth, SLICES):
            slices = min(SLICES, depth - z)
            # Each voxel's 27 neighbours side by side; three in a row of x already lie so.
            shape, steps = (slices, height, width, 3, 3, 3 * out), (z_step, y_step, x_step, z_step, y_step, 1)
            unfolded = padded.as_strided(shape, steps, z * z_step).reshape(-1, 27 * out)
            result.addmm_(unfolded.T, voxels[z : z + slices].reshape(-1, x.shape[1]))
    # A neighbour's gradient belongs to the weight on the other side.
    return result.view(3, 3, 3, out, -1).flip(0, 1, 2).permute(3, 4, 0, 1, 2)


def _channels_last(module: nn.Module, given: tuple[Tensor, ...], result: Tensor) -> Tensor:
    return result.contiguous(memory_format=torch.channels_last_3d)
