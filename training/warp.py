"""Warp cached scans to the organ shapes of label maps, so that few scans show many anatomies.

A scan takes another patient's shapes: its organs are registered to those of a label map by their labels alone, and the
CT and all its labels follow. The label map needs no CT, so it may come from where images are not passed on; since the
scan's own labels are carried along, they fit the warped CT as well as they fitted the scan.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fastorgan.box import extent_mm
from fastorgan.labels import CLASSES, ORGANS

from .borders import nn_sample
from .cache import FINEST_MM, SURROUND_MM, CachedVolume, load_cache, upright_codes
from .cases import DataError
from .sampling import Scan

Vector = NDArray[np.float64]
Codes = NDArray[np.uint8]

LIVER, KIDNEY, SPLEEN, PANCREAS = (organ.code for organ in ORGANS)
LEFT_KIDNEY = 13
"""FLARE22's code, which its right kidney shares with both kidneys of FLARE21."""

MATCHED = {LIVER: 1.0, KIDNEY: 1.0, SPLEEN: 1.0, PANCREAS: 2.0, 10: 0.5, 11: 1.0, 12: 0.5, LEFT_KIDNEY: 1.0}
"""What is registered, by FLARE22's codes, with its weight: the organs, oesophagus, stomach and duodenum."""

STEP_MM = 5.0
"""Voxels of the grid on which labels are compared."""

ROOM_MM = 40.0
"""Around the shape's organs, in that grid."""

MOST_CUT = 0.25
"""An organ counts as cut where its area at an end of the scan is a larger share of its largest area than this."""

LEAST_DSC = 0.85
"""Of each of the four organs, the kidneys apart; a scan that cannot be made to fit a shape so well is left out."""


@dataclass(frozen=True)
class Stage:
    """One of the stages of a registration, from coarse to fine.

    Attributes:
        knot_mm: distance of the knots of the displacement; None moves and scales along the axes alone.
        steps: of Adam.
        rate: of Adam, in mm.
        smooth: weight of the displacement's mean squared slope.
    """

    knot_mm: float | None
    steps: int
    rate: float
    smooth: float


STAGES = (Stage(None, 25, 2.0, 0.0), Stage(50, 35, 3.0, 0.3), Stage(25, 45, 2.0, 0.2), Stage(15, 45, 1.2, 0.15))

FOLDING = 20.0
"""Weight of what keeps a scan from being squeezed along an axis to less than .4 of its length, or drawn out to more
than 2.9 times; where it would fold, this alone is much more than organs can gain."""


@dataclass(frozen=True)
class Shape:
    """Labelled organs.

    Attributes:
        name: of the file.
        codes: (z, y, x) upright, by FLARE22's codes: kidneys apart where both are labelled.
        spacing: mm (z, y, x).
    """

    name: str
    codes: Codes
    spacing: Vector

    @classmethod
    def read(cls, path: Path) -> "Shape":
        """Read a label map: the codes of `labels/`, or of `structures/`.

        Raises:
            VolumeError: if the file cannot be read.
            DataError: if it holds other values, or lacks liver, spleen or pancreas.
        """
        from fastorgan.volume import load_image

        codes, spacing = upright_codes(load_image(path), path, LEFT_KIDNEY + 1)
        for organ in ORGANS:
            if organ.code != KIDNEY and not (codes == organ.code).any():
                raise DataError(f"{path}: holds no {organ.name}; a shape needs it")
        return cls(path.name.removesuffix(".nii.gz"), kidneys_apart(codes), spacing)

    @classmethod
    def of(cls, volume: CachedVolume) -> "Shape":
        """The shape of a cached scan, which has liver and spleen."""
        return cls(volume.name, kidneys_apart(volume.labels), volume.spacing)

    @property
    def size_mm(self) -> Vector:
        """Extent of the array (z, y, x)."""
        return np.asarray(self.codes.shape) * self.spacing


