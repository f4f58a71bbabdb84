"""Layers that both networks are made of."""

import torch
from torch import Tensor, nn

BATCH_NORM_EPS = 1e-5

OWN_SHARE = 0.25
"""How much of `CaseBatchNorm`'s statistics is the case's own, chosen on patients left out of training."""


class CaseBatchNorm(nn.BatchNorm3d):
    """Batch norm whose statistics are in part the case's own, also in inference.

    A case unlike those trained on, cut, noisy or of another phase, has other statistics than they had. Its own alone
    are of one case, which may show half an abdomen; so both are averaged (Schneider et al., Improving robustness
    against common corruptions by covariate shift adaptation, NeurIPS 2020). In training it is batch norm.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (N, C, D, H, W)."""
        if self.training:
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        own = torch.var_mean(x, (2, 3, 4), correction=0, keepdim=True)
        # Under autocast activations are of another type than what is stored.
        variance, mean = (statistic.to(self.running_mean.dtype) for statistic in own)
        mean = torch.lerp(_column(self.running_mean), mean, OWN_SHARE)
        variance = torch.lerp(_column(self.running_var), variance, OWN_SHARE)
        scale = _column(self.weight) * torch.rsqrt(variance + self.eps)
        return x * scale.to(x.dtype) + (_column(self.bias) - mean * scale).to(x.dtype)


def _column(values: Tensor) -> Tensor:
    """One number a channel, for (N, C, D, H, W)."""
    return values[:, None, None, None]


class ConvUnit(nn.Sequential):
    """Convolution without bias, batch norm and, unless switched off, ReLU and dropout.

    Maps (N, in, D, H, W) to (N, out, D/stride, H/stride, W/stride); padding keeps the size at stride 1.
    """

    norm: type[nn.BatchNorm3d] = nn.BatchNorm3d

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel: int = 3,
        *,
        stride: int = 1,
        relu: bool = True,
        drop: float = 0.0,
    ) -> None:
        layers: list[nn.Module] = [
            nn.Conv3d(channels_in, channels_out, kernel, stride, padding=kernel // 2, bias=False),
            self.norm(channels_out, eps=BATCH_NORM_EPS),
        ]
        if relu:
            layers.append(nn.ReLU(inplace=True))
        if drop > 0:
            layers.append(nn.Dropout(drop))
        super().__init__(*layers)


def upsample(x: Tensor, factor: int = 2) -> Tensor:
    """Enlarge the three spatial axes of (N, C, D, H, W) linearly, voxel centres kept in place."""
    large = nn.functional.interpolate(x, scale_factor=float(factor), mode="trilinear", align_corners=False)
    if large.requires_grad:
        # A part of a concatenation's gradient has gaps, for which torch would leave the layout it is fast in.
        large.register_hook(_channels_last)  # type: ignore[no-untyped-call]
    return large


def _channels_last(gradient: Tensor) -> Tensor:
    return gradient.contiguous(memory_format=torch.channels_last_3d)


def initialise(network: nn.Module) -> None:
    """He initialisation of every convolution (the paper, table 3); biases zero."""
    for module in network.modules():
        if isinstance(module, nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def parameter_count(network: nn.Module) -> int:
    """Trainable parameters."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def mac_count(network: nn.Module, x: Tensor) -> int:
    """Multiply-accumulates of all convolutions in one forward pass over `x`; batch norm and resizing do not count."""
    total = 0

    def count(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        assert isinstance(module, nn.Conv3d)
        total += output[:, 0].numel() * module.weight.numel()

    handles = [m.register_forward_hook(count) for m in network.modules() if isinstance(m, nn.Conv3d)]
    try:
        network(x)
    finally:
        for handle in handles:
            handle.remove()
    return total
