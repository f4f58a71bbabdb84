import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

pytest.importorskip("torch")

import torch
from torch import Tensor

from fastorgan.box import CROP_SIZE, ROI_SIZE, Box, extent_mm, frame
from fastorgan.intensity import to_network
from fastorgan.labels import CLASSES, IGNORE
from fastorgan.resample import resize
from fastorgan.volume import load_image, read_volume
from tests.synthetic_cache import anatomy, as_roi, cached, one_thread
from training.cache import CachedVolume, cache_case
from training.cases import Case
from training.losses import at_borders
from training.recipes import Augmentation
from training.sampling import (
    Ends,
    MixedSampler,
    OrganSampler,
    RoiSampler,
    Scan,
    centred,
    recolour,
    rotation,
    smooth_enlarge,
)

SMALL = (24, 32, 48)
CPU = torch.device("cpu")

STILL = Augmentation(
    face_mm=0,
    cut=0,
    narrow=0,
    padded=0,
    turn_degrees=0,
    stretch=0,
    bend_mm=0,
    gamma=0,
    shift_hu=0,
    contrast=0,
    organ_hu=0,
    noise_hu=0,
    blur=0,
    filled=0,
)
"""Disturbs nothing."""

MOVED = replace(STILL, face_mm=7, cut=0.35, turn_degrees=8, stretch=0.08, bend_mm=5)
"""Moves as the preset does, and leaves the grey values as they are."""


@pytest.fixture(scope="module", autouse=True)
def few_threads() -> Iterator[None]:
    with one_thread():
        yield


def scan_of(volume: CachedVolume) -> Scan:
    return Scan.to_device(volume, CPU)


def levels(image: Tensor) -> Tensor:
    """Back from the networks' range to the eight-bit scale."""
    return (image + 1) / 2 * 255


def overlap(a: Tensor, b: Tensor) -> float:
    """DSC of two masks."""
    return 2 * float((a & b).sum()) / float(a.sum() + b.sum())


def values_of(codes: Tensor) -> set[int]:
    """The codes that occur."""
    return set(np.unique(codes.numpy()).tolist())


def centroid(mask: Tensor) -> NDArray[np.float64]:
    return mask.nonzero().double().mean(dim=0).numpy()


# Against inference


def smooth_case(folder: Path, shape: tuple[int, int, int], organs: NDArray[np.uint8]) -> Case:
    """A case of 5 x 3 x 3 mm, coarse enough that neither cache nor crop averages voxels."""
    z, y, x = np.meshgrid(*(np.linspace(0, 1, n) for n in shape), indexing="ij")
    hu = 250 * np.sin(7 * x + 3 * z) * np.cos(5 * y - 2 * z) + 40 * np.sin(60 * x)
    affine = np.diag([3.0, 3.0, 5.0, 1.0])
    paths = folder / "a_0000.nii", folder / "a.nii"
    for array, path in zip((hu.astype(np.int16), organs), paths, strict=True):
        nib.save(nib.Nifti1Image(np.ascontiguousarray(array.transpose(2, 1, 0)), affine), path)
    return Case("a", "a", *paths)


@pytest.mark.parametrize(
    ("shape", "organs"),
    [
        pytest.param((60, 90, 130), (slice(20, 40), slice(30, 60), slice(40, 90)), id="amid a large scan"),
        pytest.param((60, 90, 130), (slice(0, 10), slice(70, 90), slice(0, 20)), id="in a corner"),
        pytest.param((20, 50, 60), (slice(5, 15), slice(10, 40), slice(5, 55)), id="in a small scan"),
    ],
)
def test_without_augmentation_the_crop_is_inferences(
    tmp_path: Path, shape: tuple[int, int, int], organs: tuple[slice, slice, slice]
) -> None:
    codes = np.zeros(shape, np.uint8)
    codes[organs] = 1
    case = smooth_case(tmp_path, shape, codes)

    volume = read_volume(load_image(case.image), "the scan")
    box = frame(*extent_mm(codes > 0, volume.spacing), Box.whole(volume.shape), volume.spacing)
    expected = to_network(resize(volume.array, box, CROP_SIZE, volume.unit))

    source, _ = cache_case(case)
    image, target = OrganSampler(CROP_SIZE, None, np.random.default_rng(0)).draw(scan_of(source))
    assert image.shape == (1, 1, *CROP_SIZE)
    assert target.shape == (1, *CROP_SIZE)
    assert target.dtype == torch.int64
    # Eight bits over a range of 2, and float arithmetic.
    assert np.abs(image[0, 0].numpy() - expected).max() < 1.0 / 255 + 1e-4
    # The least and the largest code of the voxels about each sample: where they agree, no border runs.
    least = largest = codes
    for axis, (first, last, samples) in enumerate(zip(box.start, box.stop, CROP_SIZE, strict=True)):
        at = first + (np.arange(samples) + 0.5) * (last - first) / samples
        voxels = np.clip([np.floor(at - 0.5), np.ceil(at - 0.5)], 0, shape[axis] - 1).astype(int)
        least = np.minimum(*(np.take(least, side, axis=axis) for side in voxels))
        largest = np.maximum(*(np.take(largest, side, axis=axis) for side in voxels))
    inside = least == largest
    assert inside.mean() > 0.8
    assert np.array_equal(target[0].numpy()[inside], least[inside])
    assert values_of(target[0][torch.from_numpy(~inside)]) == {0, 1}


