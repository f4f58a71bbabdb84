import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fastorgan.labels import CLASSES, ORGANS
from fastorgan.postprocess import LEAST_MM3, REMOVED, organ_margins
from fastorgan.resample import axis_weights

LIVER, KIDNEY, SPLEEN, PANCREAS = (organ.code for organ in ORGANS)

CM3 = 1000.0
"""Volume of a voxel of 10 mm."""

Block = tuple[slice, slice, slice]


def logits_of(*blocks: tuple[int, Block], shape: tuple[int, int, int] = (8, 8, 30)) -> NDArray[np.float32]:
    """Logits in which each block belongs to its class by 4 to 1, and the rest to the background by 3 to 1."""
    logits = np.ones((CLASSES, *shape), np.float32)
    logits[0] = 3
    for code, block in blocks:
        logits[0][block] = 1
        logits[code][block] = 4
    return logits


def block(first: int, last: int, side: int = 4) -> Block:
    return slice(1, 1 + side), slice(1, 1 + side), slice(first, last)


def test_a_margin_is_the_lead_over_the_best_other_class() -> None:
    logits = np.array([[2, 5, 1], [4, 4, 1], [1, 3, 6], [0, 0, 0], [3, 1, 5.5]], np.float32)
    margins = organ_margins(np.repeat(logits, 20, axis=1)[:, None, None, :], CM3)
    # The liver leads by 4 - 3 in the first part, lags by 4 - 5 and 1 - 6 in the others.
    assert margins[LIVER][0, 0, ::20].tolist() == [1, -1, -5]
    assert margins[KIDNEY][0, 0, ::20].tolist() == [-3, -2, 0.5]
    assert margins.keys() == {LIVER, KIDNEY}
    assert margins[LIVER].dtype == np.float32


def test_a_tie_belongs_to_nobody() -> None:
    logits = logits_of((LIVER, block(1, 10)))
    logits[SPLEEN] = logits[LIVER]
    assert organ_margins(logits, CM3) == {}


@pytest.mark.parametrize(("organ", "pieces"), [(LIVER, 1), (KIDNEY, 2), (SPLEEN, 1), (PANCREAS, 1)])
def test_anatomy_limits_the_pieces(organ: int, pieces: int) -> None:
    large, middle, small = block(1, 10), block(12, 18), block(20, 24)
    margin = organ_margins(logits_of((organ, small), (organ, large), (organ, middle)), CM3)[organ]
    assert (margin[large] == 3).all()
    assert (margin[middle] == (3 if pieces == 2 else REMOVED)).all()
    assert (margin[small] == REMOVED).all()
    assert (margin > 0).sum() == 16 * (9 + (6 if pieces == 2 else 0))


@pytest.mark.parametrize(("lag", "together"), [(0.5, True), (0.99, True), (1.01, False), (3, False)])
def test_parts_are_one_piece_where_the_net_hesitates_between_them(lag: float, together: bool) -> None:
    first, gap, second = block(1, 10), block(10, 12), block(12, 18)
    logits = logits_of((PANCREAS, first), (PANCREAS, second))
    logits[PANCREAS][gap] = logits[0][gap] - lag
    margin = organ_margins(logits, CM3)[PANCREAS]
    assert (margin[first] == 3).all()
    assert (margin[second] == (3 if together else REMOVED)).all()
    # What lies between stays background.
    assert margin[gap].max() == pytest.approx(-lag)


def test_bowel_is_no_part_of_a_kidney_to_which_the_net_half_joins_it() -> None:
    first, second, bowel = block(1, 10), block(12, 18), block(20, 24)
    logits = logits_of((KIDNEY, first), (KIDNEY, second), (KIDNEY, bowel))
    for gap in (block(10, 12), block(18, 20)):
        logits[KIDNEY][gap] = logits[0][gap] - 0.5
    margin = organ_margins(logits, CM3)[KIDNEY]
    assert (margin[first] == 3).all()
    assert (margin[second] == 3).all()
    assert (margin[bowel] == REMOVED).all()


@pytest.mark.parametrize("organ", ORGANS)
def test_a_piece_below_the_least_volume_is_no_organ(organ: object) -> None:
    code, least = next((o.code, LEAST_MM3[o.name]) for o in ORGANS if o is organ)
    logits = logits_of((code, block(1, 4, side=2)))  # 12 voxels
    assert code in organ_margins(logits, least / 12)
    assert organ_margins(logits, least / 12.1) == {}


def test_background_everywhere_holds_no_organ() -> None:
    assert organ_margins(logits_of(), CM3) == {}


def test_the_logits_are_left_as_they_were() -> None:
    logits = logits_of((LIVER, block(1, 10)), (LIVER, block(12, 15)))
    before = logits.copy()
    logits.setflags(write=False)
    organ_margins(logits, CM3)
    assert np.array_equal(logits, before)


@given(
    st.integers(0, 2**32 - 1),
    st.tuples(*[st.integers(2, 6)] * 3),
    st.tuples(*[st.integers(1, 14)] * 3),
    st.sampled_from([0, 1, 3]),
)
def test_two_organs_never_share_a_point(
    seed: int, shape: tuple[int, int, int], size: tuple[int, int, int], digits: int
) -> None:
    # Few digits make many ties.
    logits = np.random.default_rng(seed).normal(0, 2, (CLASSES, *shape)).round(digits).astype(np.float32)
    z, y, x = (axis_weights(n, 0, n, m).astype(float) for n, m in zip(shape, size, strict=True))
    margins = organ_margins(logits, 1e6)
    fine = {code: np.einsum("ai,bj,ck,ijk->abc", z, y, x, margin) for code, margin in margins.items()}
    for a in fine:
        for b in fine:
            if a < b:
                assert (margins[a] + margins[b]).max() <= 1e-6
                assert np.minimum(fine[a], fine[b]).max() <= 1e-6


@given(st.integers(0, 2**32 - 1))
def test_what_is_positive_is_where_the_organ_wins(seed: int) -> None:
    logits = np.random.default_rng(seed).normal(0, 1, (CLASSES, 4, 5, 6)).astype(np.float32)
    winners = logits.argmax(axis=0)
    margins = organ_margins(logits, 1e6)
    for code, margin in margins.items():
        assert (winners[margin > 0] == code).all()
        assert (margin[winners != code] <= 0).all()
        assert (margin[(winners == code) & (margin <= 0)] == REMOVED).all()
