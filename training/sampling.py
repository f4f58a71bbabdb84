"""Draw training samples in torch, on whatever device trains: a disturbed box, turned, stretched, bent and recoloured.

The box comes from the rule that inference uses (`fastorgan.box.frame`), applied to the labels' extent with the
errors that a ROI net makes, in a scan that may be cut shorter than it is.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastorgan.box import ROI_SIZE, Box, frame
from fastorgan.intensity import LEVELS, WINDOW_HU, to_network
from fastorgan.labels import CLASSES, IGNORE
from fastorgan.resample import axis_weights

from .borders import Borders, nn_sample
from .bowel import fill, gas_pockets
from .cache import CachedVolume
from .recipes import Augmentation

Vector = NDArray[np.float64]
"""Three numbers in the order (z, y, x)."""

HU_SPAN = WINDOW_HU[1] - WINDOW_HU[0]


@dataclass
class Scan:
    """A cached volume on the training device; `image` and `labels` are uint8 (z, y, x)."""

    source: CachedVolume
    image: Tensor
    labels: Tensor

    @cached_property
    def pockets(self) -> Tensor:
        """Numbers of `bowel.gas_pockets`, uint8 (z, y, x); found when they are first needed."""
        return torch.from_numpy(gas_pockets(self.source)).to(self.image.device)

    @cached_property
    def borders(self) -> Borders:
        """The organs' borders; found when they are first needed."""
        return Borders.of(self.source.labels, self.source.spacing, self.labels.device)

    def codes_at(self, grid: Tensor) -> Tensor:
        """Codes (1, ...) int64 at the places of a grid: `codes_at`, with organs ending where their `borders` run."""
        return self.borders.settle(codes_at(self.labels, grid), grid)

    @classmethod
    def to_device(cls, source: CachedVolume, device: torch.device) -> "Scan":
        """Put a cached volume on `device`."""
        return cls(source, torch.from_numpy(source.image).to(device), torch.from_numpy(source.labels).to(device))


class Sampler(Protocol):
    """Draws training samples from a scan."""

    def draw(self, scan: Scan) -> tuple[Tensor, Tensor]:
        """One sample of `scan`: the network's input, and the target."""
        ...