def test_targets_follow_borders_between_slices() -> None:
    # Kidney up to column 12 in the lower slices and up to column 20 in the upper ones, 8 mm apart: straight between.
    codes = np.zeros((12, 24, 32), np.uint8)
    codes[2:6, 4:20, 4:12] = codes[6:10, 4:20, 4:20] = 2
    source = cached(codes, (8.0, 4.0, 4.0))
    _, target = OrganSampler((96, 96, 128), None, np.random.default_rng(0)).draw(scan_of(source))
    # A sample is 1 mm: the whole scan is looked at. Between the slices' centres at 44 and 52 mm the border goes
    # from 48 to 80 mm. Of no voxel more than 6 mm from its border, at 45.5 mm (t = 3 / 16) it is where
    # (1 - t) (x - 48) = 6 t, at 49.4 mm, and at 47.5 mm at 52.7 mm; from the upper slice downwards alike.
    ends = [int((target[0, z, 48] == 2).nonzero().max()) + 1 for z in range(43, 53)]
    assert ends == [48, 48, 49, 51, 53, 75, 77, 79, 80, 80]


def test_without_augmentation_the_roi_net_sees_what_it_does_in_inference() -> None:
    source = as_roi(cached(anatomy((50, 60, 70)), (5.0, 5.0, 5.0)))
    image, share = RoiSampler(None, np.random.default_rng(0)).draw(scan_of(source))
    assert image.shape == share.shape == (1, 1, *ROI_SIZE)
    whole = Box.whole(source.image.shape)
    for drawn, array in ((levels(image), source.image), (share * 255, source.labels)):
        expected = resize(array, whole, ROI_SIZE, lambda values: values.astype(np.float32))
        assert np.abs(drawn[0, 0].numpy() - expected).max() < 0.01


def test_an_augmentation_of_nothing_changes_nothing() -> None:
    scan = scan_of(cached(anatomy((30, 40, 60)), (7.0, 7.0, 7.0)))
    image, codes = OrganSampler(SMALL, None, np.random.default_rng(0)).draw(scan)
    still_image, still_codes = OrganSampler(SMALL, STILL, np.random.default_rng(0)).draw(scan)
    assert torch.allclose(image, still_image, atol=1e-5)
    assert float((codes != still_codes).float().mean()) < 1e-3


@pytest.mark.parametrize(("share", "least", "most"), [(0.0, 0, 0), (0.25, 10, 30), (1.0, 80, 80)])
def test_mixed_samples_come_from_either_sampler_by_chance(share: float, least: int, most: int) -> None:
    scan = scan_of(cached(anatomy((30, 40, 60)), (7.0, 7.0, 7.0)))
    first, second = (OrganSampler(size, None, np.random.default_rng(0)) for size in ((8, 8, 8), (8, 8, 16)))
    mixed = MixedSampler(first, second, share, np.random.default_rng(0))
    shapes = [tuple(mixed.draw(scan)[0].shape[2:]) for _ in range(80)]
    assert set(shapes) <= {(8, 8, 8), (8, 8, 16)}
    assert least <= shapes.count((8, 8, 8)) <= most


# Labels go with the image


def test_labels_go_with_the_image() -> None:
    codes = anatomy((36, 48, 72))
    scan = scan_of(cached(codes, (6.0, 6.0, 6.0), image=(codes * 50).astype(np.uint8)))
    sampler = OrganSampler((48, 64, 96), MOVED, np.random.default_rng(3))
    for _ in range(12):
        image, target = sampler.draw(scan)
        known = target != IGNORE
        # Interpolation blurs the borders; inside organs and outside the codes come back.
        difference = (levels(image[:, 0]) / 50 - target)[known].abs()
        assert float((difference < 0.5).float().mean()) > 0.97


