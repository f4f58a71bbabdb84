"""The two networks as torch modules; only training and the CUDA engine import them."""

from torch import nn

from .densevnet import DenseVNet
from .roi import RoiUNet, SlimRoiUNet

__all__ = ["DenseVNet", "RoiUNet", "SlimRoiUNet", "build"]


def build(network: str, variant: str, drop: float = 0.0) -> nn.Module:
    """Make a network of a variant, as manifests of weights name it.

    Args:
        network: "organs" or "roi".
        variant: of the ROI net "slim" or "paper"; of the organ net "guided", whose last enlargement the image guides,
            or "densevnet", the paper's. Any other name makes the slim one, and the paper's organ net.
        drop: dropout rate of the organ net.
    """
    if network == "organs":
        return DenseVNet(drop=drop, guided=variant == "guided")
    return RoiUNet() if variant == "paper" else SlimRoiUNet()
