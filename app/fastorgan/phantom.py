"""A CT phantom of the abdomen, made from formulas: a first input where no patient's data may be used.

Every part of the anatomy is a solid, described by its signed distance in mm (negative inside), in patient coordinates:
RAS+, x to the patient's right, y to the front, z to the head, the origin in the midline at the middle of the first
lumbar vertebra. The parts are painted one over the other and the last one owns the voxel: organs cannot overlap, and
label and HU come from the same surface. The grid enters only where the distances are evaluated, so the same seed is
the same patient at every spacing, shape and field of view, apart from the noise.

Positions follow textbook levels (transpyloric plane at L1, kidneys T12 to L3, right dome of the diaphragm at T9); the
attenuations are typical of the portal-venous phase at 120 kV.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import nibabel as nib
import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.interpolate import CubicHermiteSpline
from scipy.ndimage import gaussian_filter

from .errors import VolumeError
from .labels import ORGANS

FloatArray = NDArray[np.float32]
Vector = NDArray[np.float64]
Field = Callable[[FloatArray, FloatArray, FloatArray], FloatArray]

SHAPE = (256, 256, 120)
"""Default voxels along x, y, z: with `SPACING` 384 x 384 x 300 mm, from the lung bases to the iliac crests."""

SPACING = (1.5, 1.5, 2.5)
"""Default voxel size in mm along x, y, z."""

NOISE_HU = 11.0
"""Default standard deviation of the noise in HU, as in a slice of 2.5 mm at a routine dose."""

HU = {
    "air": -1000.0,
    "mattress": -880.0,
    "couch": -60.0,
    "skin": -10.0,
    "subcutaneous fat": -108.0,
    "visceral fat": -104.0,
    "muscle": 60.0,
    "lung": -860.0,
    "lung vessel": 40.0,
    "myocardium": 115.0,
    "blood": 150.0,
    "artery": 165.0,
    "vein": 150.0,
    "cortical bone": 480.0,
    "marrow": 190.0,
    "cartilage": 110.0,
    "disc": 85.0,
    "cord": 35.0,
    "liver": 110.0,
    "spleen": 125.0,
    "kidney": 185.0,
    "renal medulla": 155.0,
    "urine": 8.0,
    "pancreas": 100.0,
    "adrenal": 75.0,
    "bile": 8.0,
    "bowel wall": 80.0,
    "fluid": 18.0,
    "oral contrast": 240.0,
    "stool": 20.0,
}
"""Attenuation in HU of what the phantom is made of."""

_CODES = {organ.name: organ.code for organ in ORGANS}
_REACH = 8.0  # mm around a solid's box within which its distance is evaluated; farther away it is this
_SLAB_VOXELS = 1 << 21  # voxels painted at a time, so that memory does not grow with the volume
_WAVES = 5  # plane waves that make up the mottle of a tissue

# The middle of each vertebral body (z, mm) and its height with the disc below.
_VERTEBRAE = (
    (-174.0, 34.0),
    (-139.0, 35.0),
    (-104.0, 35.0),
    (-69.0, 35.0),
    (-34.5, 34.0),
    (0.0, 33.0),
    (31.0, 29.0),
    (59.0, 27.0),
    (85.5, 26.0),
    (111.0, 25.0),
    (135.5, 24.0),
    (159.0, 23.0),
    (181.5, 22.0),
    (203.0, 21.0),
    (223.5, 20.0),
    (243.0, 19.0),
)
_T12 = 6  # index of the lowest vertebra that bears ribs


def make_phantom(
    shape: tuple[int, int, int] = SHAPE,
    spacing: tuple[float, float, float] = SPACING,
    seed: int = 0,
    *,
    centre: tuple[float, float, float] = (0.0, 0.0, 0.0),
    orientation: str = "LPS",
    noise: float = NOISE_HU,
) -> tuple[nib.Nifti1Image, nib.Nifti1Image]:
    """Make a CT phantom of the abdomen and its labels.

    Args:
        shape: voxels along the patient's x, y and z, whatever the orientation.
        spacing: mm along x, y and z.
        seed: chooses the patient (build, position, size and attenuation of the organs) and the noise.
        centre: the middle of the field of view in mm, RAS+, from the middle of the L1 vertebra in the midline. With
            `shape` it chooses the z-range; the anatomy is drawn from z = -190 to 250 mm (S1 to T3), and beyond that
            the torso goes on without bones and organs.
        orientation: nibabel's axis codes of the array axes; "LPS" is what DICOM converters write.
        noise: standard deviation in HU; 0 for none.

    Returns:
        The CT (int16, HU) and the label map (uint8, the codes of `fastorgan.labels`), on the same grid, with qform and
        sform set. An organ outside the field of view is not labelled.

    Raises:
        VolumeError: a shape, spacing, centre, seed, orientation or noise that no volume can have.
    """
    if len(shape) != 3 or min(shape) < 1 or any(int(n) != n for n in shape):
        raise VolumeError(f"phantom: the shape must be three positive whole numbers, not {tuple(shape)}")
    if len(spacing) != 3 or not all(np.isfinite(spacing)) or min(spacing) <= 0:
        raise VolumeError(f"phantom: the spacing must be three positive numbers of mm, not {tuple(spacing)}")
    if len(centre) != 3 or not all(np.isfinite(centre)):
        raise VolumeError(f"phantom: the centre must be three numbers of mm, not {tuple(centre)}")
    if seed < 0:
        raise VolumeError(f"phantom: the seed must be a whole number from 0, not {seed}")
    if not (np.isfinite(noise) and noise >= 0):
        raise VolumeError(f"phantom: the noise must be a number of HU from 0, not {noise}")
    turn = _turn_from_ras(orientation)

    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = np.array(centre) - np.array(spacing) * (np.array(shape) - 1) / 2
    hu = np.empty(shape, dtype=np.int16, order="F")
    labels = np.empty(shape, dtype=np.uint8, order="F")
    patient = _Patient.drawn(np.random.default_rng([seed, 0]))
    grain = np.random.default_rng([seed, 1])
    # Partial volume: edges as soft as a voxel is wide, and never sharper than a scanner's focus.
    softness = max(1.0, float(np.sqrt(np.mean(np.square(spacing)))))
    x, y, z = (affine[axis, 3] + spacing[axis] * np.arange(shape[axis]) for axis in range(3))
    depth = max(1, _SLAB_VOXELS // (shape[0] * shape[1]))
    for start in range(0, shape[2], depth):
        slab = slice(start, start + depth)
        mesh = patient.mesh(x, y, z[slab])
        values, labels[:, :, slab] = _paint(patient.layers, mesh, softness)
        if noise > 0:
            values += _noise(mesh.shape, spacing, noise, grain)
        hu[:, :, slab] = np.rint(np.clip(values, -1024, 3071))
    return _as_nifti(hu, affine, turn), _as_nifti(labels, affine, turn)


def _turn_from_ras(orientation: str) -> NDArray[np.float64]:
    """nibabel's orientation transform from RAS to the axis codes in `orientation`."""
    codes = tuple(orientation.upper())
    patient_axes = dict(zip("LRAPIS", "xxyyzz", strict=True))
    if len(codes) != 3 or {patient_axes.get(code) for code in codes} != set("xyz"):
        raise VolumeError(f"phantom: the orientation must be three axis codes like LPS or RAS, not {orientation!r}")
    ras, wanted = nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(codes)
    turn: NDArray[np.float64] = nib.orientations.ornt_transform(ras, wanted)
    return turn