@pytest.mark.parametrize("code", [1, 2, 3, 4])
def test_each_organ_goes_with_its_image(code: int) -> None:
    codes = anatomy((36, 48, 72))
    scan = scan_of(cached(codes, (6.0, 6.0, 6.0), image=np.where(codes == code, 200, 0).astype(np.uint8)))
    sampler = OrganSampler((48, 64, 96), replace(MOVED, cut=0.0), np.random.default_rng(code))
    for _ in range(4):
        image, target = sampler.draw(scan)
        known = target != IGNORE
        assert overlap((levels(image[:, 0]) > 100) & known, (target == code) & known) > 0.96


def test_the_roi_nets_target_goes_with_its_image() -> None:
    source = as_roi(cached(anatomy((40, 50, 60)), (7.0, 7.0, 7.0)))
    scan = scan_of(CachedVolume(**{**source.__dict__, "image": source.labels}))
    sampler = RoiSampler(MOVED, np.random.default_rng(0))
    for _ in range(12):
        image, share = sampler.draw(scan)
        assert float((levels(image) / 255 - share).abs().max()) < 1e-4


# Geometry


def test_left_and_right_are_never_swapped() -> None:
    scan = scan_of(cached(anatomy((30, 40, 60)), (7.0, 7.0, 7.0)))
    sampler = OrganSampler(SMALL, replace(Augmentation(), turn_degrees=12.0), np.random.default_rng(1))
    for _ in range(40):
        codes = sampler.draw(scan)[1][0]
        liver, spleen = codes == 1, codes == 3
        if liver.sum() > 50 and spleen.sum() > 50:
            assert centroid(liver)[2] > centroid(spleen)[2] + 5


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_no_axis_is_ever_flipped(axis: int) -> None:
    shape = (30, 40, 60)
    rising = np.moveaxis(np.broadcast_to(np.linspace(0, 255, shape[axis]), (1, 1, shape[axis])), -1, axis)
    ramp = np.broadcast_to(rising, shape).astype(np.uint8)
    volume = cached(anatomy(shape), (7.0, 7.0, 7.0), image=ramp)
    generator = np.random.default_rng(2)
    organs, roi = OrganSampler(SMALL, MOVED, generator), RoiSampler(MOVED, generator)
    for _ in range(15):
        for image, _ in (organs.draw(scan_of(volume)), roi.draw(scan_of(as_roi(volume)))):
            profile = image[0, 0].movedim(axis, -1).mean(dim=(0, 1))
            assert profile[-1] > profile[0]
            assert np.corrcoef(profile.numpy(), np.arange(len(profile)))[0, 1] > 0.9


