"""A case small enough to lie inside a web page: downsampled slices of the CT and its labels, as two pictures.

Both pictures hold the slices as tiles, row by row, from the feet up; in a tile the patient's right is on the left and
the front is up. The page's script cuts the tiles out and shows them in any plane.
"""

import base64
import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .preview import ShownCase

STEP_MM = 1.6
"""Pixel size of a tile, unless the CT's own pixels are larger."""

MOST_PIXELS, MOST_SLICES = 256, 64
"""A tile's longer side, and the tiles, at most."""

CODE_STEP = 50
"""Grey levels between two codes in the picture of the labels, so that no browser's rounding mixes them up."""

_CT_QUALITY, _PREVIEW_QUALITY, _PREVIEW_WIDTH = 55, 65, 1100


@dataclass(frozen=True)
class SmallScan:
    """A downsampled CT and its labels, (slices, rows, columns).

    Attributes:
        grey: the CT, 0 to 255 over the HU window.
        codes: the labels.
        spacing: mm between slices, rows and columns.
    """

    grey: NDArray[np.uint8]
    codes: NDArray[np.uint8]
    spacing: tuple[float, float, float]


def shrink(shown: ShownCase) -> SmallScan:
    """Downsample what a preview shows of a case: the CT by averaging in plane, labels by the nearest voxel."""
    from PIL import Image

    volume, extent = shown.volume, shown.extent
    sides = [part.stop - part.start for part in extent]
    mm = [count * step for count, step in zip(sides, volume.spacing, strict=True)]
    step = max(STEP_MM, max(mm[1:]) / MOST_PIXELS)
    rows, columns = (max(1, min(n, round(length / step))) for n, length in zip(sides[1:], mm[1:], strict=True))
    slices = min(sides[0], MOST_SLICES)
    z = _middles(sides[0], slices) + extent[0].start
    y, x = _middles(sides[1], rows)[::-1] + extent[1].start, _middles(sides[2], columns)[::-1] + extent[2].start
    grey = np.empty((slices, rows, columns), np.uint8)
    for tile, index in zip(grey, z, strict=True):
        plane = volume.unit(volume.array[index, extent[1], extent[2]])[::-1, ::-1]
        picture = Image.fromarray(np.rint(plane * 255).astype(np.uint8))
        tile[:] = picture.resize((columns, rows), Image.Resampling.BOX)
    codes = shown.codes[np.ix_(z, y, x)]
    return SmallScan(grey, codes, (mm[0] / slices, mm[1] / rows, mm[2] / columns))


def page_pictures(shown: ShownCase, preview: Any) -> dict[str, Any]:
    """What a page embeds of one case, fit for JSON; its pictures are `data:` addresses.

    Args:
        shown: the case.
        preview: its preview, a Pillow picture.
    """
    scan = shrink(shown)
    slices, rows, columns = scan.grey.shape
    # As square as the tiles allow: browsers limit a picture's sides.
    across = max(1, math.ceil(math.sqrt(slices * rows / columns)))
    small = preview.resize((_PREVIEW_WIDTH, round(preview.height * _PREVIEW_WIDTH / preview.width)))
    return {
        "preview": _address(small, "WEBP", quality=_PREVIEW_QUALITY, method=2),
        "preview_size": small.size,
        "shape": [slices, rows, columns],
        "spacing_mm": [round(step, 4) for step in scan.spacing],
        "across": across,
        "code_step": CODE_STEP,
        "first": [_fullest(scan.codes, axis) for axis in range(3)],
        "ct": _address(_tiles(scan.grey, across), "WEBP", quality=_CT_QUALITY, method=2),
        "labels": _address(_tiles(scan.codes * np.uint8(CODE_STEP), across), "PNG", optimize=True),
    }


def _fullest(codes: NDArray[np.uint8], axis: int) -> int:
    """The slice along an axis with most labelled voxels; the middle one where there are none."""
    counts = np.count_nonzero(codes, axis=tuple(other for other in range(3) if other != axis))
    return int(counts.argmax()) if counts.any() else len(counts) // 2


def _middles(voxels: int, samples: int) -> NDArray[np.int64]:
    """Indices of the voxels in the middle of `samples` equal parts of `voxels`."""
    middles: NDArray[np.int64] = ((np.arange(samples) + 0.5) * voxels / samples).astype(np.int64)
    return middles


def _tiles(stack: NDArray[np.uint8], across: int) -> Any:
    from PIL import Image

    slices, rows, columns = stack.shape
    down = math.ceil(slices / across)
    sheet = np.zeros((down * across, rows, columns), np.uint8)
    sheet[:slices] = stack
    sheet = sheet.reshape(down, across, rows, columns).swapaxes(1, 2).reshape(down * rows, across * columns)
    return Image.fromarray(sheet)


def _address(picture: Any, kind: str, **options: Any) -> str:
    content = io.BytesIO()
    picture.save(content, format=kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content.getvalue()).decode()}"