@dataclass(frozen=True)
class Deformation:
    """Where in a scan each place of a shape lies.

    Attributes:
        low, high: edges of the displacement's grid in mm (z, y, x) from the shape's first corner.
        scale, shift: (3,), the part that is the same along the whole of an axis; shift in mm.
        displacement: (1, 3, d, h, w) in mm, to be added.
        dsc: by code, how well the scan's organs fit the shape's.
    """

    low: Vector
    high: Vector
    scale: Tensor
    shift: Tensor
    displacement: Tensor
    dsc: dict[int, float]

    def __call__(self, points: Tensor) -> Tensor:
        """Map points (3, ...) in mm from the shape's first corner to mm from the scan's."""
        field = nn_sample(
            self.displacement, _grid(points - _column(self.low), self.high - self.low), "bilinear", "border"
        )
        return _column(self.scale) * points + _column(self.shift) + field[0]


def kidneys_apart(codes: Codes) -> Codes:
    """Give the left kidney its own code, by the middle between liver and spleen; unchanged where it has one."""
    kidneys = codes == KIDNEY
    if (codes == LEFT_KIDNEY).any() or not kidneys.any():
        return codes
    middle = np.mean([np.flatnonzero((codes == code).any(axis=(0, 1))).mean() for code in (LIVER, SPLEEN)])
    # The first column is the patient's left.
    left = kidneys & (np.arange(codes.shape[2]) < middle)
    return np.where(left, np.uint8(LEFT_KIDNEY), codes)


def is_whole(volume: CachedVolume) -> bool:
    """Whether a scan shows all four organs, of which the kidneys alone may be cut."""
    present = all((volume.labels == organ.code).any() for organ in ORGANS)
    return present and not any(_is_cut(volume.labels, code) for code in (LIVER, SPLEEN, PANCREAS))


def register(scan: Shape, shape: Shape) -> Deformation:
    """Find the deformation that makes the organs of `scan` those of `shape`.

    Minimises one minus the weighted mean of soft DSC over the codes that both have and the scan has uncut, plus the
    displacement's slope and what keeps it from folding, by Adam in `STAGES`.
    """
    both = [code for code in MATCHED if (scan.codes == code).any() and (shape.codes == code).any()]
    codes = [code for code in both if not _is_cut(scan.codes, code)]
    scan_low, scan_high = _ends(scan)
    shape_low, shape_high = _ends(shape)
    low, high = shape_low - ROOM_MM, shape_high + ROOM_MM
    size = [math.ceil(n) for n in (high - low) / STEP_MM]
    points = _points(low, high, size)
    weights = torch.tensor([MATCHED[code] for code in codes])
    wanted = _shares(shape, codes, points).flatten(1)
    whole = [math.ceil(n) for n in scan.size_mm / STEP_MM]
    own = _shares(scan, codes, _points(np.zeros(3), scan.size_mm, whole))[None]
    begin = np.exp(np.clip(np.log((scan_high - scan_low) / (shape_high - shape_low)), -0.4, 0.4))
    middle = (scan_low + scan_high) / 2 - begin * (shape_low + shape_high) / 2
    scale = torch.as_tensor(begin, dtype=torch.float32).requires_grad_()
    shift = torch.as_tensor(middle, dtype=torch.float32).requires_grad_()
    knots = torch.zeros(1, 3, 2, 2, 2)

    def placed(moved: Tensor) -> Tensor:
        return _column(scale) * points + _column(shift) + moved[0]

    def dsc(places: Tensor) -> Tensor:
        found = nn_sample(own, _grid(places, scan.size_mm), "bilinear", "zeros")[0].flatten(1)
        return 2 * (found * wanted).sum(1) / (found.square().sum(1) + wanted.square().sum(1) + 1e-6)

    for stage in STAGES:
        if stage.knot_mm is None:
            groups = [{"params": [scale], "lr": 0.005}, {"params": [shift], "lr": stage.rate}]
        else:
            counts = [math.ceil(n / stage.knot_mm) + 2 for n in high - low]
            knots = _enlarged(knots.detach(), counts).requires_grad_()
            groups = [{"params": [knots], "lr": stage.rate}]
        adam = torch.optim.Adam(groups)
        for _ in range(stage.steps):
            moved = _smooth(_enlarged(knots, size))
            places = placed(moved)
            loss = 1 - (weights * dsc(places)).sum() / weights.sum()
            loss = loss + stage.smooth * _slope(moved[0]) + FOLDING * _folding(places)
            adam.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            adam.step()
    with torch.no_grad():
        moved = _smooth(_enlarged(knots, size))
        fit = dsc(placed(moved))
    return Deformation(low, high, scale.detach(), shift.detach(), moved, dict(zip(codes, fit.tolist(), strict=True)))


