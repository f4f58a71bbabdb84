import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastorgan.intensity import LEVELS, WINDOW_HU, level_of, to_levels, to_network, to_unit


@pytest.mark.parametrize("dtype", ["<i2", ">i2", "i4", "f4", ">f8"])
def test_the_window_is_linear_and_clipped(dtype: str) -> None:
    hu = np.array([-1024, -200, -75, 50, 175, 300, 3071], dtype)
    unit = to_unit(hu)
    assert unit.dtype == np.float32
    assert unit.dtype.isnative
    assert unit == pytest.approx([0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0], abs=1e-6)


def test_unsigned_values_do_not_wrap_round() -> None:
    assert to_unit(np.array([0, 300, 65535], np.uint16)) == pytest.approx([0.4, 1.0, 1.0], abs=1e-6)


def test_the_input_is_left_as_it_was() -> None:
    hu = np.array([[-500.0, 50.0]], np.float32)
    unit = to_unit(hu)
    assert hu.tolist() == [[-500.0, 50.0]]
    assert not np.shares_memory(hu, unit)
    assert unit.shape == (1, 2)


def test_the_level_of_an_hu_is_not_rounded() -> None:
    assert [level_of(hu) for hu in (-1000.0, -150.0, 50.0, 300.0)] == pytest.approx([0.0, 25.5, 127.5, 255.0], abs=1e-4)


def test_levels_round_to_the_nearest_step() -> None:
    # 0.2 of 255 is 51; 0.4 of a step falls to 0, 0.6 of a step rises to 1.
    unit = np.array([0.0, 0.2, 0.4 / 255, 0.6 / 255, 1.0], np.float32)
    levels = to_levels(unit)
    assert levels.dtype == np.uint8
    assert levels.tolist() == [0, 51, 0, 1, 255]


@given(st.floats(*WINDOW_HU, width=32))
def test_levels_are_off_by_half_a_step_at_most(hu: float) -> None:
    level = to_levels(to_unit(np.array([hu])))
    low, high = WINDOW_HU
    step = (high - low) / LEVELS
    assert low + float(level[0]) * step == pytest.approx(hu, abs=step / 2 + 1e-3)


def test_networks_see_minus_one_to_one() -> None:
    seen = to_network(np.array([0.0, 0.5, 1.0], np.float32))
    assert seen.dtype == np.float32
    assert seen.tolist() == [-1.0, 0.0, 1.0]
