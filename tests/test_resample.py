import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from fastorgan.box import Box
from fastorgan.resample import Bands, axis_weights, resize

Sizes = tuple[int, int, int]

sizes = st.tuples(*[st.integers(1, 9)] * 3)


def as_float(values: NDArray[np.generic]) -> NDArray[np.float32]:
    return values.astype(np.float32)


@st.composite
def boxes(draw: st.DrawFn, shape: Sizes) -> Box:
    """Boxes within a volume of `shape`, at least a tenth of a voxel wide."""
    starts, stops = [], []
    for n in shape:
        start = draw(st.floats(0, n - 0.1))
        starts.append(start)
        stops.append(draw(st.floats(start + 0.1, n)))
    return Box((starts[0], starts[1], starts[2]), (stops[0], stops[1], stops[2]))


# Weights along one axis


def test_equal_sizes_are_the_identity() -> None:
    assert np.array_equal(axis_weights(5, 0, 5, 5), np.eye(5, dtype=np.float32))


def test_enlarging_interpolates_between_centres() -> None:
    # Samples lie at -0.25, 0.25, 0.75 and 1.25 of the voxel centres 0 and 1; the outer two are clipped to the ends.
    expected = [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]]
    assert axis_weights(2, 0, 2, 4) == pytest.approx(np.array(expected))


def test_shrinking_averages() -> None:
    # Samples at 0.5 and 2.5; a kernel of half width 2 weighs distances 0.5, 0.5, 1.5 as 0.75, 0.75, 0.25 (sum 1.75).
    expected = np.array([[3, 3, 1, 0], [0, 1, 3, 3]]) / 7
    assert axis_weights(4, 0, 4, 2) == pytest.approx(expected)


def test_a_box_on_voxel_edges_picks_its_voxels() -> None:
    assert axis_weights(4, 1, 3, 2).tolist() == [[0, 1, 0, 0], [0, 0, 1, 0]]


def test_samples_outside_take_the_end() -> None:
    assert axis_weights(3, -4, -2, 2).tolist() == [[1, 0, 0], [1, 0, 0]]
    assert axis_weights(3, 3, 5, 2).tolist() == [[0, 0, 1], [0, 0, 1]]


@pytest.mark.parametrize(
    ("length", "start", "stop", "samples"), [(0, 0, 1, 1), (3, 0, 3, 0), (3, 2, 2, 4), (3, 2, 1, 4), (3, 0, np.nan, 4)]
)
def test_what_cannot_be_resampled_is_refused(length: int, start: float, stop: float, samples: int) -> None:
    with pytest.raises(ValueError, match="cannot resample"):
        axis_weights(length, start, stop, samples)


@given(st.integers(1, 40), st.floats(-5, 40), st.floats(0.1, 50), st.integers(1, 40))
def test_weights_are_an_average_without_a_preferred_direction(
    length: int, start: float, size: float, samples: int
) -> None:
    weights = axis_weights(length, start, start + size, samples)
    assert weights.shape == (samples, length)
    assert weights.min() >= 0
    assert weights.sum(axis=1) == pytest.approx(np.ones(samples), abs=1e-5)
    mirrored = axis_weights(length, length - start - size, length - start, samples)
    assert mirrored[::-1, ::-1] == pytest.approx(weights, abs=1e-4)


# Volumes


@given(hnp.arrays(np.int16, sizes, elements=st.integers(-1024, 3071)), st.permutations([0, 1, 2]))
def test_the_whole_box_at_its_own_size_is_the_volume(volume: NDArray[np.int16], order: list[int]) -> None:
    strided = volume.transpose(order)[::-1]
    resized = resize(strided, Box.whole(strided.shape), strided.shape, as_float)
    assert resized.dtype == np.float32
    assert np.array_equal(resized, strided)


@given(st.data(), sizes, sizes, st.floats(-1000, 1000, width=32))
def test_a_constant_stays(data: st.DataObject, shape: Sizes, size: Sizes, value: float) -> None:
    box = data.draw(boxes(shape))
    resized = resize(np.full(shape, value, np.float32), box, size, as_float)
    assert resized.shape == size
    assert resized == pytest.approx(np.full(size, value), rel=1e-5, abs=1e-5)


@given(st.data(), sizes, sizes)
def test_three_axes_are_three_times_one_axis(data: st.DataObject, shape: Sizes, size: Sizes) -> None:
    volume = data.draw(hnp.arrays(np.int16, shape, elements=st.integers(-100, 100)))
    box = data.draw(boxes(shape))
    z, y, x = (
        axis_weights(n, a, b, s).astype(float) for n, a, b, s in zip(shape, box.start, box.stop, size, strict=True)
    )
    expected = np.einsum("ai,bj,ck,ijk->abc", z, y, x, volume.astype(float))
    assert resize(volume, box, size, as_float) == pytest.approx(expected, abs=1e-3)
    # Laid out backwards in memory, it is the same volume.
    backwards = data.draw(st.tuples(*[st.sampled_from([1, -1])] * 3))
    turned = tuple(slice(None, None, step) for step in backwards)
    assert resize(volume[turned].copy()[turned], box, size, as_float) == pytest.approx(expected, abs=1e-3)


