"""One picture per case, to see at a glance what was found: the organs' contours on the CT, as PNG.

Radiological convention: the patient's right is on the picture's left, anterior is up in axial and left in sagittal
views, superior is up. Only Pillow is needed for it, and is loaded when a picture is drawn; neither a display nor an
installed font is used.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from .box import Box
from .errors import FastorganError, VolumeError
from .files import whole_file
from .intensity import WINDOW_HU
from .labels import ORGANS, Organ
from .report import NOTICE, OrganMeasure, measure
from .volume import Volume, read_volume

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]

PANEL = (520, 390)
"""Width and height in pixels of the place for one view; a view keeps its aspect ratio inside it."""

BACKGROUND: Colour = (16, 18, 22)
TEXT: Colour = (234, 236, 240)
FAINT: Colour = (146, 152, 162)

_COLUMNS = 3
_MARGIN, _GAP = 32, 16  # px around everything, px between panels
_HEADER, _CAPTION, _FOOTER = 76, 34, 84  # px
_LINE = 2.0  # width of a contour, px
_FILL = 0.09  # opacity of the tint inside a contour
_BEYOND_MM = 40.0  # shown above and below the organs where the scan goes on
_BODY_HU = -150.0  # between lung and fat
# Per axis of the view's normal (z, y, x): name, then what is at the picture's left, right, top and bottom.
_PLANES = (("axial", "RLAP"), ("coronal", "RLSI"), ("sagittal", "APSI"))


def write_preview(
    path: Path, image: nib.Nifti1Image, labels: nib.Nifti1Image, *, case: str = "", roi: Box | None = None
) -> None:
    """Draw a case and write it as PNG, whole or not at all.

    Args:
        path: the file; one that is there is replaced.
        image: CT in HU, in any orientation.
        labels: codes of `fastorgan.labels` on the CT's grid; other codes are not drawn.
        case: the case's name in the picture; by default the CT's file name.
        roi: a box to draw, in voxels of the upright CT as `roi.locate` gives it.

    Raises:
        VolumeError: the image is no CT volume, the labels are not on its grid, or the file cannot be written.
        FastorganError: Pillow is not installed.
    """
    source = image.get_filename()
    title = case or (Path(source).name.removesuffix(".gz").removesuffix(".nii") if source else "unnamed")
    volume = read_volume(image, str(source or title))
    codes = _read_codes(labels, image, str(labels.get_filename() or f"the labels of {title}"))
    save_preview(draw_preview(volume, codes, case=title, roi=roi), path)


def draw_preview(volume: Volume, labels: NDArray[np.uint8], *, case: str, roi: Box | None = None) -> "Image.Image":
    """Draw a case: a row for each organ, with the axial, the coronal and the sagittal slice that have most of it.

    Args:
        volume: the CT.
        labels: codes in the axes of the CT's file.
        case: the case's name in the picture.
        roi: a box to draw, in voxels of `volume`.

    Returns:
        An RGB picture of one size. Slices are counted from the patient's feet, back and left. An organ without a
        voxel is listed as not found, and a slice through the middle of the others stands in its place.

    Raises:
        VolumeError: the labels are not three-dimensional or not of the CT's shape.
        FastorganError: Pillow is not installed.
    """
    if labels.shape != volume.grid.shape:
        raise VolumeError(_shape_message(f"the labels of {case}", labels.shape, volume.grid.shape))
    return draw_case(ShownCase.of(volume, labels, roi), case)


def draw_case(shown: "ShownCase", case: str) -> "Image.Image":
    """Draw what `draw_preview` does.

    Raises:
        FastorganError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise FastorganError("a preview needs Pillow, which is not installed; try: pip install pillow") from error
    volume, views = shown.volume, shown.views()
    rows = -(-len(views) // _COLUMNS)
    width = 2 * _MARGIN + _COLUMNS * PANEL[0] + (_COLUMNS - 1) * _GAP
    height = _HEADER + rows * (_CAPTION + PANEL[1] + _GAP) + _FOOTER
    picture = Image.new("RGB", (width, height), BACKGROUND)
    pen = _Pen.on(picture)
    _draw_header(pen, case, volume, width)
    for number, view in enumerate(views):
        row, column = divmod(number, _COLUMNS)
        left = _MARGIN + column * (PANEL[0] + _GAP)
        top = _HEADER + row * (_CAPTION + PANEL[1] + _GAP)
        _draw_caption(pen, shown, view, left, top)
        _draw_view(picture, pen, shown, view, (left, top + _CAPTION))
    _draw_footer(pen, shown, height)
    return picture


def save_preview(picture: "Image.Image", path: Path) -> None:
    """Write a picture as PNG, so that `path` is either as it was or whole.

    Raises:
        VolumeError: the folder cannot be written to, or the disk is full.
    """
    try:
        with whole_file(path, ".png") as partial:
            picture.save(partial, format="PNG")
    except OSError as error:
        raise VolumeError(f"{path}: cannot be written ({error.strerror or error})") from error


def _read_codes(labels: nib.Nifti1Image, image: nib.Nifti1Image, name: str) -> NDArray[np.uint8]:
    """The codes of a label image, checked to lie on the CT's grid."""
    shape = tuple(int(n) for n in image.shape[:3])
    if len(labels.shape) < 3 or labels.shape[:3] != shape or any(n != 1 for n in labels.shape[3:]):
        raise VolumeError(_shape_message(name, labels.shape, shape))
    corners = np.array([[*np.multiply(index, np.array(shape) - 1), 1] for index in np.ndindex(2, 2, 2)])
    apart = np.linalg.norm(corners @ (labels.affine - image.affine).T, axis=1).max()
    if not apart <= 0.5 * nib.affines.voxel_sizes(image.affine).min():
        raise VolumeError(f"{name}: lies {apart:.1f} mm off the CT; give the labels of this CT")
    try:
        values = np.asanyarray(labels.dataobj).reshape(shape)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise VolumeError(f"{name}: damaged, its voxels cannot be read ({' '.join(str(error).split())})") from error
    if values.dtype == np.uint8:
        return values
    codes: NDArray[np.uint8] = np.clip(np.rint(np.nan_to_num(values)), 0, 255).astype(np.uint8)
    return codes


def _shape_message(name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    shown, expected = (" x ".join(map(str, sides)) for sides in (shape, wanted))
    return f"{name}: the shape is {shown}, the CT's is {expected}; give the labels of this CT"


# --- what is shown ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _View:
    """One slice: the axis (z, y, x) it is perpendicular to, its index, and the organ it is chosen for."""

    axis: int
    index: int
    organ: Organ


@dataclass(frozen=True)
class ShownCase:
    """A CT with its labels, both upright (z, y, x).

    Attributes:
        volume: the CT.
        codes: its labels.
        measures: volume in ml by organ name.
        profiles: voxels per slice of each organ, by code: one array per axis.
        roi: the box to draw.
        extent: first and one past the last voxel shown, per axis.
    """

    volume: Volume
    codes: NDArray[np.uint8]
    measures: Mapping[str, OrganMeasure]
    profiles: Mapping[int, tuple[NDArray[np.int64], ...]]
    roi: Box | None
    extent: tuple[slice, ...]

    @classmethod
    def of(cls, volume: Volume, labels: NDArray[np.uint8], roi: Box | None) -> "ShownCase":
        """Set labels in the file's axes upright beside the CT and choose what to show."""
        codes = upright_labels(volume, labels)
        profiles = _profiles(codes)
        whole = cls(volume, codes, measure(labels, volume.spacing), profiles, roi, (slice(None),) * 3)
        return cls(volume, codes, whole.measures, profiles, roi, whole._shown())

    def views(self) -> list[_View]:
        """Row by row: an organ's axial, coronal and sagittal view."""
        return [_View(axis, self._fullest(axis, organ), organ) for organ in ORGANS for axis in range(3)]

    def found(self, organ: Organ) -> bool:
        """Whether any voxel bears the organ's code."""
        return self.measures[organ.name].volume_ml > 0

    def _fullest(self, axis: int, organ: Organ) -> int:
        """The slice with most of the organ; without it the middle one of the others; else the scan's middle."""
        if self.found(organ):
            return int(self.profiles[organ.code][axis].argmax())
        others = [self.profiles[organ.code][axis] for organ in ORGANS if self.found(organ)]
        used = np.flatnonzero(np.sum(others, axis=0)) if others else np.arange(self.volume.shape[axis])
        return int(used[len(used) // 2])

    def _shown(self) -> tuple[slice, ...]:
        """The body in plane, and along z the organs and the box with some room; all of the CT where it has neither."""
        shape, spacing = self.volume.shape, self.volume.spacing
        bodies = [_body(self.volume.unit(self.volume.array[view.index])) for view in self.views() if view.axis == 0]
        body = np.any(bodies, axis=0)
        used = [np.sum([profile[axis] for profile in self.profiles.values()], axis=0) > 0 for axis in range(3)]
        used[1] |= body.any(axis=1)
        used[2] |= body.any(axis=0)
        shown = []
        for axis, room in enumerate((_BEYOND_MM, 6.0, 6.0)):
            edges = [float(edge) for edge in np.flatnonzero(used[axis])[[0, -1]] + (0, 1)] if used[axis].any() else []
            if self.roi is not None and (edges or axis > 0):
                edges += [self.roi.start[axis], self.roi.stop[axis]]
            pad = room / spacing[axis]
            low, high = (min(edges) - pad, max(edges) + pad) if edges else (0.0, float(shape[axis]))
            shown.append(slice(max(0, int(np.floor(low))), min(shape[axis], int(np.ceil(high)))))
        return tuple(shown)


def upright_labels(volume: Volume, labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Labels in the axes of a CT's file on the grid (z, y, x) of `volume`; nearest voxels where the scan is oblique."""
    codes: NDArray[np.uint8] = volume.grid.reorient(labels)
    if volume.grid.upright is not None:
        back = np.linalg.inv(volume.grid.upright)
        codes = ndimage.affine_transform(codes, back[:3, :3], back[:3, 3], volume.shape, order=0)
    return codes


def _profiles(codes: NDArray[np.uint8]) -> dict[int, tuple[NDArray[np.int64], ...]]:
    """Voxels of each organ per slice along z, y and x; counted slice by slice, without a mask of the volume."""
    counts = {organ.code: tuple(np.zeros(n, np.int64) for n in codes.shape) for organ in ORGANS}
    for z, plane in enumerate(codes):
        if not plane.any():
            continue
        for code, (along_z, along_y, along_x) in counts.items():
            mask = plane == code
            along_z[z] = np.count_nonzero(mask)
            if along_z[z]:
                along_y += np.count_nonzero(mask, axis=1)
                along_x += np.count_nonzero(mask, axis=0)
    return counts


def _body(unit: NDArray[np.float32]) -> NDArray[np.bool_]:
    """The largest connected piece of an axial slice that is denser than lung: the patient without the couch."""
    low, high = WINDOW_HU
    pieces, count = ndimage.label(unit > (_BODY_HU - low) / (high - low))
    if count == 0:
        return np.zeros(unit.shape, bool)
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    body: NDArray[np.bool_] = pieces == sizes.argmax()
    return body


# --- drawing ----------------------------------------------------------------------------------------------------------


@cache
def _font(size: float) -> "ImageFont.FreeTypeFont | ImageFont.ImageFont":
    """The font that Pillow brings along."""
    from PIL import ImageFont

    return ImageFont.load_default(size)


@dataclass(frozen=True)
class _Pen:
    """Writes and draws lines on the picture."""

    draw: "ImageDraw.ImageDraw"

    @classmethod
    def on(cls, picture: "Image.Image") -> "_Pen":
        from PIL import ImageDraw

        return cls(ImageDraw.Draw(picture))

    def write(
        self, at: tuple[float, float], text: str, size: float, colour: Colour = TEXT, anchor: str = "ls"
    ) -> float:
        """Write a line and return its width; `anchor` as in Pillow."""
        font = _font(size)
        # The dark rim keeps letters legible on the CT.
        self.draw.text(at, text, fill=colour, font=font, anchor=anchor, stroke_width=2, stroke_fill=BACKGROUND)
        return float(self.draw.textlength(text, font=font))

    def shortened(self, text: str, size: float, width: float) -> str:
        """The text on one line, its middle left out where it is wider than `width`."""
        line, font = " ".join(text.split()), _font(size)
        short, kept = line, len(line)
        while self.draw.textlength(short, font=font) > width and kept > 2:
            kept -= 1
            short = f"{line[: kept - kept // 2]}...{line[len(line) - kept // 2 :]}"
        return short

    def dashed(self, start: tuple[float, float], stop: tuple[float, float], colour: Colour) -> None:
        """A thin dashed line."""
        length = float(np.hypot(stop[0] - start[0], stop[1] - start[1]))
        for at in np.arange(0, length, 9):
            a, b = at / length, min(1.0, (at + 5) / length)
            ends = [(start[0] + (stop[0] - start[0]) * t, start[1] + (stop[1] - start[1]) * t) for t in (a, b)]
            self.draw.line(ends, fill=colour, width=1)


def _draw_header(pen: _Pen, name: str, volume: Volume, width: int) -> None:
    base = _HEADER - 28
    shape = " x ".join(str(n) for n in volume.shape[::-1])
    spacing = " x ".join(f"{mm:.2f}" for mm in volume.spacing[::-1])
    low, high = WINDOW_HU
    facts = f"{shape} voxels   {spacing} mm   {low:.0f} to {high:.0f} HU"
    used = pen.write((width - _MARGIN, base), facts, 17, FAINT, "rs")
    pen.write((_MARGIN, base), pen.shortened(name, 30, width - 2 * _MARGIN - used - 40), 30)


def _draw_caption(pen: _Pen, case: ShownCase, view: _View, left: int, top: int) -> None:
    base = top + _CAPTION - 11
    plane = f"{_PLANES[view.axis][0]} {view.index + 1} / {case.volume.shape[view.axis]}"
    if view.axis > 0:
        pen.write((left, base), plane, 16, FAINT)
        return
    pen.draw.rounded_rectangle((left, base - 13, left + 13, base), radius=3, fill=view.organ.colour)
    found = case.found(view.organ)
    text = view.organ.name.capitalize() + ("" if found else " not found")
    used = pen.write((left + 22, base), text, 19, TEXT if found else FAINT)
    pen.write((left + 22 + used + 14, base), plane, 16, FAINT)


def _draw_footer(pen: _Pen, case: ShownCase, height: int) -> None:
    """Each organ's volume, and what this is not."""
    base, at = height - _FOOTER + 24, float(_MARGIN)
    for organ in ORGANS:
        size = case.measures[organ.name]
        pen.draw.rounded_rectangle((at, base - 14, at + 15, base + 1), radius=3, fill=organ.colour)
        at += 25
        at += pen.write((at, base), organ.name.capitalize(), 20) + 9
        digits = 0 if size.volume_ml >= 10 else 1
        text = f"{size.volume_ml:.{digits}f} ml" if case.found(organ) else "not found"
        at += pen.write((at, base), text + (", reaches the scan's edge" if size.touches_border else ""), 20, FAINT) + 44
    if case.roi is not None:
        pen.dashed((at, base - 6), (at + 30, base - 6), TEXT)
        pen.write((at + 40, base), "Region of interest", 20, FAINT)
    pen.write((_MARGIN, height - 26), NOTICE, 16, FAINT)


def _draw_view(picture: "Image.Image", pen: _Pen, case: ShownCase, view: _View, corner: tuple[int, int]) -> None:
    """One view in the middle of its place, with the organs' contours, the box, a scale and the directions."""
    from PIL import Image

    across = [axis for axis in range(3) if axis != view.axis]  # the rows' axis, then the columns'
    window = tuple(view.index if axis == view.axis else case.extent[axis] for axis in range(3))
    extent = [case.extent[axis] for axis in across]
    mm = [(part.stop - part.start) * case.volume.spacing[axis] for part, axis in zip(extent, across, strict=True)]
    zoom = min(PANEL[0] / mm[1], PANEL[1] / mm[0])  # px per mm
    height, width = (max(1, round(length * zoom)) for length in mm)
    left, top = corner[0] + (PANEL[0] - width) // 2, corner[1] + (PANEL[1] - height) // 2

    # Both picture axes run against the upright array's: to the patient's left or back, and down.
    grey = np.rint(case.volume.unit(case.volume.array[window])[::-1, ::-1] * 255).astype(np.uint8)
    grey = np.asarray(Image.fromarray(grey).resize((width, height), Image.Resampling.BICUBIC))
    rgb = np.repeat(grey[..., None], 3, axis=2).astype(np.float32)
    codes = case.codes[window][::-1, ::-1]
    for organ in ORGANS:
        mask = codes == organ.code
        if mask.any():
            _tint(rgb, mask, organ.colour)
    pen.draw.rectangle((corner[0], corner[1], corner[0] + PANEL[0] - 1, corner[1] + PANEL[1] - 1), fill=(0, 0, 0))
    picture.paste(Image.fromarray(np.rint(rgb).astype(np.uint8)), (left, top))

    if case.roi is not None and case.roi.start[view.axis] <= view.index + 0.5 <= case.roi.stop[view.axis]:
        sides = []
        for axis, part, pixels in zip(across, extent, (height, width), strict=True):
            edges = np.array([case.roi.stop[axis], case.roi.start[axis]])
            sides.append(np.clip((part.stop - edges) / (part.stop - part.start) * pixels, 0, pixels - 1))
        (upper, lower), (first, last) = sides[0] + top, sides[1] + left
        for a, b in (
            ((first, upper), (last, upper)),
            ((first, lower), (last, lower)),
            ((first, upper), (first, lower)),
            ((last, upper), (last, lower)),
        ):
            pen.dashed(a, b, TEXT)
    _draw_frame(pen, _PLANES[view.axis][1], corner, zoom)


def _draw_frame(pen: _Pen, directions: str, corner: tuple[int, int], zoom: float) -> None:
    """The directions at the sides of a panel, and a bar of 5 cm."""
    (x, y), (w, h) = corner, PANEL
    spots = (
        (x + 8, y + h / 2, "lm"),
        (x + w - 8, y + h / 2, "rm"),
        (x + w / 2, y + 6, "mt"),
        (x + w / 2, y + h - 6, "mb"),
    )
    for letter, (px, py, anchor) in zip(directions, spots, strict=True):
        pen.write((px, py), letter, 16, FAINT, anchor)
    bar = 50 * zoom
    pen.draw.line([(x + w - 12 - bar, y + h - 12), (x + w - 12, y + h - 12)], fill=TEXT, width=2)
    pen.write((x + w - 12 - bar / 2, y + h - 18), "5 cm", 14, FAINT, "ms")


def _tint(rgb: NDArray[np.float32], mask: NDArray[np.bool_], colour: Colour) -> None:
    """Draw a mask's contour, anti-aliased, and a light tint inside it.

    Args:
        rgb: the picture (height, width, 3), 0 to 255; changed in place.
        mask: (rows, columns) at the CT's resolution, over the same field.
        colour: of the contour.
    """
    from PIL import Image

    height, width = rgb.shape[:2]
    coarse = Image.fromarray(mask.astype(np.uint8) * 255)
    inside = np.asarray(coarse.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float32) / 255
    # Voxels are larger than pixels: without this the contour would show their corners.
    inside = ndimage.gaussian_filter(inside, [0.4 * n / m for n, m in zip((height, width), mask.shape, strict=True)])
    # Distance to the level 1/2 in pixels, to first order.
    slope = np.hypot(*np.gradient(inside)) if min(height, width) > 1 else np.ones_like(inside)
    distance = np.abs(inside - 0.5) / np.maximum(slope, 1e-3)
    opacity = np.maximum(np.clip(_LINE / 2 + 0.5 - distance, 0, 1), _FILL * (inside > 0.5))
    rgb += (np.array(colour, dtype=np.float32) - rgb) * opacity[..., None].astype(np.float32)