class OrganSampler:
    """Samples for the organ net: image (1, 1, *size) in the network's range, codes of the cache (1, *size) int64.

    Voxels outside the cached surroundings are `IGNORE`. Without an augmentation the sample is the labels' own box.
    """

    def __init__(self, size: tuple[int, int, int], augmentation: Augmentation | None, generator: np.random.Generator):
        self.size = size
        self.augmentation = augmentation
        self.random = generator

    def draw(self, scan: Scan) -> tuple[Tensor, Tensor]:
        """One sample of `scan`."""
        view = self._view(scan.source)
        grid, air = self._grid(scan, view)
        image = scan.image[None, None].float()
        unit = nn_sample(image, grid, "bilinear", "border") / LEVELS
        codes = scan.codes_at(grid)
        if self.augmentation is not None:
            if self.random.random() < self.augmentation.filled:
                pockets = codes_at(scan.pockets, grid)
                unit = fill(unit, pockets.masked_fill(pockets == IGNORE, 0), self.random)
            organs = torch.where(codes < CLASSES, codes, 0)
            unit = recolour(unit, self.augmentation, self.random, organs)
        if air is not None:
            unit = unit.masked_fill(air, 0.0)
            codes = codes.masked_fill(air[:, 0], 0)
        return centred(unit), codes

    def _view(self, source: CachedVolume) -> "View":
        """Frame the organs as inference does, in a scan that may be cut and may have air beyond its ends."""
        start, stop = source.organs_mm
        if self.augmentation is None:
            return View(*_framed(start, stop, np.zeros(3), source.scan_mm))
        floor, roof = self._cut(source)
        start = np.clip(start, floor, roof - 10) + self.random.normal(0, self.augmentation.face_mm, 3)
        stop = np.clip(stop, floor + 10, roof) + self.random.normal(0, self.augmentation.face_mm, 3)
        start, stop = np.minimum(start, stop - 20), np.maximum(stop, start + 20)
        if self.random.random() >= self.augmentation.padded:
            return View(*_framed(start, stop, floor, roof))
        lean = leaning(self.augmentation.tilt_degrees, self.random)
        reach = self.random.uniform(0, self.augmentation.padding_mm) * np.array([1.0, 0.0, 0.0])
        box = _framed(start, stop, floor - reach, roof + reach)
        return View(*box, Ends(float(floor[0]), float(roof[0]), lean, float(source.scan_mm[0])))

    def _cut(self, source: CachedVolume) -> tuple[Vector, Vector]:
        """Ends of a scan that shows only part of the organs, in mm (z, y, x)."""
        assert self.augmentation is not None
        floor, roof = np.zeros(3), source.scan_mm.copy()
        cut(floor, roof, 0, source.organs_mm, self.augmentation.cut, 0.3, self.random)
        cut_sides(floor, roof, source.organs_mm, self.augmentation.narrow, self.random)
        return floor, roof

    def _grid(self, scan: Scan, view: "View") -> tuple[Tensor, Tensor | None]:
        """Where in the cached array each voxel of the sample lies, in torch's [-1, 1] (x, y, z), and which are air."""
        device = scan.image.device
        low, high = view.low, view.high
        half = (high - low) / 2
        matrix = np.diag(half)
        if self.augmentation is not None:
            scale = np.exp(self.random.normal(0, self.augmentation.stretch, 3))
            turns = self.random.normal(0, 1, 3) * np.radians(self.augmentation.turn_degrees) * (1.0, 0.5, 0.5)
            matrix = rotation(turns) @ np.diag(half * scale)
        points = grid_points(self.size, device) @ torch.as_tensor(matrix.T, dtype=torch.float32, device=device)
        if self.augmentation is not None and self.augmentation.bend_mm > 0:
            points = points + bending(self.augmentation.bend_mm, 2 * half, self.size, self.random, device)
        centre = (low + high) / 2
        air = None if view.ends is None else view.ends.beyond(points, centre)
        centre = centre - scan.source.origin_mm
        cached_mm = scan.source.spacing * scan.source.image.shape
        shift = torch.as_tensor(centre * 2 / cached_mm - 1, dtype=torch.float32, device=device)
        factor = torch.as_tensor(2 / cached_mm, dtype=torch.float32, device=device)
        return (points * factor + shift).flip(-1)[None], air


@dataclass(frozen=True)
class Ends:
    """Where a scan ends along z, with air beyond.

    Attributes:
        floor, roof: in mm from the scan's corner, on the axis through the sample's centre.
        lean: slope of the two planes, mm along z for each mm along y and x.
        height: mm of the whole scan, beyond which nothing was scanned either.
    """

    floor: float
    roof: float
    lean: tuple[float, float]
    height: float

    def beyond(self, points: Tensor, centre: Vector) -> Tensor:
        """Which points (D, H, W, 3), in mm from `centre`, are air: (1, 1, D, H, W)."""
        z = points[..., 0] + float(centre[0])
        straight = z - points[..., 1] * self.lean[0] - points[..., 2] * self.lean[1]
        return ((straight < self.floor) | (straight > self.roof) | (z < 0) | (z > self.height))[None, None]


@dataclass(frozen=True)
class View:
    """What a sample shows of a scan: its first and last edge in mm from the scan's corner (z, y, x).

    Attributes:
        low, high: the edges.
        ends: of a scan with air beyond; None where what lies beyond was not seen, by the network as by the scanner.
    """

    low: Vector
    high: Vector
    ends: Ends | None = None


def _framed(start: Vector, stop: Vector, floor: Vector, roof: Vector) -> tuple[Vector, Vector]:
    (z0, y0, x0), (z1, y1, x1) = floor.tolist(), roof.tolist()
    box = frame(start, stop, Box((z0, y0, x0), (z1, y1, x1)), (1.0, 1.0, 1.0))
    return np.asarray(box.start), np.asarray(box.stop)