def warp(volume: CachedVolume, shape: Shape) -> tuple[CachedVolume, dict[int, float]]:
    """Give a cached scan the organs' shapes of a label map.

    The result shows the shape's organs and as much around them as the cache keeps, as far as the scan reaches up and
    down; what lies beyond its cached surroundings is `IGNORE`. It counts as a scan of the same patient.

    Args:
        volume: for the organ net; one that `is_whole`.
        shape: whose coordinates the result has.

    Returns:
        The warped scan, and by FLARE22's codes how well its organs fit the shape's (DSC).
    """
    scan = Shape.of(volume)
    deformation = register(scan, shape)
    low, high = deformation.low - (SURROUND_MM - ROOM_MM), deformation.high + (SURROUND_MM - ROOM_MM)
    spacing = np.maximum(FINEST_MM, volume.spacing)
    size = [math.ceil(n) for n in (high - low) / spacing]
    places = deformation(_points(low, low + size * spacing, size))
    grid = _grid(places, scan.size_mm)
    image = nn_sample(torch.from_numpy(volume.image)[None, None].float(), grid, "bilinear", "border")[0, 0]
    codes = Scan.to_device(volume, grid.device).codes_at(grid)[0]
    # Slices beyond the scan would be its last one again and again.
    inside = ((places[0] >= 0) & (places[0] < scan.size_mm[0])).float().mean((1, 2)) > 0.5
    seen = np.flatnonzero(inside.numpy())
    part = slice(int(seen[0]), int(seen[-1]) + 1)
    levels, labels = image.round().byte().numpy()[part], codes.byte().numpy()[part]
    extent = np.asarray(labels.shape) * spacing
    organs_mm = np.stack(extent_mm((labels > 0) & (labels < CLASSES), tuple(spacing)))
    name = f"{volume.name}.{shape.name}"
    return (
        CachedVolume(name, volume.patient, levels, labels, spacing, np.zeros(3), extent, organs_mm),
        deformation.dsc,
    )


@dataclass(frozen=True)
class Warped:
    """What became of one scan and one shape.

    Attributes:
        name: of the warped scan.
        dsc: by FLARE22's codes, of the scan's organs with the shape's; None where the file was there already.
    """

    name: str
    dsc: dict[int, float] | None

    @property
    def organs(self) -> dict[str, float]:
        """DSC of the organs by name, the kidneys apart, as far as they were registered."""
        names = {**{organ.code: organ.name for organ in ORGANS}, LEFT_KIDNEY: "left kidney"}
        return {name: self.dsc[code] for code, name in names.items() if self.dsc and code in self.dsc}

    @property
    def fits(self) -> bool:
        """Whether each organ fits well enough for the warped scan to be kept."""
        return all(fit >= LEAST_DSC for fit in self.organs.values())

    def text(self) -> str:
        """One line for people."""
        if self.dsc is None:
            return "there already"
        fit = ", ".join(f"{name} {dsc:.3f}" for name, dsc in self.organs.items())
        return fit if self.fits else f"{fit}; left out, since it does not fit"


def find_shapes(folder: Path) -> list[Path]:
    """List the label maps of a folder.

    Raises:
        DataError: if there are none.
    """
    shapes = sorted(folder.glob("*.nii.gz"))
    if not shapes:
        raise DataError(f"{folder}: no *.nii.gz files; shapes are label maps")
    return shapes


def find_whole(cache: Path) -> list[CachedVolume]:
    """Load the scans of a cache folder that can be warped.

    Raises:
        DataError: if there are none.
    """
    whole = [volume for volume in load_cache(cache, "organs") if is_whole(volume)]
    if not whole:
        raise DataError(f"{cache}: no scan shows all four organs whole enough; there is nothing to warp")
    return whole