def _as_nifti(data: NDArray[np.generic], affine: Vector, turn: NDArray[np.float64]) -> nib.Nifti1Image:
    turned = nib.orientations.apply_orientation(data, turn)
    image = nib.Nifti1Image(turned, affine @ nib.orientations.inv_ornt_aff(turn, data.shape))
    image.set_qform(image.affine, code="scanner")
    image.set_sform(image.affine, code="scanner")
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = b"fastorgan phantom"
    return image


# --- solids -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Mesh:
    """A block of voxel centres: ascending coordinates in mm along x, y and z."""

    x: FloatArray
    y: FloatArray
    z: FloatArray

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.x.size, self.y.size, self.z.size

    def window(self, low: Vector, high: Vector) -> tuple[slice, slice, slice]:
        """The part inside a box in mm, as slices; empty ones where the box lies outside."""
        x, y, z = (
            slice(int(np.searchsorted(axis, a)), int(np.searchsorted(axis, b, side="right")))
            for axis, a, b in zip((self.x, self.y, self.z), low, high, strict=True)
        )
        return x, y, z

    def cut(self, window: tuple[slice, slice, slice]) -> "_Mesh":
        return _Mesh(self.x[window[0]], self.y[window[1]], self.z[window[2]])

    def open(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        """The coordinates, shaped to broadcast against each other."""
        return self.x[:, None, None], self.y[None, :, None], self.z[None, None, :]


@dataclass(frozen=True)
class _Solid:
    """An implicit solid.

    Attributes:
        low: lower corner of a box around it in mm; may be infinite.
        high: upper corner.
        field: signed distance in mm for x, y, z that broadcast against each other; near the surface close enough to
            the Euclidean one to give soft edges and rinds of even width.
    """

    low: Vector
    high: Vector
    field: Field

    def distance(self, mesh: _Mesh) -> FloatArray:
        """Signed distance at every voxel of `mesh`; farther than `_REACH` from the box simply `_REACH`."""
        window = mesh.window(self.low - _REACH, self.high + _REACH)
        part = mesh.cut(window)
        if part.shape == mesh.shape:
            return np.broadcast_to(self.field(*mesh.open()), mesh.shape)
        distance = np.full(mesh.shape, _REACH, dtype=np.float32)
        if 0 not in part.shape:
            distance[window] = self.field(*part.open())
        return distance

    def near(self, x: FloatArray, y: FloatArray, z: FloatArray) -> FloatArray:
        """`field` with the saving of `distance`; for solids that take part in another one."""
        return self.distance(_Mesh(x.ravel(), y.ravel(), z.ravel()))

    def grown(self, mm: float) -> "_Solid":
        """The solid with a rind of `mm`; without its outermost part where negative."""
        return _Solid(self.low - mm, self.high + mm, lambda x, y, z: self.near(x, y, z) - np.float32(mm))

    def moved(self, shift: Vector, scale: float = 1.0) -> "_Solid":
        """Scaled about the middle of its box, then shifted by `shift` mm."""
        middle, half = (self.low + self.high) / 2, (self.high - self.low) / 2 * scale
        ox, oy, oz = (middle - (middle + shift) / scale).astype(np.float32)
        k = np.float32(scale)
        return _Solid(
            middle + shift - half,
            middle + shift + half,
            lambda x, y, z: self.field(x / k + ox, y / k + oy, z / k + oz) * k,
        )

    def __and__(self, other: "_Solid") -> "_Solid":
        low, high = np.maximum(self.low, other.low), np.minimum(self.high, other.high)
        return _Solid(low, high, lambda x, y, z: np.maximum(self.near(x, y, z), other.near(x, y, z)))

    def __sub__(self, other: "_Solid") -> "_Solid":
        return _Solid(self.low, self.high, lambda x, y, z: np.maximum(self.near(x, y, z), -other.near(x, y, z)))


def _hull(solids: Sequence[_Solid]) -> tuple[Vector, Vector]:
    return np.min([solid.low for solid in solids], axis=0), np.max([solid.high for solid in solids], axis=0)


def _union(solids: Iterable[_Solid]) -> _Solid:
    """Sharp union; each part is evaluated near its own box only, so many small parts cost little."""
    parts = tuple(solids)
    low = np.array([part.low for part in parts]) - _REACH
    high = np.array([part.high for part in parts]) + _REACH

    def nearest(x: FloatArray, y: FloatArray, z: FloatArray) -> FloatArray:
        mesh = _Mesh(x.ravel(), y.ravel(), z.ravel())
        distance = np.full(mesh.shape, _REACH, dtype=np.float32)
        first, last = np.array([[axis[0], axis[-1]] for axis in (mesh.x, mesh.y, mesh.z)]).T
        for i in np.flatnonzero(((low <= last) & (high >= first)).all(axis=1)):
            window = mesh.window(low[i], high[i])
            block = distance[window]
            if block.size:
                np.minimum(block, parts[i].field(*mesh.cut(window).open()), out=block)
        return distance

    return _Solid(*_hull(parts), nearest)


def _smooth_minimum(a: FloatArray, b: FloatArray, mm: float) -> FloatArray:
    """Minimum whose crease is rounded over `mm` (the polynomial smooth minimum of implicit modelling)."""
    blend = np.maximum(np.float32(mm) - np.abs(a - b), np.float32(0))
    lowest: FloatArray = np.minimum(a, b) - blend * blend * np.float32(0.25 / mm)
    return lowest


def _smooth_union(solids: Sequence[_Solid], mm: float) -> _Solid:
    """Union whose creases are filled over about `mm`."""
    return _Solid(
        *_hull(solids),
        lambda x, y, z: reduce(lambda a, b: _smooth_minimum(a, b, mm), (solid.field(x, y, z) for solid in solids)),
    )


def _smooth_cut(solid: _Solid, tool: _Solid, mm: float) -> _Solid:
    """`solid` without `tool`, the new edge rounded over about `mm`."""
    return _Solid(
        solid.low,
        solid.high,
        lambda x, y, z: -_smooth_minimum(-solid.field(x, y, z), tool.field(x, y, z), mm),
    )


def _rotation(turn: ArrayLike) -> Vector:
    """Matrix (3, 3) that turns by degrees about x, then y, then z."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(np.deg2rad(turn)), np.sin(np.deg2rad(turn))
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    rotation: Vector = about_z @ about_y @ about_x
    return rotation


def _grooved(solid: _Solid, vessel: _Solid, out: ArrayLike) -> _Solid:
    """`solid` with a groove for a vessel, open in the direction `out` so that no thin sheet is left behind it."""
    shift = np.asarray(out, dtype=np.float64)
    return solid - _union(vessel.grown(1).moved(part * shift) for part in np.linspace(0, 1, 5))


def _ellipsoid(centre: ArrayLike, semi: ArrayLike, turn: ArrayLike = (0.0, 0.0, 0.0)) -> _Solid:
    """Ellipsoid with semi-axes in mm, turned by degrees about x, then y, then z.

    The distance is the first-order one: with f = |p / semi|, f (f - 1) / |p / semi^2|.
    """
    middle, axes = np.asarray(centre, dtype=np.float64), np.asarray(semi, dtype=np.float64)
    rotation = _rotation(turn)
    reach = np.sqrt(rotation**2 @ axes**2)
    # Each row gives the coordinate along one own axis, in units of its semi-axis.
    rows = (rotation.T / axes[:, None]).astype(np.float32)
    scales = (axes**-2).astype(np.float32)
    mx, my, mz = middle.astype(np.float32)

    def distance(x: FloatArray, y: FloatArray, z: FloatArray) -> FloatArray:
        px, py, pz = x - mx, y - my, z - mz
        squares = [np.square(px * row[0] + py * row[1] + pz * row[2]) for row in rows]
        # The small number keeps the centre from 0 / 0; the distance is 0 there, so the core is filled in.
        square = squares[0] + squares[1] + squares[2]
        steep = squares[0] * scales[0] + squares[1] * scales[1] + squares[2] * scales[2]
        norm = np.sqrt(square)
        signed: FloatArray = norm * (norm - np.float32(1)) / np.sqrt(steep + np.float32(1e-12))
        signed[norm < 0.05] = -axes.min()
        return signed

    return _Solid(middle - reach, middle + reach, distance)


def _tube(points: ArrayLike, radii: ArrayLike, step: float = 6.0, haustra: float = 0.0) -> _Solid:
    """Round tube along a smooth curve through `points`: a chain of round cones.

    Args:
        points: (n, 3) mm.
        radii: mm, one or one per point.
        step: length of a cone in mm.
        haustra: how deep the radius is waisted every 28 mm, as a fraction.
    """
    knots = np.asarray(points, dtype=np.float64)
    length = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(knots, axis=0), axis=1))])
    at = np.linspace(0.0, length[-1], max(2, int(np.ceil(length[-1] / step)) + 1))
    # Slopes from the neighbours, as Catmull and Rom have them: no system to solve, and little overshoot.
    line = CubicHermiteSpline(length, knots, np.gradient(knots, length, axis=0))(at)
    width = np.interp(at, length, np.broadcast_to(np.asarray(radii, dtype=np.float64), length.shape))
    width = width * (1 - haustra * np.cos(np.pi * at / 28) ** 4)
    return _union(_cone(line[i], line[i + 1], float(width[i]), float(width[i + 1])) for i in range(len(at) - 1))


def _cone(a: Vector, b: Vector, radius_a: float, radius_b: float) -> _Solid:
    """The line from `a` to `b` with a radius that changes evenly, closed by balls."""
    (ax, ay, az), (ux, uy, uz) = a.astype(np.float32), (b - a).astype(np.float32)
    inverse = np.float32(1 / ((b - a) @ (b - a)))
    start, slope = np.float32(radius_a), np.float32(radius_b - radius_a)

    def distance(x: FloatArray, y: FloatArray, z: FloatArray) -> FloatArray:
        px, py, pz = x - ax, y - ay, z - az
        t = np.clip((px * ux + py * uy + pz * uz) * inverse, np.float32(0), np.float32(1))
        signed: FloatArray = np.sqrt((px - t * ux) ** 2 + (py - t * uy) ** 2 + (pz - t * uz) ** 2) - (start + slope * t)
        return signed

    largest = max(radius_a, radius_b)
    return _Solid(np.minimum(a, b) - largest, np.maximum(a, b) + largest, distance)


def _behind(point: ArrayLike, outward: ArrayLike) -> _Solid:
    """The half space behind the plane through `point`; `outward` points out of the solid."""
    normal = np.asarray(outward, dtype=np.float64)
    normal = normal / np.linalg.norm(normal)
    offset = np.float32(normal @ np.asarray(point, dtype=np.float64))
    nx, ny, nz = normal.astype(np.float32)
    infinite = np.full(3, np.inf)
    return _Solid(-infinite, infinite, lambda x, y, z: nx * x + ny * y + nz * z - offset)


def _level(low: float, high: float) -> _Solid:
    """Everything from `low` to `high` along z."""
    middle, half = np.float32((low + high) / 2), np.float32((high - low) / 2)
    infinite = np.inf
    return _Solid(
        np.array([-infinite, -infinite, low]),
        np.array([infinite, infinite, high]),
        lambda x, y, z: np.abs(z - middle) - half,
    )


def _trough(bottom: float, radius: float, thickness: float, width: float) -> _Solid:
    """Endless curved plate along z, lowest at y = `bottom`, `width` mm wide."""
    half, r, middle = np.float32(thickness / 2), np.float32(radius), np.float32(bottom + radius)
    edge = width / 2
    rise = radius - np.sqrt(radius**2 - edge**2)
    return _Solid(
        np.array([-edge, bottom - thickness, -np.inf]),
        np.array([edge, bottom + rise + thickness, np.inf]),
        lambda x, y, z: np.maximum(np.abs(np.hypot(x, y - middle) - r) - half, np.abs(x) - np.float32(edge)) + 0 * z,
    )


def _prism(semi: tuple[float, float], y: float, power: float, waist: float) -> _Solid:
    """Endless column along z about (0, y): a superellipse, `waist` mm narrower all round at the level of L3."""

    def distance(px: FloatArray, py: FloatArray, pz: FloatArray) -> FloatArray:
        dy = py - np.float32(y)
        norm = (np.abs(px / semi[0]) ** power + np.abs(dy / semi[1]) ** power) ** (1 / power)
        # Along the ray from the middle; at the middle itself the limit.
        flat = np.hypot(px, dy) * (1 - 1 / np.maximum(norm, 0.05))
        signed: FloatArray = flat + np.float32(waist) * np.exp(-(((pz + 80) / 60) ** 2))
        return signed

    box = np.array([semi[0], semi[1], np.inf])
    return _Solid(np.array([0, y, 0]) - box, np.array([0, y, 0]) + box, distance)


def _mirrored(points: ArrayLike) -> tuple[Vector, Vector]:
    """Points for the right side of the body, and the same for the left."""
    right = np.asarray(points, dtype=np.float64)
    return right, right * [-1, 1, 1]


# --- painting ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layer:
    """One coat of paint.

    Attributes:
        solid: where.
        hu: attenuation.
        code: the label of the voxels inside.
        core: depth in mm from which on the attenuation is another one, and that one: lumen, marrow.
        mottle: amplitude of the tissue's own unevenness in HU.
        waves: wave vectors and phases of the mottle, (`_WAVES`, 4), per mm and in radians.
    """

    solid: _Solid
    hu: float
    code: int = 0
    core: tuple[float, float] | None = None
    mottle: float = 0.0
    waves: FloatArray | None = None


def _paint(layers: Iterable[_Layer], mesh: _Mesh, softness: float) -> tuple[FloatArray, NDArray[np.uint8]]:
    """Paint the layers in their order on air.

    Args:
        layers: what to paint.
        mesh: the voxels.
        softness: width of an edge in mm.

    Returns:
        HU and codes, both of the mesh's shape.
    """
    hu = np.full(mesh.shape, HU["air"], dtype=np.float32)
    codes = np.zeros(mesh.shape, dtype=np.uint8)
    for layer in layers:
        window = mesh.window(layer.solid.low - softness, layer.solid.high + softness)
        part = mesh.cut(window)
        if 0 in part.shape:
            continue
        distance = layer.solid.distance(part)
        tissue: FloatArray | np.float32 = np.float32(layer.hu)
        if layer.core is not None:
            depth, core = layer.core
            tissue = tissue + np.float32(core - layer.hu) * _cover(distance + np.float32(depth), softness)
        if layer.waves is not None:
            x, y, z = part.open()
            ripple = sum(np.cos(x * kx + y * ky + z * kz + phase) for kx, ky, kz, phase in layer.waves)
            tissue = tissue + np.float32(layer.mottle / np.sqrt(_WAVES / 2)) * np.asarray(ripple, dtype=np.float32)
        block = hu[window]
        block += (tissue - block) * _cover(distance, softness)
        codes[window][distance < 0] = layer.code
    return hu, codes


def _cover(distance: FloatArray, softness: float) -> FloatArray:
    """Fraction of each voxel that is inside, from its centre's distance."""
    fraction: FloatArray = np.clip(np.float32(0.5) - distance * np.float32(1 / softness), np.float32(0), np.float32(1))
    return fraction


def _noise(
    shape: tuple[int, int, int], spacing: tuple[float, float, float], sd: float, rng: np.random.Generator
) -> FloatArray:
    """Gaussian noise of standard deviation `sd` HU, correlated over about a millimetre within a slice.

    It is drawn slice by slice, so that it does not depend on how the volume was cut into slabs.
    """
    sigma = (0, 0.8 / spacing[1], 0.8 / spacing[0])
    impulse = np.zeros((1, 33, 33))
    impulse[0, 16, 16] = 1
    gain = np.sqrt(np.sum(gaussian_filter(impulse, sigma) ** 2))
    white = rng.standard_normal((shape[2], shape[1], shape[0]), dtype=np.float32)
    smooth: FloatArray = gaussian_filter(white, sigma, mode="wrap") * np.float32(sd / gain)
    return smooth.transpose(2, 1, 0)


# --- anatomy ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Patient:
    """One patient: the layers in the order of painting, and the build, the factors on x, y and z."""

    layers: tuple[_Layer, ...]
    build: Vector

    @classmethod
    def drawn(cls, rng: np.random.Generator) -> "_Patient":
        """Draw a patient; equal generators give equal patients."""
        build = 1 + 0.02 * np.clip(rng.standard_normal(3), -2, 2)
        return cls(tuple(_Anatomy(rng).layers()), build)

    def mesh(self, x: Vector, y: Vector, z: Vector) -> _Mesh:
        """Voxel centres in mm of the world, as coordinates of the standard build."""
        sx, sy, sz = self.build
        return _Mesh((x / sx).astype(np.float32), (y / sy).astype(np.float32), (z / sz).astype(np.float32))


def _spine(z: float) -> float:
    """y of the middle of the vertebral bodies: lordosis below, kyphosis above."""
    return float(-51 + 6 * np.exp(-(((z + 110) / 70) ** 2)) - 8 * (max(z, 0.0) / 150) ** 2)


def _on_wall(angle: float, z: float) -> tuple[float, float, float]:
    """The point of the right body wall where the ribs run, `angle` degrees in front of the side."""
    c, s = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    waist = 9 * np.exp(-(((z + 80) / 60) ** 2))
    return float((147.5 - waist) * c**0.8), float((99 - waist) * np.sign(s) * abs(s) ** 0.8), z


class _Anatomy:
    """The parts of the body of one patient. All coordinates are mm; the right side has positive x."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        fat = float(rng.uniform(-3, 8))
        self.skin = _prism((172 + fat, 122 + fat), 0, 2.3, 9)
        self.wall = _prism((154, 105), -3, 2.4, 9)
        self.cavity = _prism((141, 93), 2, 2.6, 9)
        self.upper = _behind((0, 0, -25), (0, 0, -1))
        domes = _smooth_union(
            [
                _ellipsoid((69, 6, -20), (84, 97, 117)),
                _ellipsoid((-69, 4, -20), (82, 95, 106)),
                _ellipsoid((0, 22, -20), (75, 82, 90)),
            ],
            16,
        )
        self.vault = _union([domes, _behind((0, 0, -25), (0, 0, 1))])
        self.column = _tube([(0, _spine(z), z) for z in range(-220, 281, 20)], 20, step=20)
        psoas = _mirrored([(27, -46, 8), (30, -48, -30), (35, -46, -65), (46, -40, -110), (58, -26, -200)])
        quadratus = _mirrored([(50, -86, 0), (60, -83, -45), (72, -80, -120)])
        crura = _mirrored([(17, -13, 48), (20, -30, 25), (19, -31, 0), (15, -28, -40)])
        erector = [_ellipsoid((side * 31, -91, -110), (31, 19, 130)) for side in (1, -1)]
        # The great veins that run in grooves of liver and pancreas.
        self.cava = _tube(
            [(20, -14, -112), (22, -18, -60), (24, -18, -10), (28, -18, 40), (30, -14, 80), (24, 8, 112)],
            (10, 10.5, 11, 12, 12.5, 13),
        )
        self.portal = _tube(
            [(14, 16, -110), (16, 4, -60), (18, -2, -26), (18, -1, -8), (30, 2, 10), (40, 2, 20)], (4, 5, 6, 7, 7, 7)
        )
        self.splenic = _tube([(18, -1, -8), (-14, 2, 2), (-40, -12, 13), (-70, -40, 34)], (5, 4.5, 4.5, 3.5))
        self.muscles = _union(
            [
                *(_tube(points, (7, 10, 15, 22, 26)) for points in psoas),
                *(_tube(points, (5, 11, 13)) for points in quadratus),
                *(_tube(points, (4, 6, 5, 3)) for points in crura),
                *erector,
                _prism((52, 26), -100, 2.2, 0) & self.wall,
            ]
        )
        # Where organs may lie: under the diaphragm, inside the wall, in front of the spine and its muscles.
        back = _union([self.column, self.muscles])
        self.belly = (self.cavity.grown(-0.5) & self.vault) - back.grown(1.5)

    def layers(self) -> Iterator[_Layer]:
        """All parts in the order of painting: what comes later lies in front."""
        yield from self._shell()
        yield from self._chest()
        yield from self._bowel()
        yield from self._upper_abdomen()
        yield from self._kidneys()
        yield from self._vessels()
        yield from self._back()
        yield from self._ribs()

    def _varied(self, solid: _Solid) -> _Solid:
        """The solid at this patient's place and size, confined to the belly."""
        shift = np.clip(1.5 * self._rng.standard_normal(3), -3, 3)
        return solid.moved(shift, 1 + 0.02 * float(np.clip(self._rng.standard_normal(), -2, 2))) & self.belly

    def _tissue(self, solid: _Solid, name: str, organ: str = "", mottle: float = 4.0, grain: float = 18.0) -> _Layer:
        """A layer of living tissue: its attenuation differs from patient to patient and is a little uneven."""
        direction = self._rng.standard_normal((_WAVES, 3))
        direction *= (
            2 * np.pi / (grain * np.linspace(0.6, 1.8, _WAVES))[:, None] / np.linalg.norm(direction, axis=1)[:, None]
        )
        waves = np.column_stack([direction, self._rng.uniform(0, 2 * np.pi, _WAVES)]).astype(np.float32)
        hu = HU[name] + 0.04 * abs(HU[name]) * float(np.clip(self._rng.standard_normal(), -2, 2))
        return _Layer(solid, hu, _CODES.get(organ, 0), None, mottle, waves)

    def _fat_around(self, solid: _Solid, mm: float = 2.5) -> _Layer:
        """The fat that parts an organ from its neighbours; painted before the organ, over the others."""
        return _Layer(solid.grown(mm) & self.belly, HU["visceral fat"])

    def _shell(self) -> Iterator[_Layer]:
        """Couch, skin, fat and the muscular wall, the cavity filled with fat."""
        yield _Layer(_trough(-138, 700, 12, 400), HU["mattress"])
        yield _Layer(_trough(-146, 700, 2.5, 420), HU["couch"])
        yield _Layer(self.skin, HU["skin"])
        yield self._tissue(self.skin.grown(-2), "subcutaneous fat", mottle=5, grain=25)
        yield self._tissue(self.wall, "muscle", mottle=6, grain=9)
        flank = _union(_behind((side * 75, 0, 0), (-side, 0, 0)) for side in (1, -1))
        stripe = (self.cavity.grown(6.6) - self.cavity.grown(5.4)) & flank & _behind((0, 0, 15), (0, 0.4, 1))
        yield _Layer(stripe, -40.0)
        yield self._tissue(self.cavity, "visceral fat", mottle=8, grain=14)

    def _chest(self) -> Iterator[_Layer]:
        """Lungs, heart and great vessels in the mediastinal fat, the diaphragm; fat again below it."""
        sac = _ellipsoid((-28, 34, 122), (60, 47, 45), (0, -20, -25))
        mediastinum = _smooth_union(
            [_ellipsoid((0, -38, 120), (33, 36, 230)), _ellipsoid((0, 78, 125), (24, 28, 130)), sac.grown(4)], 10
        )
        lung = (self.cavity.grown(-1) & self.upper) - self.vault.grown(2) - _union([mediastinum, self.column.grown(1)])
        yield self._tissue(lung, "lung", mottle=25, grain=12)
        twigs = []
        for side in (1, -1):
            hilum = np.array([side * 40, -5, 165])
            for _ in range(14):
                end = np.array(
                    [side * self._rng.uniform(55, 125), self._rng.uniform(-75, 75), self._rng.uniform(40, 210)]
                )
                bend = (hilum + end) / 2 + self._rng.uniform(-12, 12, 3)
                twigs.append(_tube([hilum, bend, end], (5.5, 3.6, 1.2), step=14))
        yield _Layer(_union(twigs) & lung.grown(-1), HU["lung vessel"])
        yield self._tissue(sac, "myocardium")
        chambers = [
            _ellipsoid((-42, 42, 118), (35, 26, 24), (0, -20, -35)),
            _ellipsoid((-2, 62, 116), (32, 15, 24), (0, -15, -10)),
            _ellipsoid((22, 22, 130), (16, 24, 28)),
            _ellipsoid((-12, -2, 142), (32, 14, 22)),
        ]
        yield self._tissue(_union(chambers) & sac.grown(-2), "blood")
        yield self._tissue(_tube([(-2, -20, 230), (-4, -18, 150), (-12, -12, 95), (-38, -8, 72)], 8), "muscle")
        yield _Layer((self.vault.grown(2) & self.cavity & self.upper) - self.vault, HU["muscle"])
        yield self._tissue(self.vault & self.cavity & self.upper, "visceral fat", mottle=8, grain=14)

    def _bowel(self) -> Iterator[_Layer]:
        """Colon with stool and gas, loops of small bowel, duodenum."""
        course = np.array(
            [
                (84, -5, -215),
                (90, -10, -160),
                (100, -14, -110),
                (98, 0, -78),
                (82, 44, -74),
                (40, 66, -80),
                (0, 72, -88),
                (-52, 66, -66),
                (-90, 48, -20),
                (-112, 14, 6),
                (-114, -22, -20),
                (-112, -36, -75),
                (-97, -28, -130),
                (-84, -10, -215),
            ]
        )
        calibre = (22, 23, 23, 20, 18, 18, 18, 17, 16, 16, 14, 13, 13, 14)
        colon = _tube(course, calibre, haustra=0.25) & self.belly
        yield self._fat_around(colon)
        yield self._tissue(colon, "bowel wall")
        yield self._tissue(colon.grown(-2.5), "stool", mottle=110, grain=9)
        for first, last, lift in ((0, 4, 7), (4, 9, 5), (9, 11, 5)):
            gas = _tube(
                course[first : last + 1] + np.array([0, lift, 0]),
                np.array(calibre[first : last + 1]) * 0.62,
                haustra=0.6,
            )
            yield _Layer(gas & colon.grown(-2.5), HU["air"])

        root = np.array([4, 4, -40])
        ends = np.column_stack([self._rng.uniform(*span, 28) for span in ((-95, 90), (10, 70), (-200, -35))])
        bends = (root + ends) / 2 + self._rng.uniform(-14, 14, ends.shape)
        mesentery = _union(
            _tube([root, bend, end], (3.2, 2.2, 1.2), step=12) for bend, end in zip(bends, ends, strict=True)
        )
        yield _Layer(mesentery & self.belly, HU["vein"])

        loops: dict[str, list[_Solid]] = {"fluid": [], "oral contrast": [], "bowel wall": []}
        for z in range(-44, -220, -25):
            for x in (-64, -26, 14, 54):
                for y in (20, 50):
                    # To the right of the midline the loops begin below the pancreas' head.
                    if x > -20 and z > -60:
                        continue
                    middle = np.array([x, y, z]) + self._rng.uniform(-7, 7, 3)
                    across, along = _rotation(self._rng.uniform(-40, 40, 3))[[0, 2]]
                    swing = np.deg2rad(self._rng.uniform(0, 360) + np.linspace(0, 230, 6))[:, None]
                    path = middle + 14 * (np.cos(swing) * across + np.sin(swing) * along)
                    content = str(self._rng.choice(list(loops), p=(0.45, 0.3, 0.25)))
                    loops[content].append(_tube(path, float(self._rng.uniform(8, 11.5))))
        for content, tubes in loops.items():
            bundle = _union(tubes) & self.belly
            yield self._fat_around(bundle, 1.5)
            yield self._tissue(bundle, "bowel wall", mottle=10, grain=8)
            yield self._tissue(bundle.grown(-2.5), content, mottle=12, grain=10)

        sweep = [(34, 42, -8), (54, 26, -10), (61, 6, -32), (58, -4, -60), (28, 2, -76), (-10, 8, -72), (-34, 18, -52)]
        duodenum = _tube(sweep, (13, 13, 12.5, 12.5, 11, 10, 11)) & self.belly
        yield self._fat_around(duodenum, 2)
        yield self._tissue(duodenum, "bowel wall", mottle=8, grain=8)
        yield self._tissue(duodenum.grown(-3.5), "fluid", mottle=8, grain=12)

    def _upper_abdomen(self) -> Iterator[_Layer]:
        """Liver with its vessels, gallbladder, stomach, spleen, pancreas."""
        right = _smooth_cut(_ellipsoid((72, -2, 16), (74, 92, 98)), _behind((40, 20, 4), (0.6, 0.12, 0.79)), 14)
        left = _smooth_cut(
            _ellipsoid((-8, 48, 46), (60, 44, 32), (0, 8, 0)), _behind((-10, 40, 26), (0.15, 0.5, 0.85)), 12
        )
        gallbladder = _tube([(46, 22, 2), (54, 40, -14), (60, 54, -28)], (6, 13, 17)) & self.belly
        liver = self._varied(_smooth_union([right, left], 22))
        # The right kidney lies behind the liver, not within it.
        for neighbour, out in (
            (self.cava, (-30, -24, 0)),
            (self.cava, (-10, -46, 0)),
            (gallbladder, (-10, -4, -14)),
            (_ellipsoid((70, -47, -38), (31, 28, 62), (12, -12, -32)), (-12, -44, 0)),
        ):
            liver = _grooved(liver, neighbour, out)
        yield self._fat_around(liver)
        yield self._tissue(liver, "liver", "liver", mottle=4)
        yield from self._liver_vessels(liver)
        yield _Layer(_tube([(8, 92, 20), (10, 74, 32), (12, 50, 40)], (7, 5, 3)) & self.belly, HU["visceral fat"])
        yield _Layer(gallbladder, HU["bowel wall"])
        yield _Layer(gallbladder.grown(-2), HU["bile"])

        bag = [(-54, -22, 70), (-66, 8, 54), (-64, 42, 22), (-34, 62, -8), (4, 60, -18), (30, 46, -10)]
        stomach = self._varied(_tube(bag, (28, 33, 29, 22, 16, 10)))
        yield self._fat_around(stomach)
        yield self._tissue(stomach, "bowel wall", mottle=8, grain=10)
        yield self._tissue(stomach.grown(-4.5), "fluid", mottle=5, grain=14)
        yield _Layer(stomach.grown(-4.5) & _behind((0, 54, 0), (0, -1, 0)), HU["air"])

        pulp = _ellipsoid((-96, -46, 52), (44, 54, 56), (20, 0, -20))
        for tool in (_ellipsoid((-50, -4, 46), (42, 46, 76)), _behind((-90, -30, 75), (0.4, 0, -1))):
            pulp = _smooth_cut(pulp, tool, 12)
        spleen = self._varied(pulp)
        yield self._fat_around(spleen)
        yield self._tissue(spleen, "spleen", "spleen")

        head = [(31, 4, -52), (40, 5, -36), (33, 10, -20), (12, 15, -10), (-14, 17, -2), (-40, 6, 8), (-66, -17, 24)]
        pancreas = self._varied(
            _smooth_union([_tube(head, (9, 16, 14, 10, 11, 11, 9.5)), _ellipsoid((27, 0, -48), (13, 7, 12))], 5)
        )
        for vein, out in (
            (self.portal, (-14, -7, 0)),
            (self.splenic, (-3, -10, -3)),
        ):
            pancreas = _grooved(pancreas, vein, out)
        yield self._fat_around(pancreas, 1.5)
        yield self._tissue(pancreas, "pancreas", "pancreas", mottle=16, grain=7)

    def _liver_vessels(self, liver: _Solid) -> Iterator[_Layer]:
        """Hepatic veins towards the vena cava and portal branches from the hilum; they count as liver."""
        veins = [
            [(30, -18, 80), (62, -28, 66), (104, -26, 34)],
            [(30, -14, 80), (44, 18, 66), (66, 50, 36)],
            [(26, -12, 80), (10, 20, 66), (-24, 52, 54)],
        ]
        portal = [
            [(40, 2, 20), (72, -4, 20), (100, 28, 6), (112, 40, -6)],
            [(72, -4, 20), (98, -34, 8), (112, -46, -12)],
            [(40, 2, 20), (30, 30, 36), (4, 50, 42), (-30, 58, 48)],
        ]
        inner = liver.grown(-4)
        for paths, radii in ((veins, (5.0, 4.0, 1.5)), (portal, (6.0, 4.5, 3.0, 1.2))):
            tree = _union(_tube(path, radii[: len(path)]) for path in paths)
            yield _Layer(tree & inner, HU["vein"], _CODES["liver"])

    def _kidneys(self) -> Iterator[_Layer]:
        """Adrenals and kidneys, their medulla, pelvis and vessels; fat fills what the bean leaves free."""
        for side, z in ((1, -38.0), (-1, -22.0)):
            turn = (12.0, -12.0 * side, -32.0 * side)
            rotation = _rotation(turn)
            centre = np.array([side * 72, -47, z])

            def at(lateral: float, front: float, up: float, side: int = side, frame: Vector = rotation) -> Vector:
                return np.array(frame @ (side * lateral, front, up))

            bean = _ellipsoid(centre, (29, 24.5, 55), turn)
            for lateral, semi in ((-30, (16, 10, 18)), (-13, (11, 6.5, 22))):
                bean = _smooth_cut(bean, _ellipsoid(centre + at(lateral, 0, 0), semi, turn), 6)
            limbs = [
                _tube([(side * 31, -34, 36), (side * 36, -44, 20), (side * 42, -53, 8)], 2.4),
                _tube([(side * 31, -34, 36), (side * 31, -46, 20), (side * 30, -57, 10)], 2.2),
            ]
            adrenal = _union(limbs) & self.belly
            yield self._fat_around(adrenal)
            yield _Layer(adrenal, HU["adrenal"])
            kidney = self._varied(bean)
            yield self._fat_around(kidney, 3.5)
            yield self._tissue(kidney, "kidney", "kidney", mottle=5, grain=10)
            angles = np.deg2rad(np.arange(-144, 145, 36))
            pyramids = [
                _ellipsoid(centre + at(13 * np.cos(a) + 3, 5 * (-1) ** i, 35 * np.sin(a)), (6.5, 6, 8), turn)
                for i, a in enumerate(angles)
            ]
            yield self._tissue(_union(pyramids) & kidney.grown(-5), "renal medulla", "kidney")
            pelvis = _ellipsoid(centre + at(-17, 0, -3), (7, 4, 9), turn)
            ureter = _tube(
                [tuple(centre + at(-23, 2, -8)), (side * 36, -20, z - 40), (side * 34, -18, -110)], (3, 2, 2)
            )
            yield _Layer((_union([pelvis, ureter]) & self.belly) - kidney, HU["urine"])
            # The left vein crosses to the cava in front of the aorta, the right artery behind the cava.
            vein, artery = {
                1: ([(50, -38, -36), (36, -30, -32), (24, -20, -26)], [(48, -42, -34), (20, -32, -26), (-8, -20, -20)]),
                -1: (
                    [(-50, -38, -22), (-30, -20, -18), (-6, -4, -16), (20, -16, -18)],
                    [(-50, -40, -22), (-28, -32, -20), (-8, -20, -18)],
                ),
            }[side]
            yield _Layer(_tube(vein, 4.2) - kidney, HU["vein"])
            yield _Layer(_tube(artery, 2.8) - kidney, HU["artery"])

    def _vessels(self) -> Iterator[_Layer]:
        """Aorta, vena cava, portal and mesenteric vessels."""
        veins = [
            self.cava,
            self.portal,
            self.splenic,
            _tube([(20, -14, -112), (36, -14, -150), (58, 0, -210)], (9, 7, 6)),
            _tube([(20, -14, -112), (-6, -22, -145), (-50, -6, -210)], (9, 7, 6)),
        ]
        arteries = [
            _tube(
                [(-26, -46, 250), (-24, -40, 150), (-16, -30, 70), (-8, -20, 10), (-6, -18, -50), (-2, -16, -104)],
                (13, 12.5, 12, 10.5, 9.5, 8.5),
            ),
            _tube([(-2, -16, -104), (20, -2, -145), (54, 8, -210)], (6, 5, 5)),
            _tube([(-2, -16, -104), (-24, -2, -145), (-54, 8, -210)], (6, 5, 5)),
            _tube([(-7, -20, 4), (-4, -2, -6), (0, 3, -30), (4, 10, -70), (8, 18, -110)], (4, 4, 4, 3.5, 3)),
            _tube([(-8, -22, 22), (-6, -2, 24), (14, 2, 26), (34, 6, 24)], (4, 4, 3, 2.5)),
            _tube([(-6, -2, 24), (-28, -4, 22), (-50, -22, 30), (-72, -38, 44)], (3, 2.8, 2.6, 2.2)),
        ]
        yield self._tissue(_union(veins), "vein", mottle=3)
        yield self._tissue(_union(arteries), "artery", mottle=3)

    def _back(self) -> Iterator[_Layer]:
        """Psoas, quadratus lumborum, crura and erector spinae; the vertebral column and the iliac wings."""
        yield self._tissue(self.muscles, "muscle", mottle=6, grain=9)
        yield _Layer(self.column, HU["disc"])
        bones = []
        for z, height in _VERTEBRAE:
            y, width = _spine(z), 15 + 0.2 * height
            bones.append(_prism((width, 0.78 * width), y, 2.2, 0) & _level(z - height / 2 + 3.2, z + height / 2 - 3.2))
            tip = (0.0, max(y - 52, -104.0), z - 9 - 0.06 * max(z, 0.0))
            bones.append(_tube([(0.0, y - 36, z), (0.0, y - 44, z - 6), tip], (4, 3.5, 4.5)))
            bones.append(_ellipsoid((0, y - 31, z - 3), (20, 8, 12)))
            for side in (1, -1):
                bones.append(_tube([(side * 13, y - 8, z + 4), (side * 15, y - 26, z + 4)], 5))
                bones.append(_tube([(side * 15, y - 26, z + 4), (side * 38, y - 34, z + 4)], (4.5, 3.5)))
                bones.append(_tube([(side * 17, y - 29, z + 13), (side * 17, y - 30, z - 15)], 5.5))
        for side in (1, -1):
            wing = _ellipsoid((side * 35, 5, -202), (112, 98, 84))
            flank = _behind((side * 62, 0, 0), (-side, 0, 0)) & _behind((0, 18, 0), (0, 1, 0.2))
            yield _Layer((wing.grown(6) - wing.grown(-13)) & flank & self.wall, HU["muscle"])
            bones.append((wing - wing.grown(-7)) & flank & self.wall)
        yield _Layer(_union(bones), HU["cortical bone"], core=(2.0, HU["marrow"]))
        canal = _tube([(0, _spine(z) - 24, z) for z in range(-220, 281, 20)], 9, step=20)
        yield _Layer(canal, HU["visceral fat"], core=(1.5, HU["cord"]))

    def _ribs(self) -> Iterator[_Layer]:
        """Ribs that slope down to the front, the costal arch and the sternum."""
        bones, cartilages = [], []
        for number, (z, _) in zip(range(12, 0, -1), _VERTEBRAE[_T12:], strict=False):
            end = {12: -40.0, 11: -8.0, 10: 22.0}.get(number, 22.0 + 6.0 * (10 - number))
            angles = np.linspace(-66, end, max(3, int((end + 66) / 12)))
            path = [(19.0, _spine(z) - 16, z + 9), (38.0, -84.0, z + 6)]
            path += [_on_wall(angle, z - 0.72 * (angle + 66)) for angle in angles]
            for points in _mirrored(path):
                # Two strands make the rib higher than thick.
                bones += [_tube(points + np.array([0, 0, lift]), 4.4, step=8) for lift in (-2, 2)]
            if number < 8:
                tip = path[-1]
                for points in _mirrored(
                    [tip, _on_wall((end + 86) / 2, tip[2] + 4), (17.0, 97.0, max(tip[2] + 16, 100.0))]
                ):
                    cartilages.append(_tube(points, 5))
        arch = [_on_wall(20, 16), _on_wall(36, 34), _on_wall(52, 56), _on_wall(68, 80), (16, 97, 100)]
        cartilages += [_tube(points, 5.5) for points in _mirrored(arch)]
        sternum = _prism((18, 5.5), 97, 2.5, 0) & _level(96, 270)
        yield _Layer(_union(cartilages), HU["cartilage"])
        yield _Layer(_union([*bones, sternum]), HU["cortical bone"], core=(2.0, HU["marrow"]))