def moments_mm(mask: Tensor, voxel: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
    """Volume in ml and SD along the principal axes in mm, ascending."""
    points = mask.nonzero().double().numpy() * voxel
    return float(mask.sum()) * float(np.prod(voxel)) / 1000, np.sqrt(np.linalg.eigvalsh(np.cov(points.T)))


def ellipsoid_scan() -> CachedVolume:
    """One long ellipsoid in unlike voxels, so that a turn in voxels instead of mm would shear it."""
    shape, spacing = (44, 80, 110), np.array([6.0, 4.0, 4.0])
    places = np.meshgrid(
        *((np.arange(n) + 0.5 - n / 2) * s for n, s in zip(shape, spacing, strict=True)), indexing="ij"
    )
    distance = sum((p / h) ** 2 for p, h in zip(places, (40, 50, 110), strict=True))
    return cached((distance < 1).astype(np.uint8), tuple(spacing))


def test_turns_are_rigid_in_mm() -> None:
    source = ellipsoid_scan()
    sampler = OrganSampler((64, 80, 96), replace(STILL, turn_degrees=15), np.random.default_rng(5))
    view = sampler._view(source)
    low, high = view.low, view.high
    voxel = (high - low) / sampler.size
    expected = 4 / 3 * math.pi * 40 * 50 * 110 / 1000
    turned = 0
    for _ in range(6):
        codes = sampler.draw(scan_of(source))[1][0]
        if (codes == IGNORE).any() or any(bool((codes.movedim(a, 0)[[0, -1]] == 1).any()) for a in range(3)):
            continue
        volume, deviations = moments_mm(codes == 1, voxel)
        # A solid ellipsoid's SD along an axis is its half axis over the root of 5.
        assert volume == pytest.approx(expected, rel=0.03)
        assert deviations == pytest.approx(np.array([40, 50, 110]) / math.sqrt(5), rel=0.03)
        turned += 1
    assert turned >= 3


def test_the_roi_nets_turns_are_rigid_in_mm() -> None:
    source = as_roi(ellipsoid_scan())
    sampler = RoiSampler(replace(STILL, turn_degrees=15), np.random.default_rng(5))
    extent = source.scan_mm
    unit, share = (torch.from_numpy(a).float()[None, None] / 255 for a in (source.image, source.labels))
    unit, share = (torch.nn.functional.interpolate(a, ROI_SIZE, mode="trilinear") for a in (unit, share))
    turned = False
    for _ in range(6):
        _, moved = sampler._turn(unit, share, extent)
        volume, deviations = moments_mm(moved[0, 0] > 0.5, extent / ROI_SIZE)
        assert volume == pytest.approx(4 / 3 * math.pi * 40 * 50 * 110 / 1000, rel=0.03)
        assert deviations == pytest.approx(np.array([40, 50, 110]) / math.sqrt(5), rel=0.03)
        turned |= overlap(moved > 0.5, share > 0.5) < 0.95
    assert turned


@given(st.lists(st.floats(-4, 4), min_size=3, max_size=3))
def test_rotations_are_orthonormal(turns: list[float]) -> None:
    matrix = rotation(np.array(turns))
    assert np.allclose(matrix @ matrix.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(matrix) == pytest.approx(1.0)


def test_rotations_by_hand() -> None:
    assert np.array_equal(rotation(np.zeros(3)), np.eye(3))
    quarter = math.pi / 2
    z, y, x = np.eye(3)
    for turns, fixed, source, image in (
        ((quarter, 0, 0), z, y, x),
        ((0, quarter, 0), y, z, x),
        ((0, 0, quarter), x, z, y),
    ):
        matrix = rotation(np.array(turns, float))
        assert np.allclose(matrix @ fixed, fixed)
        assert np.allclose(matrix @ source, image)
        assert np.allclose(matrix @ image, -source)


def test_bends_are_smooth_and_of_the_strength_asked_for() -> None:
    torch.manual_seed(0)
    # The knots of a box of 150 x 170 x 250 mm, at the organ net's own size.
    field = torch.cat([smooth_enlarge(torch.randn(1, 3, 5, 6, 7), CROP_SIZE) for _ in range(4)])
    assert field.shape == (4, 3, *CROP_SIZE)
    assert 0.25 < float(field.std()) < 0.5
    # No fold: from voxel to voxel, 1.3 to 1.6 mm, a bend of 5 mm changes by less than half of that.
    assert max(5 * float(field.diff(dim=axis).abs().max()) for axis in (2, 3, 4)) < 0.8
    assert torch.allclose(smooth_enlarge(torch.full((1, 3, 4, 4, 4), 2.5), (16, 24, 32)), torch.tensor(2.5))


# What lies outside


def test_what_lies_outside_the_cached_array_is_unknown() -> None:
    # Organs up to every border: any box that is turned or grown reaches beyond the scan.
    codes = np.ones((20, 28, 40), np.uint8)
    scan = scan_of(cached(codes, (8.0, 8.0, 8.0)))
    sampler = OrganSampler(SMALL, replace(STILL, turn_degrees=20, stretch=0.2), np.random.default_rng(0))
    outside = []
    for _ in range(10):
        image, target = sampler.draw(scan)
        assert image.isfinite().all()
        assert values_of(target) <= {1, IGNORE}
        outside.append(float((target == IGNORE).float().mean()))
        # The image goes on beyond the border: a border's value, no padding that the network would not meet.
        assert torch.allclose(levels(image), torch.tensor(140.0), atol=0.01)
    assert max(outside) > 0.05
    assert target.shape == (1, *SMALL)


def test_scans_are_cut_at_their_ends_and_sides() -> None:
    # Organs of 160 x 168 x 160 mm amid a scan of 240 x 280 x 320 mm.
    codes = np.zeros((30, 40, 40), np.uint8)
    codes[5:25, 8:32, 10:30] = 1
    source = cached(codes, (8.0, 7.0, 8.0))
    chances = {"ends": replace(STILL, cut=1.0), "sides": replace(STILL, narrow=1.0), "nowhere": STILL}
    cut = {name: np.zeros(3, int) for name in chances}
    for name, how in chances.items():
        sampler = OrganSampler(SMALL, how, np.random.default_rng(0))
        for _ in range(60):
            floor, roof = sampler._cut(source)
            gone = (floor > source.organs_mm[0]) | (roof < source.organs_mm[1])
            cut[name] += gone
            shown = np.minimum(roof, source.organs_mm[1]) - np.maximum(floor, source.organs_mm[0])
            least = np.array([0.3, 0.5, 0.5]) * (source.organs_mm[1] - source.organs_mm[0])
            assert (shown >= least - 1e-6).all()
            assert (floor[~gone] == 0).all()
            assert (roof[~gone] == source.scan_mm[~gone]).all()
    assert cut["ends"].tolist() == [60, 0, 0]
    assert 25 < cut["sides"][1] < 55
    assert cut["sides"][[0, 2]].tolist() == [0, 60]
    assert not cut["nowhere"].any()


def test_air_lies_beyond_the_ends_of_a_padded_scan() -> None:
    # Organs from end to end, 160 mm: the box wants more, and finds it in the air.
    codes = np.ones((20, 28, 40), np.uint8)
    scan = scan_of(cached(codes, (8.0, 8.0, 8.0)))
    sampler = OrganSampler(SMALL, replace(STILL, padded=1.0, tilt_degrees=0.0), np.random.default_rng(3))
    reached = 0
    for _ in range(10):
        view = sampler._view(scan.source)
        assert view.ends is not None
        assert (view.ends.floor, view.ends.roof) == (0.0, 160.0)
        sampler._view = lambda _, view=view: view  # type: ignore[method-assign,misc]
        image, target = sampler.draw(scan)
        del sampler._view
        z = view.low[0] + (np.arange(SMALL[0]) + 0.5) * (view.high[0] - view.low[0]) / SMALL[0]
        beyond = (z < 0) | (z > 160)
        reached += int(beyond.sum())
        assert not levels(image)[0, 0][beyond].any()
        assert not target[0][beyond].any()
        assert bool((levels(image)[0, 0][~beyond] > 0).all())
    assert reached > 10


def test_the_ends_of_a_padded_scan_lean() -> None:
    # At the centre the planes lie at 20 and 80 mm; 50 mm to the right they have risen by 10 mm, 30 mm to the front
    # they have sunk by 6 mm.
    ends = Ends(20.0, 80.0, (-0.2, 0.2), 95.0)
    points = torch.tensor([[-31, 0, 0], [-29, 0, 0], [-22, 0, 50], [-18, 0, 50], [-37, 30, 0], [-35, 30, 0],
                           [29, 0, 0], [31, 0, 0], [46, 0, 250], [44, 0, 250]], dtype=torch.float32)  # fmt: skip
    air = ends.beyond(points[None, None], np.array([50.0, 0.0, 0.0]))
    assert air.shape == (1, 1, 1, 1, 10)
    assert air.flatten().tolist() == [True, False, True, False, True, False, False, True, True, False]


def test_unknown_voxels_stay_unknown() -> None:
    codes = anatomy((30, 40, 60))
    codes[:, :20] = IGNORE
    scan = scan_of(cached(codes, (7.0, 7.0, 7.0)))
    sampler = OrganSampler(SMALL, Augmentation(), np.random.default_rng(0))
    for _ in range(8):
        _, target = sampler.draw(scan)
        assert values_of(target) <= {*range(CLASSES), IGNORE}
        assert 0.05 < float((target == IGNORE).float().mean()) < 0.95


def test_a_part_of_a_scan_is_placed_by_its_origin() -> None:
    whole = cached(anatomy((30, 40, 60)), (7.0, 7.0, 7.0))
    part = CachedVolume(
        **{
            **whole.__dict__,
            "image": np.ascontiguousarray(whole.image[:, 2:, 3:-2]),
            "labels": np.ascontiguousarray(whole.labels[:, 2:, 3:-2]),
            "origin_mm": np.array([0.0, 14.0, 21.0]),
        }
    )
    samplers = [OrganSampler(SMALL, MOVED, np.random.default_rng(4)) for _ in range(2)]
    for _ in range(4):
        drawn = [sampler.draw(scan_of(source)) for sampler, source in zip(samplers, (whole, part), strict=True)]
        (image, target), (part_image, part_target) = drawn
        known = part_target != IGNORE
        assert float(known.float().mean()) > 0.5
        assert float((target != part_target)[known].float().mean()) < 1e-3
        # Half a voxel within the part's border the border's own value goes on.
        assert float(((image - part_image)[:, 0][known].abs() > 1e-3).float().mean()) < 0.05


# Extremes


@settings(max_examples=80, deadline=None)
@given(
    extent=st.tuples(*(st.floats(2.0, 900.0) for _ in range(3))),
    edges=st.tuples(*(st.tuples(st.floats(0, 1), st.floats(0, 1)) for _ in range(3))),
    seed=st.integers(0, 2**16),
)
def test_a_box_is_never_empty_nor_outside_its_scan(
    extent: tuple[float, float, float], edges: tuple[tuple[float, float], ...], seed: int
) -> None:
    scan_mm = np.array(extent)
    spacing = scan_mm / 4
    shares = np.sort(np.array(edges), axis=1)
    start = np.minimum(shares[:, 0] * scan_mm, scan_mm - spacing)
    stop = np.maximum(shares[:, 1] * scan_mm, start + spacing)
    source = CachedVolume(
        "a", "a", np.zeros((4, 4, 4), np.uint8), np.ones((4, 4, 4), np.uint8), spacing, np.zeros(3), scan_mm,
        np.stack((start, np.minimum(stop, scan_mm))),
    )  # fmt: skip
    sampler = OrganSampler((16, 16, 16), replace(Augmentation(), face_mm=12.0, cut=0.8), np.random.default_rng(seed))
    for _ in range(3):
        view = sampler._view(source)
        low, high = view.low, view.high
        reach = np.zeros(3) if view.ends is None else np.array([Augmentation().padding_mm, 0, 0])
        assert np.isfinite(low).all()
        assert (high - low > 0.1).all()
        assert (low > -reach - 1e-6).all()
        assert (high < scan_mm + reach + 1e-6).all()
    image, target = sampler.draw(scan_of(source))
    assert image.isfinite().all()
    assert target.shape == (1, 16, 16, 16)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 40, 40), (40, 1, 1), (3, 200, 2)])