class RoiSampler:
    """Samples for the ROI net: a field of view (1, 1, 96, 96, 96) and the foreground's share in it, the same shape.

    Augmentation takes random fields of view of the scan, whole or part, some without any organ.
    """

    def __init__(self, augmentation: Augmentation | None, generator: np.random.Generator, empty: float = 0.08):
        self.augmentation = augmentation
        self.random = generator
        self.empty = empty

    def draw(self, scan: Scan) -> tuple[Tensor, Tensor]:
        """One sample of `scan`."""
        low, high = np.zeros(3), np.asarray(scan.image.shape, float)
        if self.augmentation is not None:
            low, high = self._view(scan.source)
        both = torch.stack((scan.image.float() / LEVELS, scan.labels.float() / 255.0))
        for axis in range(3):
            weights = torch.from_numpy(axis_weights(scan.image.shape[axis], low[axis], high[axis], ROI_SIZE[axis]))
            both = torch.movedim(torch.movedim(both, axis + 1, -1) @ weights.to(both.device).T, -1, axis + 1)
        unit, share = both[None, :1], both[None, 1:]
        if self.augmentation is not None:
            extent = (high - low) * scan.source.spacing
            if self.random.random() < 0.6:
                unit, share = self._turn(unit, share, extent)
            unit = recolour(unit, self.augmentation, self.random, (share[:, 0] > 0.5).long())
            if self.random.random() < self.augmentation.padded:
                air = self._slanted(extent, unit.device)
                unit, share = unit.masked_fill(air, 0.0), share.masked_fill(air, 0.0)
        return centred(unit), share

    def _view(self, source: CachedVolume) -> tuple[Vector, Vector]:
        """First and last edge of a random field of view, in voxels of the cached array."""
        assert self.augmentation is not None
        shape = np.asarray(source.image.shape, float)
        start, stop = source.organs_mm / source.spacing
        low, high = np.zeros(3), shape.copy()
        above, below = shape[0] - stop[0], start[0]
        draw = self.random.random()
        if draw < self.empty and max(above, below) * source.spacing[0] > 110:
            # A view of chest, head or legs alone.
            if above >= below:
                low[0] = stop[0] + 2
                high[0] = self.random.uniform(low[0] + 100 / source.spacing[0], shape[0])
            else:
                high[0] = start[0] - 2
                low[0] = self.random.uniform(0, high[0] - 100 / source.spacing[0])
        elif draw < 0.7:
            seen = self.random.uniform(0.25, 1.0) if self.random.random() < 0.5 else 1.0
            length = stop[0] - start[0]
            first = start[0] + self.random.uniform(0, 1 - seen) * length
            low[0] = self.random.uniform(0, first) if seen == 1.0 or self.random.random() < 0.5 else first
            last = first + seen * length
            high[0] = self.random.uniform(last, shape[0]) if seen == 1.0 or low[0] == first else last
            high[0] = max(high[0], low[0] + 8)
        if self.random.random() < 0.3:
            for axis in (1, 2):
                room = 0.12 * shape[axis]
                low[axis], high[axis] = self.random.uniform(0, room), shape[axis] - self.random.uniform(0, room)
        cut_sides(low, high, np.stack((start, stop)), self.augmentation.narrow, self.random)
        return low, high

    def _turn(self, unit: Tensor, share: Tensor, extent: Vector) -> tuple[Tensor, Tensor]:
        assert self.augmentation is not None
        turns = self.random.normal(0, 1, 3) * np.radians(self.augmentation.turn_degrees) * (1.0, 0.7, 0.7)
        scale = np.exp(self.random.normal(0, self.augmentation.stretch, 3))
        # The rotation is rigid in mm, not in the squeezed cube.
        matrix = np.diag(1 / extent) @ rotation(turns) @ np.diag(extent * scale)
        device = unit.device
        points = grid_points(ROI_SIZE, device) @ torch.as_tensor(matrix.T, dtype=torch.float32, device=device)
        if self.augmentation.bend_mm > 0:
            bends = bending(self.augmentation.bend_mm, extent, ROI_SIZE, self.random, device)
            points = points + bends * torch.as_tensor(2 / extent, dtype=torch.float32, device=device)
        both = torch.cat((unit, share), dim=1)
        both = nn_sample(both, points.flip(-1)[None], "bilinear", "border")
        return both[:, :1], both[:, 1:]

    def _slanted(self, extent: Vector, device: torch.device) -> Tensor:
        """What lies beyond the slanted ends of a scan that was resampled to a straight grid: (1, 1, *ROI_SIZE)."""
        assert self.augmentation is not None
        lean = leaning(self.augmentation.tilt_degrees, self.random)
        # At most as far in as where the slices of air begin at the far corner, which inference cuts off.
        reach = self.random.uniform(0, 0.5, 2) * (abs(lean[0]) * extent[1] + abs(lean[1]) * extent[2])
        height = float(extent[0])
        ends = Ends(float(reach[0]), height - float(reach[1]), lean, height)
        half = torch.as_tensor(extent / 2, dtype=torch.float32, device=device)
        return ends.beyond(grid_points(ROI_SIZE, device) * half, extent / 2)


