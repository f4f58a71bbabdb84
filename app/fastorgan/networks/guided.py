"""The last enlargement of the organ net's logits, which takes borders to the edges that the image shows.

The net decides at half its input's resolution, 3 to 6 mm, where linear enlargement can only round borders off. In a
small neighbourhood logits follow the image nearly linearly: the slope of that line is found at half size, enlarged, and
says how the logits differ between two voxels of the full size. This is the guided filter of He, Sun and Tang (IEEE
TPAMI 2013) in its fast form (He and Sun, arXiv 1505.00996), through which networks can be trained (Wu et al., CVPR
2018). It has no parameters.
"""

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import avg_pool3d

from .blocks import upsample

FLAT = 0.01
"""Variance below which a neighbourhood counts as flat, where the image has no say: (0.1 / 2 of the window, 25 HU)^2."""


def guided_upsample(logits: Tensor, image: Tensor, enlarge: Callable[[Tensor], Tensor] = upsample) -> Tensor:
    """Enlarge logits by two along each axis; where the image is flat, linearly.

    Neighbourhoods are three samples of the smaller grid wide, cut off at its ends.

    Args:
        logits: (N, C, D/2, H/2, W/2).
        image: (N, 1, D, H, W), as the network sees it.
        enlarge: what enlarges linearly.

    Returns:
        (N, C, D, H, W), in float32 if either is of less precision.
    """
    # Variances are small differences of squares, for which half precision has too few digits.
    logits, image = logits.float(), image.float()
    small = avg_pool3d(image, 2)
    level, mean = _local_mean(small), _local_mean(logits)
    slope = (_local_mean(logits * small) - mean * level) / (_local_mean(small * small) - level * level + FLAT)
    return enlarge(logits) + enlarge(slope) * (image - enlarge(small))


def _local_mean(x: Tensor) -> Tensor:
    return avg_pool3d(x, 3, stride=1, padding=1, count_include_pad=False)