def test_tiny_scans_can_be_drawn_from(shape: tuple[int, int, int]) -> None:
    source = cached(np.ones(shape, np.uint8), (5.0, 1.5, 1.5))
    organs = OrganSampler((16, 16, 16), Augmentation(), np.random.default_rng(0))
    roi = RoiSampler(Augmentation(), np.random.default_rng(0))
    for _ in range(5):
        for image, target in (organs.draw(scan_of(source)), roi.draw(scan_of(as_roi(source)))):
            assert image.isfinite().all()
            assert target.isfinite().all()


# The ROI net's fields of view


VIEWED = as_roi(cached(anatomy((160, 60, 60)), (5.0, 6.0, 6.0)))


def views(volume: CachedVolume, count: int, empty: float) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    sampler = RoiSampler(STILL, np.random.default_rng(0), empty)
    return [sampler._view(volume) for _ in range(count)]


def test_fields_of_view_lie_in_the_scan() -> None:
    shape = np.array(VIEWED.image.shape)
    for low, high in views(VIEWED, 400, empty=0.06):
        assert (low >= 0).all()
        # A view along z has at least 8 voxels, for which it may have to reach a little over the end.
        assert (high <= shape + np.array([8, 0, 0])).all()
        assert high[0] - low[0] >= 8
        # At the sides at most an eighth is cut off.
        assert (low[1:] <= 0.12 * shape[1:]).all()
        assert (high[1:] >= 0.88 * shape[1:]).all()