class MixedSampler:
    """Each sample from one of two samplers: from `first` with the chance `share`, else from `second`."""

    def __init__(self, first: Sampler, second: Sampler, share: float, generator: np.random.Generator):
        self.first = first
        self.second = second
        self.share = share
        self.random = generator

    def draw(self, scan: Scan) -> tuple[Tensor, Tensor]:
        """One sample of `scan`."""
        return (self.first if self.random.random() < self.share else self.second).draw(scan)


def make_sampler(
    network: str, size: tuple[int, int, int], augmentation: Augmentation | None, generator: np.random.Generator
) -> Sampler:
    """The sampler of a network, "organs" or "roi", which has a size of its own."""
    return RoiSampler(augmentation, generator) if network == "roi" else OrganSampler(size, augmentation, generator)


def recolour(unit: Tensor, how: Augmentation, random: np.random.Generator, organs: Tensor) -> Tensor:
    """Change a sample's grey values as scanners, phases and kernels do.

    Args:
        unit: (1, 1, D, H, W) in [0, 1].
        how: the strengths.
        random: the source of chance.
        organs: (1, D, H, W) codes; each is shifted by itself.
    """
    offsets = np.zeros(CLASSES, np.float32)
    if random.random() < 0.5:
        offsets[1:] = random.normal(0, how.organ_hu / HU_SPAN, CLASSES - 1)
    unit = unit + torch.from_numpy(offsets).to(unit.device)[organs][:, None]
    if random.random() < how.blur:
        unit = _blur(unit, random)
    if random.random() < 0.5:
        level = random.uniform(0, how.noise_hu) / HU_SPAN
        noise = torch.randn(unit.shape, device=unit.device)
        if random.random() < 0.5:
            # Reconstruction makes noise coarser than a voxel.
            noise = torch.nn.functional.avg_pool3d(noise, 3, 1, 1) * 3.0
        unit = unit + noise * level
    factor = math.exp(random.normal(0, how.contrast))
    shift = random.normal(0, how.shift_hu) / HU_SPAN
    middle = 0.5
    unit = ((unit - middle) * factor + middle + shift).clamp(0, 1)
    if random.random() < 0.5:
        unit = unit ** math.exp(random.normal(0, how.gamma))
    return unit


def _blur(unit: Tensor, random: np.random.Generator) -> Tensor:
    """Average neighbours along z (thick slices) or in plane (smooth kernel), mixed with the original."""
    kernel, padding = ((3, 1, 1), (1, 0, 0)) if random.random() < 0.5 else ((1, 3, 3), (0, 1, 1))
    smooth = torch.nn.functional.avg_pool3d(unit, kernel, 1, padding, count_include_pad=False)
    return torch.lerp(unit, smooth, float(random.uniform(0.3, 1.0)))


