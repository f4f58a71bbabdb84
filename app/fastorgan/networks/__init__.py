"""The two networks as torch modules; only training and the CUDA engine import them."""

from .densevnet import DenseVNet
from .roi import RoiUNet, SlimRoiUNet

__all__ = ["DenseVNet", "RoiUNet", "SlimRoiUNet"]