def test_most_fields_of_view_hold_organs_and_some_hold_all() -> None:
    start, stop = VIEWED.organs_mm / VIEWED.spacing
    seen = [min(high[0], stop[0]) - max(low[0], start[0]) for low, high in views(VIEWED, 400, empty=0.0)]
    shares = np.array(seen) / (stop[0] - start[0])
    assert shares.min() > 0.2
    assert 0.5 < np.mean(shares > 0.999) < 0.9
    assert np.mean(shares < 0.75) > 0.1


def test_some_fields_of_view_hold_no_organ() -> None:
    shape = (160, 20, 20)
    for below in (True, False):
        codes = np.zeros(shape, np.uint8)
        codes[slice(110, 150) if below else slice(10, 50), 5:15, 5:15] = 1
        volume = as_roi(cached(codes, (5.0, 12.0, 12.0)))
        start, stop = volume.organs_mm / volume.spacing
        for low, high in views(volume, 60, empty=1.0):
            assert high[0] <= start[0] or low[0] >= stop[0]
            assert (high[0] - low[0]) * volume.spacing[0] >= 100 - 1e-6
            assert low[0] >= 0
            assert high[0] <= shape[0]


def test_a_scan_without_room_above_or_below_always_shows_organs() -> None:
    codes = np.zeros((40, 20, 20), np.uint8)
    codes[5:35, 5:15, 5:15] = 1
    volume = as_roi(cached(codes, (5.0, 12.0, 12.0)))
    start, stop = volume.organs_mm / volume.spacing
    for low, high in views(volume, 100, empty=1.0):
        assert min(high[0], stop[0]) - max(low[0], start[0]) > 0


