"""The whole product on the real sample: what it finds, in any orientation, on either engine. Run `./try.sh` first."""

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from evaluation.accuracy import dsc
from evaluation.sample import NAME
from fastorgan import Cascade
from fastorgan.labels import ORGANS
from fastorgan.phantom import make_phantom
from fastorgan.volume import load_image

SAMPLE = Path(__file__).parents[1] / "sample"
CT, TRUTH = SAMPLE / "images" / f"{NAME}_0000.nii.gz", SAMPLE / "labels" / f"{NAME}.nii.gz"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CT.is_file(), reason="no sample; run ./try.sh first"),
]

Labels = NDArray[np.uint8]


def scores(labels: Labels, truth: Labels) -> dict[str, float]:
    return {organ.name: dsc(truth == organ.code, labels == organ.code) for organ in ORGANS}


@pytest.fixture(scope="module")
def cascade() -> Cascade:
    return Cascade.load("cpu")


@pytest.fixture(scope="module")
def image() -> nib.Nifti1Image:
    return load_image(CT)


@pytest.fixture(scope="module")
def truth() -> Labels:
    return np.asarray(load_image(TRUTH).dataobj)


@pytest.fixture(scope="module")
def labels(cascade: Cascade, image: nib.Nifti1Image) -> Labels:
    return np.asarray(cascade.segment(image).dataobj)


def test_organs_are_found(labels: Labels, truth: Labels) -> None:
    found = scores(labels, truth)
    assert found["liver"] >= 0.92
    assert found["kidney"] >= 0.88
    assert found["spleen"] >= 0.92
    assert found["pancreas"] > 0.3


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SAR", "ILP", "PSR"])
def test_axis_order_does_not_matter(
    codes: str, cascade: Cascade, image: nib.Nifti1Image, truth: Labels, labels: Labels
) -> None:
    turn = nib.orientations.ornt_transform(
        nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(tuple(codes))
    )
    turned = image.as_reoriented(turn)
    found = cascade.segment(turned)
    assert nib.aff2axcodes(found.affine) == tuple(codes)
    back = nib.orientations.ornt_transform(nib.io_orientation(found.affine), nib.io_orientation(image.affine))
    assert_close(scores(np.asarray(found.as_reoriented(back).dataobj), truth), scores(labels, truth))


# A tilted grid is smoother than the sample itself, and its pancreas is found better by .03; it must not be worse.
@pytest.mark.parametrize(("degrees", "pancreas_gain"), [((0, 0, 25), 0.01), ((12, -10, 0), 0.03), ((15, 10, 40), 0.03)])
def test_a_turned_grid_does_not_matter(
    degrees: tuple[float, float, float],
    pancreas_gain: float,
    cascade: Cascade,
    image: nib.Nifti1Image,
    truth: Labels,
    labels: Labels,
) -> None:
    oblique, sample_labels = rotate_grid(image, degrees)
    found = np.asarray(cascade.segment(oblique).dataobj)
    turned_truth = sample_labels(truth)
    assert_close(scores(found, turned_truth), scores(sample_labels(labels), turned_truth), pancreas_gain)


def test_a_tilted_grid_does_not_matter_to_whole_organs(cascade: Cascade) -> None:
    # The sample's kidneys are cut by the scan's end; the phantom shows its organs whole. Both grids are sampled from
    # one twice as fine: sampled from a scan of its own spacing, a grid is blurred wherever it lies, and borders suffer.
    image, truth = make_phantom((512, 512, 240), (0.75, 0.75, 1.25))
    found = []
    for degrees in ((0, 0, 0), (15, 10, 40)):
        scan, sample_labels = rotate_grid(image, degrees, coarser=2)
        found.append(scores(np.asarray(cascade.segment(scan).dataobj), sample_labels(np.asarray(truth.dataobj))))
    straight, tilted = found
    assert tilted == pytest.approx(straight, abs=0.005)


def rotate_grid(
    image: nib.Nifti1Image, degrees: tuple[float, float, float], coarser: int = 1
) -> tuple[nib.Nifti1Image, Callable[[Labels], Labels]]:
    """Sample the same patient on a grid turned about the scan's centre, large enough to lose none of it.

    Voxels are `coarser` times as long as the scan's.

    Returns the turned CT, and a function that samples label arrays on its grid.
    """
    about_x, about_y, about_z = np.radians(degrees)
    turn = nib.eulerangles.euler2mat(about_z, about_y, about_x)
    spacing = coarser * nib.affines.voxel_sizes(image.affine)
    last = np.array(image.shape) - 1
    centre = (image.affine @ [*last / 2, 1])[:3]
    corners = np.array([[i, j, k, 1] for i in (0, last[0]) for j in (0, last[1]) for k in (0, last[2])])
    reach = np.abs(((corners @ image.affine.T)[:, :3] - centre) @ turn).max(axis=0)
    shape = tuple(int(n) + 1 for n in np.ceil(2 * reach / spacing))
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag(spacing)
    affine[:3, 3] = centre - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    to_straight = np.linalg.inv(image.affine) @ affine

    def sample(array: NDArray[np.generic], outside: float, part: tuple[slice, ...]) -> NDArray[np.float32]:
        first = [piece.start for piece in part]
        result: NDArray[np.float32] = ndimage.affine_transform(
            array,
            to_straight[:3, :3],
            to_straight[:3, :3] @ first + to_straight[:3, 3],
            tuple(piece.stop - piece.start for piece in part),
            np.float32,
            1,
            mode="constant",
            cval=outside,
        )
        return result

    def sample_labels(labels: Labels) -> Labels:
        # By shares, not by the nearest voxel, which shifts a border by up to half a slice.
        result = np.zeros(shape, np.uint8)
        for organ, place in zip(ORGANS, ndimage.find_objects(labels), strict=True):
            corners = np.array(np.meshgrid(*((piece.start - 1, piece.stop) for piece in place), indexing="ij"))
            there = np.linalg.inv(to_straight) @ [*corners.reshape(3, -1), np.ones(8)]
            low = np.maximum(0, np.floor(there[:3].min(axis=1))).astype(int)
            high = np.minimum(shape, np.ceil(there[:3].max(axis=1)) + 1).astype(int)
            part = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
            result[part][sample((labels == organ.code).astype(np.float32), 0, part) > 0.5] = organ.code
        return result

    everything = tuple(slice(0, n) for n in shape)
    return nib.Nifti1Image(sample(np.asarray(image.dataobj), -1024, everything), affine), sample_labels


def assert_close(found: dict[str, float], expected: dict[str, float], pancreas_gain: float = 0.01) -> None:
    for organ, score in expected.items():
        gain = pancreas_gain if organ == "pancreas" else 0.01
        assert -0.01 <= found[organ] - score <= gain, organ
