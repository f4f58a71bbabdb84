"""Layers that both networks are made of."""

from torch import Tensor, nn

BATCH_NORM_EPS = 1e-5


class ConvUnit(nn.Sequential):
    """Convolution without bias, batch norm and, unless switched off, ReLU and dropout.

    Maps (N, in, D, H, W) to (N, out, D/stride, H/stride, W/stride); padding keeps the size at stride 1.
    """

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
            nn.BatchNorm3d(channels_out, eps=BATCH_NORM_EPS),
        ]
        if relu:
            layers.append(nn.ReLU(inplace=True))
        if drop > 0:
            layers.append(nn.Dropout(drop))
        super().__init__(*layers)


def upsample(x: Tensor, factor: int = 2) -> Tensor:
    """Enlarge the three spatial axes of (N, C, D, H, W) linearly, voxel centres kept in place."""
    return nn.functional.interpolate(x, scale_factor=float(factor), mode="trilinear", align_corners=False)


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