def warp_all(
    volumes: Sequence[CachedVolume], shapes: Sequence[Path], out: Path, each: int, seed: int
) -> Iterator[Warped]:
    """Warp every scan to `each` of the shapes, dealt out like cards, and write NAME.SHAPE.organs.npz to `out`.

    The same seed deals the same shapes, so that an interrupted run is gone on with.

    Raises:
        DataError: if a shape cannot be used.
        VolumeError: if a shape cannot be read.
    """
    out.mkdir(parents=True, exist_ok=True)
    deck = np.random.default_rng(seed).permutation(len(shapes)).tolist()
    each = min(each, len(shapes))
    for number, volume in enumerate(volume for volume in volumes for _ in range(each)):
        shape = shapes[deck[number % len(deck)]]
        name = f"{volume.name}.{shape.name.removesuffix('.nii.gz')}"
        path = out / f"{name}.organs.npz"
        if path.exists():
            yield Warped(name, None)
            continue
        result, dsc = warp(volume, Shape.read(shape))
        warped = Warped(name, dsc)
        if warped.fits:
            result.save(path)
        yield warped


def _is_cut(codes: Codes, code: int) -> bool:
    areas = (codes == code).sum(axis=(1, 2))
    return bool(max(areas[0], areas[-1]) > MOST_CUT * areas.max())


def _points(low: Vector, high: Vector, size: Sequence[int]) -> Tensor:
    """Centres (3, *size) in mm of voxels that fill the box."""
    axes = [
        torch.as_tensor(first + (np.arange(count) + 0.5) * (last - first) / count, dtype=torch.float32)
        for first, last, count in zip(low, high, size, strict=True)
    ]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


def _grid(points: Tensor, size_mm: Vector) -> Tensor:
    """Torch's sampling grid (1, ..., 3) of points (3, ...) in an array of an extent in mm."""
    return (points / _column(size_mm) * 2 - 1).movedim(0, -1).flip(-1)[None]


def _column(vector: Vector | Tensor) -> Tensor:
    return torch.as_tensor(vector, dtype=torch.float32)[:, None, None, None]


def _ends(shape: Shape) -> tuple[Vector, Vector]:
    """The box of what every shape has, in mm."""
    return extent_mm(np.isin(shape.codes, (LIVER, SPLEEN, PANCREAS)), tuple(shape.spacing))


def _shares(shape: Shape, codes: Sequence[int], points: Tensor) -> Tensor:
    """Share (C, ...) of each code in the voxels around the points."""
    kernel = [1 + 2 * round((STEP_MM / s - 1) / 2) if s < STEP_MM else 1 for s in shape.spacing]
    grid = _grid(points, shape.size_mm)
    shares = []
    for code in codes:
        mask = torch.from_numpy((shape.codes == code).astype(np.float32))[None, None]
        mask = functional.avg_pool3d(mask, kernel, 1, [n // 2 for n in kernel])
        shares.append(nn_sample(mask, grid, "bilinear", "zeros")[0, 0])
    return torch.stack(shares)


def _enlarged(knots: Tensor, size: Sequence[int]) -> Tensor:
    return functional.interpolate(knots, size=list(size), mode="trilinear", align_corners=True)


def _smooth(field: Tensor) -> Tensor:
    return functional.avg_pool3d(field, 3, 1, 1, count_include_pad=False)


def _slope(field: Tensor) -> Tensor:
    """Mean squared slope of a displacement (3, d, h, w) on the grid, summed over the axes."""
    slopes = [(torch.diff(field, dim=axis) / STEP_MM).square().mean() for axis in (1, 2, 3)]
    return torch.stack(slopes).sum()


def _folding(places: Tensor) -> Tensor:
    """How far, squared, each axis is stretched beyond the limits."""
    along = [torch.diff(places[axis], dim=axis) / STEP_MM for axis in range(3)]
    beyond = [((0.35 - a).relu().square() + (a - 2.5).relu().square()).mean() for a in along]
    return torch.stack(beyond).sum()