def cut(
    floor: Vector,
    roof: Vector,
    axis: int,
    organs: NDArray[np.float64],
    chance: float,
    least: float,
    random: np.random.Generator,
) -> None:
    """Move the ends of what a scan shows along one axis so that it shows part of the organs, in place.

    Args:
        floor, roof: first and last edge (z, y, x), in any unit.
        axis: of the three.
        organs: (2, 3) first and last edge of the organs, in the same unit.
        chance: that anything is cut.
        least: share of the organs' length that stays.
        random: the source of chance.
    """
    if random.random() >= chance:
        return
    start, stop = organs[:, axis]
    gone = random.uniform(0, 1 - least) * (stop - start)
    share = random.choice([0.0, 1.0, random.random()], p=[0.4, 0.4, 0.2])
    if share > 0:
        floor[axis] = start + gone * share
    if share < 1:
        roof[axis] = stop - gone * (1 - share)


def cut_sides(
    floor: Vector, roof: Vector, organs: NDArray[np.float64], chance: float, random: np.random.Generator
) -> None:
    """`cut` a scan from side to side with a chance, and from front to back with two thirds of it."""
    cut(floor, roof, 1, organs, chance * 2 / 3, 0.5, random)
    cut(floor, roof, 2, organs, chance, 0.5, random)


def leaning(degrees: float, random: np.random.Generator) -> tuple[float, float]:
    """How the axis of a scan's slices leans from the patient's, as that of a tilted gantry does; see `Ends.lean`."""
    about_x, about_y = np.tan(np.radians(random.normal(0, degrees, 2))).tolist()
    return about_x, about_y


def grid_points(size: tuple[int, int, int], device: torch.device) -> Tensor:
    """Centres of a grid's samples (*size, 3) in [-1, 1], in the order (z, y, x)."""
    axes = [(torch.arange(n, device=device) + 0.5) * 2 / n - 1 for n in size]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)


def bending(
    mm: float, extent: Vector, size: tuple[int, int, int], random: np.random.Generator, device: torch.device
) -> Tensor:
    """Displacements (*size, 3) in mm that bend a box of `extent` mm; `mm` is the standard deviation of the knots."""
    knots = [max(2, round(float(length) / 60)) + 3 for length in extent]
    bends = random.normal(0, mm, (1, 3, *knots)).astype(np.float32)
    return smooth_enlarge(torch.from_numpy(bends).to(device), size)[0].permute(1, 2, 3, 0)


def rotation(turns: Vector) -> NDArray[np.float64]:
    """Matrix of rotations by `turns` radians about z, y and x, for vectors (z, y, x)."""
    about_z, about_y, about_x = (float(t) for t in turns)
    result = np.eye(3)
    for angle, (a, b) in ((about_z, (1, 2)), (about_y, (0, 2)), (about_x, (0, 1))):
        step = np.eye(3)
        step[a, a] = step[b, b] = math.cos(angle)
        step[a, b], step[b, a] = -math.sin(angle), math.sin(angle)
        result = step @ result
    return result


def smooth_enlarge(field: Tensor, size: tuple[int, int, int]) -> Tensor:
    """Enlarge a coarse (1, C, d, h, w) field to `size` smoothly; its outermost knots lie at the ends.

    Smoothing averages knots: of independent ones about a third of the standard deviation is left.
    """
    middle = tuple(max(3, n // 8) for n in size)
    field = torch.nn.functional.interpolate(field, size=middle, mode="trilinear", align_corners=True)
    field = torch.nn.functional.avg_pool3d(field, 3, 1, 1, count_include_pad=False)
    return torch.nn.functional.interpolate(field, size=size, mode="trilinear", align_corners=True)


def codes_at(labels: Tensor, grid: Tensor) -> Tensor:
    """Codes (1, ...) int64 of `labels` (z, y, x) at the places of a grid; `IGNORE` outside the array."""
    # One is added so that the zeros outside the array can be told from background.
    codes = nn_sample(labels[None, None].float() + 1.0, grid, "nearest", "zeros")[:, 0].round().long() - 1
    return torch.where(codes < 0, IGNORE, codes)


def centred(unit: Tensor) -> Tensor:
    """`fastorgan.intensity.to_network` of a tensor, which its arithmetic allows though it is typed for arrays."""
    return cast(Tensor, to_network(cast(Any, unit)))