def test_a_narrow_field_of_view_shows_about_half_of_the_organs_at_least() -> None:
    sampler = RoiSampler(replace(STILL, narrow=1.0), np.random.default_rng(0))
    start, stop = VIEWED.organs_mm / VIEWED.spacing
    shares = []
    for _ in range(200):
        low, high = sampler._view(VIEWED)
        shares.append((np.minimum(high, stop) - np.maximum(low, start))[1:] / (stop - start)[1:])
    y, x = np.transpose(shares)
    # The other side may have lost an eighth of the scan.
    assert 0.4 < min(x.min(), y.min()) < 0.6
    # Always from side to side, two thirds of it from front to back.
    assert np.mean(x < 0.999) > 0.98
    assert 0.55 < np.mean(y < 0.999) < 0.78


def test_slanted_ends_are_air_without_organs_up_to_the_far_corner() -> None:
    source = as_roi(
        cached(np.ones((50, 50, 50), np.uint8), (4.0, 4.0, 4.0), image=np.full((50, 50, 50), 200, np.uint8))
    )
    scan = scan_of(source)
    sampler = RoiSampler(replace(STILL, padded=1.0, tilt_degrees=10.0), np.random.default_rng(0))
    cut_away = []
    for _ in range(20):
        image, share = sampler.draw(scan)
        air = levels(image) < 1
        assert torch.equal(air, share == 0)
        # Never a whole slice: inference does not show the net any.
        assert not air[0, 0].flatten(1).all(1).any()
        cut_away.append(float(air.float().mean()))
    assert max(cut_away) > 0.02
    straight = RoiSampler(replace(STILL, padded=1.0, tilt_degrees=0.0), np.random.default_rng(0))
    assert float((straight.draw(scan)[1] == 0).float().mean()) == 0


def test_the_roi_nets_scans_are_bent() -> None:
    source = as_roi(ellipsoid_scan())
    scan = scan_of(source)
    bent = RoiSampler(replace(STILL, bend_mm=14.0), np.random.default_rng(1))
    still = RoiSampler(STILL, np.random.default_rng(1))
    overlaps = [overlap(bent.draw(scan)[1] > 0.5, still.draw(scan)[1] > 0.5) for _ in range(12)]
    assert min(overlaps) < 0.97


# Grey values


def test_recolouring_with_no_strength_is_no_recolouring() -> None:
    torch.manual_seed(0)
    unit, organs = torch.rand(1, 1, 6, 7, 8), torch.randint(0, CLASSES, (1, 6, 7, 8))
    generator = np.random.default_rng(0)
    for _ in range(5):
        assert torch.allclose(recolour(unit, STILL, generator, organs), unit, atol=1e-6)


def test_recolouring_stays_in_the_window() -> None:
    torch.manual_seed(0)
    unit, organs = torch.rand(1, 1, 12, 14, 16), torch.randint(0, CLASSES, (1, 12, 14, 16))
    generator = np.random.default_rng(0)
    drawn = [recolour(unit, Augmentation(), generator, organs) for _ in range(20)]
    for image in drawn:
        assert image.shape == unit.shape
        assert image.isfinite().all()
        assert float(image.min()) >= 0
        assert float(image.max()) <= 1
    for first, second in itertools.pairwise(drawn):
        assert not torch.equal(first, second)


def test_organs_are_shifted_each_by_itself() -> None:
    unit = torch.full((1, 1, 6, 6, 10), 0.5)
    organs = torch.arange(10).div(2, rounding_mode="floor").expand(1, 6, 6, 10)
    how, generator = replace(STILL, organ_hu=50.0), np.random.default_rng(0)
    shifted = 0
    for _ in range(12):
        image = recolour(unit, how, generator, organs)
        assert torch.allclose(image[organs[:, None] == 0], torch.tensor(0.5))
        values = [image[organs[:, None] == code] for code in range(1, CLASSES)]
        for value in values:
            assert float(value.std()) < 1e-6
        shifted += len({round(float(value[0]), 4) for value in values}) == CLASSES - 1
    assert 3 <= shifted <= 10


def test_noise_is_as_strong_as_asked_for() -> None:
    unit, organs = torch.full((1, 1, 24, 24, 24), 0.5), torch.zeros(1, 24, 24, 24, dtype=torch.int64)
    how, generator = replace(STILL, noise_hu=30.0), np.random.default_rng(0)
    torch.manual_seed(0)
    # HU span 500 over [0, 1]; a level is drawn from 0 to 30 HU.
    found = [float(recolour(unit, how, generator, organs).std()) * 500 for _ in range(40)]
    assert min(found) == 0
    assert 15 < max(found) < 31


# Chance