def ramp_error(axis: int, samples: int, start: float, stop: float, length: int = 60) -> float:
    """Largest distance in voxels between a resampled ramp and the ramp itself, away from the volume's ends."""
    shape = [2, 2, 2]
    shape[axis] = length
    ramp = np.arange(length, dtype=np.float32)
    volume = np.broadcast_to(np.moveaxis(ramp[:, None, None], 0, axis), shape)
    starts, stops, size = [0.0] * 3, [2.0] * 3, [2, 2, 2]
    starts[axis], stops[axis], size[axis] = start, stop, samples
    box = Box((starts[0], starts[1], starts[2]), (stops[0], stops[1], stops[2]))
    found = np.moveaxis(resize(volume, box, (size[0], size[1], size[2]), as_float), axis, 0)[:, 0, 0]
    step = (stop - start) / samples
    centres = start + (np.arange(samples) + 0.5) * step - 0.5
    inner = (centres > max(step, 1.0)) & (centres < length - 1 - max(step, 1.0))
    return float(np.abs(found - centres)[inner].max(initial=0.0))


@given(st.sampled_from([0, 1, 2]), st.floats(0, 20), st.floats(1, 20), st.integers(20, 60))
def test_enlarging_keeps_a_ramp(axis: int, start: float, size: float, samples: int) -> None:
    assert ramp_error(axis, samples, start, start + size) < 1e-3


@given(st.sampled_from([0, 1, 2]), st.sampled_from([2, 3, 4, 5, 6]), st.integers(3, 10), st.floats(0, 1))
def test_shrinking_by_a_whole_number_keeps_a_ramp_on_and_between_voxels(
    axis: int, factor: int, samples: int, place: float
) -> None:
    start = round(place * (60 - factor * samples))
    assert ramp_error(axis, samples, start, start + factor * samples) < 1e-3


@given(st.sampled_from([0, 1, 2]), st.integers(3, 60))
def test_shrinking_by_a_fraction_moves_a_ramp_by_little(axis: int, samples: int) -> None:
    # A sampled kernel of fractional width has its centre of mass up to 0.09 voxels off its middle.
    assert ramp_error(axis, samples, 0.0, 60.0) < 0.1


@given(st.tuples(*[st.sampled_from([1, 2, 3, 4, 5])] * 3), st.integers(0, 2**32 - 1))
def test_shrinking_by_whole_numbers_preserves_the_mean(factors: Sizes, seed: int) -> None:
    # Nothing within the reach of the outermost samples, whose kernels are cut.
    z, y, x = (6 * f for f in factors)
    volume = np.zeros((z, y, x), np.float32)
    inner = tuple(slice(2 * f, -2 * f) for f in factors)
    volume[inner] = np.random.default_rng(seed).uniform(0, 1, volume[inner].shape)
    assert resize(volume, Box.whole(volume.shape), (6, 6, 6), as_float).mean() == pytest.approx(volume.mean(), rel=1e-4)


@given(
    length=st.integers(1, 60),
    samples=st.integers(1, 60),
    span=st.tuples(st.floats(-0.2, 0.9), st.floats(0.05, 1.2)),
    seed=st.integers(0, 9),
)
def test_bands_are_the_whole_product(length: int, samples: int, span: tuple[float, float], seed: int) -> None:
    start, size = length * span[0], length * span[1]
    weights = axis_weights(length, start, start + size, samples)
    plane = np.random.default_rng(seed).normal(size=(length, 7)).astype(np.float32)
    bands = Bands(weights)
    assert bands.down(plane) == pytest.approx(weights @ plane, abs=1e-5)
    assert bands.along(plane.T) == pytest.approx((weights @ plane).T, abs=1e-5)


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
def test_the_order_in_memory_does_not_matter(order: Sizes) -> None:
    volume = np.random.default_rng(0).integers(-1000, 1000, (21, 17, 30)).astype(np.int16)
    box = Box((1.5, 2.0, 0.0), (19.0, 16.5, 29.0))
    turned = np.ascontiguousarray(volume.transpose(order)).transpose(np.argsort(order))
    resized = resize(turned, box, (9, 20, 11), as_float)
    assert resized.flags.c_contiguous
    assert resized == pytest.approx(resize(volume, box, (9, 20, 11), as_float), abs=1e-3)


def test_only_the_box_is_read_and_slice_by_slice() -> None:
    volume = np.full((20, 30, 40), np.nan, np.float32)
    volume[4:9, 10:21, 5:31] = 7
    seen = []

    def convert(values: NDArray[np.generic]) -> NDArray[np.float32]:
        seen.append(values.shape)
        return as_float(values)

    resized = resize(volume, Box((4, 10, 5), (9, 21, 31)), (5, 11, 26), convert)
    assert (resized == 7).all()
    assert seen == [(11, 26)] * 5


def test_the_volume_is_never_held_as_floats() -> None:
    volume = np.zeros((100, 120, 120), np.int16)
    tracemalloc.start()
    try:
        resize(volume, Box.whole(volume.shape), (16, 16, 16), as_float)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 0.5e6, "as floats one slice has 0.06 MB, the volume 6.9 MB"
