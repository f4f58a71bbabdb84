"""The organ net: NiftyNet's DenseVNet (Gibson et al., IEEE TMI 2018), as He & Luo use it."""

import torch
from torch import Tensor, nn

from ..labels import CLASSES
from .blocks import CaseBatchNorm, ConvUnit, initialise, upsample
from .guided import guided_upsample

STACK_UNITS = (5, 10, 10)
STACK_GROWTH = (4, 8, 16)
SKIP_CHANNELS = (12, 24, 24)
DOWN_CHANNELS = 24
STEM_CHANNELS = 24


class OrganUnit(ConvUnit):
    """A unit of the organ net, which normalises each case partly by itself."""

    norm = CaseBatchNorm


class DenseStack(nn.Module):
    """Units that each see the stack's input and all earlier units; the output holds the input too."""

    def __init__(self, channels_in: int, growth: int, units: int, drop: float) -> None:
        super().__init__()
        self.units = nn.ModuleList(
            # The last unit has no dropout, as NiftyNet builds it.
            OrganUnit(channels_in + i * growth, growth, drop=drop if i < units - 1 else 0.0)
            for i in range(units)
        )
        self.channels_out = channels_in + units * growth

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in, D, H, W) to (N, in + units * growth, D, H, W)."""
        for unit in self.units:
            x = torch.cat((x, unit(x)), dim=1)
        return x


class DenseVNet(nn.Module):
    """Organ logits of a CT crop: 871,922 trainable parameters with five classes.

    Maps (N, 1, D, H, W) in the networks' input range to logits (N, classes, D, H, W); D, H and W are multiples of
    8, in the cascade (96, 128, 192): 23,976,345,600 multiply-accumulates.

    Args:
        classes: output channels; the first is background.
        drop: dropout rate in training; the paper has 0.5.
        guided: whether the image guides the last enlargement of the logits; in the paper it is linear.
    """

    def __init__(self, classes: int = CLASSES, drop: float = 0.5, *, guided: bool = True) -> None:
        super().__init__()
        self.guided = guided
        self.pool = nn.AvgPool3d(3, stride=2, padding=1, count_include_pad=False)
        self.image_norm = CaseBatchNorm(1)
        self.stem = OrganUnit(1, STEM_CHANNELS, kernel=5, stride=2, relu=False)
        channels = 1 + STEM_CHANNELS
        self.stacks = nn.ModuleList()
        self.skips = nn.ModuleList()
        self.downs = nn.ModuleList()
        for level, (units, growth, skip) in enumerate(zip(STACK_UNITS, STACK_GROWTH, SKIP_CHANNELS, strict=True)):
            stack = DenseStack(channels, growth, units, drop)
            self.stacks.append(stack)
            self.skips.append(OrganUnit(stack.channels_out, skip, drop=drop))
            if level < len(STACK_UNITS) - 1:
                self.downs.append(OrganUnit(stack.channels_out, DOWN_CHANNELS, stride=2, drop=drop))
                channels = DOWN_CHANNELS
        self.classify = nn.Conv3d(sum(SKIP_CHANNELS) + 1, classes, 3, padding=1)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits; see the class for shapes."""
        logits = self.half_logits(x)
        return guided_upsample(logits, x) if self.guided else upsample(logits)

    def half_logits(self, x: Tensor) -> Tensor:
        """Logits at half the input's size, before the last enlargement: (N, classes, D/2, H/2, W/2)."""
        logits: Tensor = self.classify(self.features(x))
        return logits

    def features(self, x: Tensor) -> Tensor:
        """What the logits are computed from: skips of all levels and the image, (N, 61, D/2, H/2, W/2)."""
        # torch has no bf16 average pooling on a CPU, so the image branch stays in float32. Of one channel no layout is
        # known, and concatenations would be laid out for the slower convolutions, unless the strides say it.
        image = self.image_norm(self.pool(x)).clone(memory_format=torch.channels_last_3d)
        features = self.stem(x)
        features = torch.cat((image.to(features.dtype), features), dim=1)
        branches = []
        for level, (stack, skip) in enumerate(zip(self.stacks, self.skips, strict=True)):
            features = stack(features)
            branch = skip(features)
            branches.append(branch if level == 0 else upsample(branch, 2**level))
            if level < len(self.downs):
                features = self.downs[level](features)
        branches.append(image.to(features.dtype))
        return torch.cat(branches, dim=1)