@pytest.mark.parametrize("kind", ["organs", "roi"])
def test_a_seed_decides_all_samples(kind: str) -> None:
    volume = cached(anatomy((24, 30, 44)), (8.0, 7.5, 7.5))
    scan = scan_of(volume if kind == "organs" else as_roi(volume))

    def draw(seed: int) -> list[tuple[Tensor, Tensor]]:
        torch.manual_seed(seed)
        generator = np.random.default_rng(seed)
        if kind == "organs":
            return [OrganSampler(SMALL, Augmentation(), generator).draw(scan) for _ in range(3)]
        return [RoiSampler(Augmentation(), generator).draw(scan) for _ in range(3)]

    for (image, target), (again, target_again) in zip(draw(7), draw(7), strict=True):
        assert torch.equal(image, again)
        assert torch.equal(target, target_again)
    first, second, other = draw(7)[0][0], draw(7)[1][0], draw(8)[0][0]
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)


def test_drawing_leaves_the_scan_as_it_is() -> None:
    volume = cached(anatomy((24, 30, 44)), (8.0, 7.5, 7.5))
    scan = scan_of(volume)
    before = {key: np.copy(value) for key, value in volume.__dict__.items()}
    OrganSampler(SMALL, Augmentation(), np.random.default_rng(0)).draw(scan)
    assert all(np.array_equal(before[key], value) for key, value in volume.__dict__.items())


def test_tensors_are_centred_as_arrays_are() -> None:
    unit = np.linspace(0, 1, 11, dtype=np.float32)
    assert np.array_equal(centred(torch.from_numpy(unit)).numpy(), to_network(unit))


# The paper's sampler


def test_the_papers_sampler_starts_from_the_same_crop() -> None:
    pytest.importorskip("batchgenerators")
    from training.paper_sampling import boxed

    source = cached(anatomy((36, 48, 72)), (6.5, 6.5, 6.5))
    size = (48, 64, 96)
    image, codes = boxed(source, size)
    expected, target = OrganSampler(size, None, np.random.default_rng(0)).draw(scan_of(source))
    assert image.shape == codes.shape == size
    assert np.abs(to_network(image) - expected[0, 0].numpy()).max() < 1e-4
    # Its labels are those of the nearest voxels; the others differ beside borders alone.
    differ = codes != target[0].numpy()
    beside = ndimage.binary_dilation(at_borders(torch.from_numpy(codes)[None])[0].numpy())
    assert not (differ & ~beside).any()
    assert differ.mean() < 0.01


def test_the_papers_sampler_keeps_labels_and_image_together() -> None:
    pytest.importorskip("batchgenerators")
    from training.paper_sampling import PaperSampler

    codes = anatomy((36, 48, 72))
    scan = scan_of(cached(codes, (6.0, 6.0, 6.0), image=np.where(codes == 1, 200, 0).astype(np.uint8)))
    sampler = PaperSampler((32, 48, 64), np.random.default_rng(0))
    moved = 0
    first = sampler.draw(scan)[1]
    for _ in range(20):
        image, target = sampler.draw(scan)
        assert image.shape == (1, 1, 32, 48, 64)
        assert target.shape == (1, 32, 48, 64)
        assert image.dtype == torch.float32
        assert target.dtype == torch.int64
        assert values_of(target) <= {*range(CLASSES), IGNORE}
        known = target != IGNORE
        # Noise has a variance of at most 0.1 over a range of 2: averaging over neighbours leaves the organ.
        smooth = torch.nn.functional.avg_pool3d(levels(image), 3, 1, 1, count_include_pad=False)[:, 0]
        assert overlap((smooth > 100) & known, (target == 1) & known) > 0.85
        liver, spleen = target[0] == 1, target[0] == 3
        if liver.any() and spleen.any():
            assert centroid(liver)[2] > centroid(spleen)[2]
        moved += not torch.equal(target, first)
    assert 3 <= moved <= 20


def test_the_papers_rotations_are_about_the_bodys_axis() -> None:
    pytest.importorskip("batchgenerators")
    from training.paper_sampling import PaperSampler

    shape = (36, 48, 72)
    rows = np.broadcast_to(np.linspace(0, 255, shape[0])[:, None, None], shape).astype(np.uint8)
    scan = scan_of(cached(anatomy(shape), (6.0, 6.0, 6.0), image=rows))
    sampler = PaperSampler((32, 48, 64), np.random.default_rng(0))
    noiseless = 0
    for _ in range(20):
        image, _ = sampler.draw(scan)
        spread = image[0, 0].flatten(1).std(dim=1)
        if float(image.diff(dim=4).abs().median()) < 1e-4:
            noiseless += 1
            assert float(spread.max()) < 1e-3
    assert noiseless >= 10
