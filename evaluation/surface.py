"""Surface DSC (normalised surface DSC, NSD) of two masks.

After Nikolov et al., *Clinically Applicable Segmentation of Head and Neck Anatomy for Radiotherapy* (J Med Internet Res
2021; 23(7): e26151), with the surface elements (surfels) of google-deepmind/surface-distance, which the FLARE
challenges score with. That package's one release needs names that NumPy has dropped and SciPy deprecates; areas and
distances here are equal to its own.
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import KDTree

Spacing = tuple[float, float, float]

INSIDE = 255
"""Neighbour code of a point whose eight voxels are all in the mask; 0 is the code of one whose voxels are all out."""


def surface_dice(
    truth: NDArray[np.bool_],
    prediction: NDArray[np.bool_],
    spacing: Spacing,
    tolerance: float,
    ignore: NDArray[np.bool_] | None = None,
) -> float:
    """Compute the share of both surfaces that lies within a tolerance of the other.

    A surfel is a point between 2 x 2 x 2 voxels of which some are in the mask and some are out; voxels beyond the
    volume's ends are out. The distance between surfels is that between their points.

    Args:
        truth, prediction: masks of one shape with three axes.
        spacing: voxel size in mm, in the masks' axis order.
        tolerance: in mm; a distance of exactly this is within it.
        ignore: voxels whose label is unknown; they are out of both masks. A surfel that touches one has no weight,
            as its place is unknown, but the other surface may still be near to it.

    Returns:
        Between 0 and 1; 0 if just one mask is empty; NaN if both are, or if no surfel has weight.

    Raises:
        ValueError: if shapes differ or have not three axes, the spacing is not three positive numbers, or the
            tolerance is not zero or more.
    """
    shapes = [truth.shape, prediction.shape] + ([] if ignore is None else [ignore.shape])
    if truth.ndim != 3 or len(set(shapes)) != 1:
        raise ValueError(f"masks must have one shape with three axes, not {', '.join(map(str, shapes))}")
    if len(spacing) != 3 or not all(np.isfinite(size) and size > 0 for size in spacing):
        raise ValueError(f"spacing must be three positive numbers, not {spacing}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be 0 mm or more, not {tolerance}")
    if ignore is not None:
        truth, prediction = truth & ~ignore, prediction & ~ignore
    box = _bounding_box(truth | prediction)
    if box is None:
        return float("nan")
    areas = surfel_areas(spacing)
    codes = [neighbour_codes(mask[box]) for mask in (truth, prediction)]
    surfaces = [(code != 0) & (code != INSIDE) for code in codes]
    known = True if ignore is None else neighbour_codes(ignore)[tuple(slice(s.start, s.stop + 1) for s in box)] == 0
    within = total = 0.0
    for code, surface, other in zip(codes, surfaces, surfaces[::-1], strict=True):
        weighed = surface & known
        area = areas[code[weighed]]
        total += float(area.sum())
        within += float(area[_near(weighed, other, spacing, tolerance)].sum())
    return within / total if total > 0 else float("nan")


def neighbour_codes(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Tell for every point between voxels which of the eight around it are in a mask.

    Args:
        mask: three axes.

    Returns:
        One more point along each axis than the mask has voxels: point i lies between voxels i - 1 and i. Of the eight
        voxels around a point (a, b, c), each 0 or 1, has the bit 7 - (4 a + 2 b + c).
    """
    one, two, four = np.uint8(1), np.uint8(2), np.uint8(4)
    codes = np.pad(mask.astype(np.uint8, order="C"), 1)
    codes = codes[:, :, :-1] << one | codes[:, :, 1:]
    codes = codes[:, :-1] << two | codes[:, 1:]
    return codes[:-1] << four | codes[1:]


@cache
def surfel_areas(spacing: Spacing) -> NDArray[np.float64]:
    """Compute the area in mm² of the marching-cubes surface at a point, by its neighbour code.

    The surface cuts the edges between a voxel in and one out of the mask at their middles. Whichever are fewer, the
    voxels in or those out, are the ones cut off, each piece of them that hangs together by faces on its own.

    Args:
        spacing: voxel size in mm along the three axes.

    Returns:
        A read-only array of 256 areas.
    """
    first, second, third = spacing
    faces = np.array([second * third, first * third, first * second])
    areas = np.zeros(256)
    for code in range(256):
        inside = np.unpackbits(np.uint8(code)).reshape(2, 2, 2).astype(bool)
        pieces, count = ndimage.label(inside if inside.sum() <= 4 else ~inside)
        for piece in range(1, count + 1):
            for share, normal in _cut(pieces == piece):
                areas[code] += share * float(np.linalg.norm(faces * normal))
    areas.setflags(write=False)
    return areas


def _cut(piece: NDArray[np.bool_]) -> list[tuple[float, NDArray[np.int_]]]:
    """List the triangles that cut one to four joined corners off a cube.

    Areas do not need the normals' signs, so parallel and mirrored triangles are one entry.

    Args:
        piece: (2, 2, 2), the corners to cut off.

    Returns:
        Shares and normals: in a cube of side 1 the triangles of an entry have the area share x |normal|.
    """
    straight = np.eye(3, dtype=int)
    level, slanted = 1 - straight, np.ones(3, int)
    # How evenly the corners spread over the cube's two halves along each axis tells the shapes apart.
    spread = [min(int(half.sum()) for half in np.moveaxis(piece, axis, 0)) for axis in range(3)]
    match int(piece.sum()):
        case 1:
            return [(1 / 8, slanted)]
        case 2:
            return [(4 / 8, level[spread.index(1)])]
        case 3:
            return [(4 / 8, straight[spread.index(0)]), (3 / 8, slanted)]
        case _ if 0 in spread:
            return [(8 / 8, straight[spread.index(0)])]
        case _ if 2 in spread:
            ends = [axis for axis in range(3) if spread[axis] == 1]
            return [(4 / 8, slanted)] + [(2 / 8, level[axis]) for axis in ends]
        case _:
            return [(6 / 8, slanted)]


def _near(
    points: NDArray[np.bool_], others: NDArray[np.bool_], spacing: Spacing, tolerance: float
) -> NDArray[np.bool_]:
    """Tell for each of `points`, in the order of indexing, whether one of `others` lies within `tolerance` mm.

    Equal to a threshold on the Euclidean distance transform of `others`, without its arrays of the whole box.
    """
    near = others[points]
    if not others.any() or near.all():
        return near
    place, places = np.argwhere(points & ~others), np.argwhere(others)
    # The bound is exclusive and rounded: what it lets through is measured again in whole steps of the grid, so that a
    # distance of exactly the tolerance is within it.
    tree = KDTree(places * spacing, compact_nodes=False, balanced_tree=False)
    _, query = tree.query(place * spacing, distance_upper_bound=tolerance + 1e-3 * min(spacing))
    nearest = np.asarray(query)
    found: NDArray[np.bool_] = nearest < len(places)
    steps = (place[found] - places[nearest[found]]) * spacing
    found[found] = np.sqrt((steps**2).sum(axis=1)) <= tolerance
    near[~near] = found
    return near


def _bounding_box(mask: NDArray[np.bool_]) -> tuple[slice, ...] | None:
    """Frame a mask's voxels; None if it is empty."""
    spans = [np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis))) for axis in range(3)]
    return tuple(slice(int(s[0]), int(s[-1]) + 1) for s in spans) if spans[0].size else None
