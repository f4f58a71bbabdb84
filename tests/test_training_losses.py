import math

import pytest

pytest.importorskip("torch")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastorgan.labels import CLASSES, IGNORE
from training.losses import VOXELS_AT_ONCE, at_borders, entropy_and_dice, focal, foreground_loss


def logits_of(*probabilities: list[float]) -> Tensor:
    """Logits (1, C, 1, 1, voxels) whose softmax is the given probabilities, one list of C a voxel."""
    return torch.tensor(probabilities).T.log()[None, :, None, None, :].requires_grad_()


def codes_of(*codes: int) -> Tensor:
    """Codes (1, 1, 1, voxels)."""
    return torch.tensor(codes)[None, None, None, :]


def cross_entropy(logits: Tensor, codes: Tensor) -> Tensor:
    return entropy_and_dice(logits, codes)[0]


def dice(logits: Tensor, codes: Tensor) -> Tensor:
    return entropy_and_dice(logits, codes)[1]


def entropy_with_borders(logits: Tensor, codes: Tensor) -> Tensor:
    return entropy_and_dice(logits, codes, borders=2.0)[0]


def gradient(loss: Tensor, logits: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(loss, logits)
    return found


SURE = [0.1, 0.9]
UNSURE = [0.4, 0.6]


# Cross-entropy and focal loss


def test_cross_entropy_by_hand() -> None:
    logits = logits_of(SURE, UNSURE)
    expected = -(math.log(0.9) + math.log(0.4)) / 2
    assert float(cross_entropy(logits, codes_of(1, 0)).detach()) == pytest.approx(expected, rel=1e-5)


def test_focal_loss_by_hand() -> None:
    logits = logits_of(SURE, UNSURE)
    expected = -(0.1**2 * math.log(0.9) + 0.6**2 * math.log(0.4)) / 2
    assert float(focal(logits, codes_of(1, 0)).detach()) == pytest.approx(expected, rel=1e-4)
    expected = -(0.1**3 * math.log(0.9) + 0.6**3 * math.log(0.4)) / 2
    assert float(focal(logits, codes_of(1, 0), gamma=3.0).detach()) == pytest.approx(expected, rel=1e-4)


def test_knowing_nothing_of_five_classes() -> None:
    logits = torch.zeros(1, CLASSES, 2, 3, 4)
    codes = torch.full((1, 2, 3, 4), 3)
    assert float(cross_entropy(logits, codes)) == pytest.approx(math.log(5), rel=1e-6)
    assert float(focal(logits, codes)) == pytest.approx(0.8**2 * math.log(5), rel=1e-6)


def test_focal_loss_without_focus_is_cross_entropy() -> None:
    torch.manual_seed(0)
    logits, codes = torch.randn(2, CLASSES, 3, 4, 5), torch.randint(0, CLASSES, (2, 3, 4, 5))
    assert float(focal(logits, codes, gamma=0.0)) == pytest.approx(float(cross_entropy(logits, codes)), rel=1e-6)


@pytest.mark.parametrize("loss", [cross_entropy, focal])
def test_unknown_voxels_are_left_out_of_the_mean(loss: type) -> None:
    alone = float(loss(logits_of(SURE, UNSURE), codes_of(1, 0)).detach())
    logits = logits_of(SURE, [0.999, 0.001], UNSURE)
    among = loss(logits, codes_of(1, IGNORE, 0))
    assert float(among.detach()) == pytest.approx(alone, rel=1e-5)
    slope = gradient(among, logits)
    assert not slope[..., 1].any()
    assert slope[..., [0, 2]].all()


# Borders


def test_voxels_at_borders_share_a_face_with_another_class() -> None:
    assert at_borders(codes_of(0, 0, 1, 1, 1, 2))[0, 0, 0].tolist() == [False, True, True, False, True, True]
    # The unknown tell of no border, nor do corners and edges.
    assert at_borders(codes_of(0, IGNORE, 1, 1))[0, 0, 0].tolist() == [False] * 4
    codes = torch.zeros(2, 4, 4, 4, dtype=torch.int64)
    codes[1, 1, 2, 2] = 3
    expected = torch.zeros_like(codes, dtype=torch.bool)
    for place in ((1, 2, 2), (0, 2, 2), (2, 2, 2), (1, 1, 2), (1, 3, 2), (1, 2, 1), (1, 2, 3)):
        expected[1, *place] = True
    assert torch.equal(at_borders(codes), expected)


def test_cross_entropy_with_borders_by_hand() -> None:
    logits = logits_of([0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.4, 0.6])
    codes = codes_of(0, 0, 1, 1)
    inner = -(math.log(0.9) + math.log(0.6))
    outer = -(math.log(0.8) + math.log(0.3))
    expected = (inner + outer) / 4 + 2.0 * outer / 2
    assert float(entropy_with_borders(logits, codes).detach()) == pytest.approx(expected, rel=1e-5)
    # Where there are none, it is the mean of all.
    assert float(entropy_with_borders(logits, codes * 0).detach()) == pytest.approx(
        float(cross_entropy(logits, codes * 0).detach()), rel=1e-6
    )


# Dice


def test_dice_by_hand() -> None:
    logits = logits_of([0.1, 0.9], [0.4, 0.6], [0.8, 0.2], [0.9, 0.1])
    # Shared 0.9 + 0.6; sums 1.8 of probability and 2 of target; 1 is added above and below.
    expected = 1 - (2 * 1.5 + 1) / (1.8 + 2 + 1)
    assert float(dice(logits, codes_of(1, 1, 0, 0)).detach()) == pytest.approx(expected, rel=1e-5)


def test_dice_leaves_unknown_voxels_out() -> None:
    logits = logits_of([0.1, 0.9], [0.4, 0.6], [0.8, 0.2], [0.9, 0.1])
    loss = dice(logits, codes_of(1, 1, IGNORE, 0))
    assert float(loss.detach()) == pytest.approx(1 - (2 * 1.5 + 1) / (1.6 + 2 + 1), rel=1e-5)
    slope = gradient(loss, logits)
    assert not slope[..., 2].any()
    assert slope[..., 3].all()


def test_dice_is_the_mean_over_organs_that_are_there() -> None:
    one = [0.2, 0.5, 0.2, 0.1]
    two = [0.1, 0.1, 0.6, 0.2]
    logits = logits_of(one, two)
    # Organ 1: shared 0.5, sums 0.6 + 1; organ 2: shared 0.6, sums 0.8 + 1; organ 3 is absent and has no term.
    expected = 1 - ((2 * 0.5 + 1) / (0.6 + 1 + 1) + (2 * 0.6 + 1) / (0.8 + 1 + 1)) / 2
    assert float(dice(logits, codes_of(1, 2)).detach()) == pytest.approx(expected, rel=1e-5)


def test_dice_of_a_perfect_answer_is_zero() -> None:
    codes = torch.arange(CLASSES).repeat(40)[None, None, None, :]
    logits = torch.nn.functional.one_hot(codes, CLASSES).movedim(-1, 1) * 100.0
    assert float(dice(logits, codes)) == pytest.approx(0.0, abs=1e-6)


def test_dice_where_no_organ_is_there() -> None:
    logits = logits_of(SURE, UNSURE)
    loss = dice(logits, codes_of(0, IGNORE))
    assert float(loss.detach()) == 0.0
    assert not gradient(loss, logits).any()


# All of them


@pytest.mark.parametrize("loss", [cross_entropy, focal, dice, entropy_with_borders])
def test_where_all_is_unknown_there_is_nothing_to_learn(loss: type) -> None:
    logits = logits_of(SURE, UNSURE)
    value = loss(logits, codes_of(IGNORE, IGNORE))
    assert float(value.detach()) == 0.0
    slope = gradient(value, logits)
    assert slope.isfinite().all()
    assert not slope.any()


@pytest.mark.parametrize("loss", [cross_entropy, focal, dice, entropy_with_borders])
def test_gradients_stay_finite_when_the_network_is_wrong_and_sure(loss: type) -> None:
    codes = torch.tensor([0, 1, 2, IGNORE])[None, None, None, :]
    for confidence in (1e2, 1e4):
        logits = torch.zeros(1, CLASSES, 1, 1, 4)
        logits[:, 4] = confidence
        logits.requires_grad_()
        value = loss(logits, codes)
        assert value.isfinite()
        assert gradient(value, logits).isfinite().all()


@pytest.mark.parametrize("loss", [cross_entropy, focal, dice, entropy_with_borders])
def test_half_precision_logits_are_summed_in_full(loss: type) -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, CLASSES, 8, 8, 8).bfloat16()
    codes = torch.randint(0, CLASSES, (1, 8, 8, 8))
    value = loss(logits, codes)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(float(loss(logits.float(), codes)), rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**16), st.floats(0.1, 30.0))
def test_bounds(seed: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, CLASSES, 3, 4, 5, generator=generator) * spread
    codes = torch.randint(0, CLASSES + 2, (1, 3, 4, 5), generator=generator)
    codes = torch.where(codes >= CLASSES, IGNORE, codes)
    assert 0.0 <= float(dice(logits, codes)) <= 1.0
    assert 0.0 <= float(focal(logits, codes)) <= float(cross_entropy(logits, codes))


# The ROI net's loss


def test_foreground_loss_by_hand() -> None:
    logit, share = torch.zeros(1, 1, 2, 2, 2), torch.full((1, 1, 2, 2, 2), 0.5)
    # Eight voxels: shared 8 * 0.25, sums 4 + 4; 100 is added above and below.
    expected = math.log(2) + 1 - (2 * 2 + 100) / (4 + 4 + 100)
    assert float(foreground_loss(logit, share)) == pytest.approx(expected, rel=1e-6)


def test_foreground_loss_of_a_view_without_organs() -> None:
    share = torch.zeros(1, 1, 8, 8, 8)
    assert float(foreground_loss(torch.full_like(share, -20.0), share)) == pytest.approx(0.0, abs=1e-6)
    # All of 512 voxels taken for organs: 20 of entropy, and 1 - 100 / 612 of Dice.
    assert float(foreground_loss(torch.full_like(share, 20.0), share)) == pytest.approx(20 + 1 - 100 / 612, rel=1e-5)


def test_foreground_loss_has_finite_gradients() -> None:
    for confidence in (-1e4, 0.0, 1e4):
        logit = torch.full((1, 1, 4, 4, 4), confidence, requires_grad=True)
        share = torch.linspace(0, 1, 64).reshape(1, 1, 4, 4, 4)
        loss = foreground_loss(logit, share)
        assert loss.isfinite()
        assert gradient(loss, logit).isfinite().all()


# Entropy and Dice in one pass


def plain_entropy_and_dice(logits: Tensor, codes: Tensor, borders: float) -> tuple[Tensor, Tensor]:
    """The same by torch's own operations over whole arrays, which differentiates them itself."""
    entropy = torch.nn.functional.cross_entropy(logits, codes, ignore_index=IGNORE)
    inner = codes.masked_fill(~at_borders(codes), IGNORE)
    entropy = entropy + borders * torch.nn.functional.cross_entropy(logits, inner, ignore_index=IGNORE)
    known = (codes != IGNORE)[:, None]
    probabilities = torch.softmax(logits, 1) * known
    target = torch.nn.functional.one_hot(codes.masked_fill(codes == IGNORE, 0), CLASSES).movedim(-1, 1) * known
    axes = (0, 2, 3, 4)
    score = (2 * (probabilities * target).sum(axes) + 1) / (probabilities.sum(axes) + target.sum(axes) + 1)
    there = target.sum(axes) > 0
    there[0] = False
    return entropy, 1 - score[there].mean()


@pytest.mark.parametrize("borders", [0.0, 1.5])
@pytest.mark.parametrize("absent", [None, 4])
def test_entropy_and_dice_agree_with_torchs_own_gradients(absent: int | None, borders: float) -> None:
    # Two samples of more voxels than are taken at a time, and not a multiple of them.
    shape = (30, 31, 41)
    assert math.prod(shape) > 2 * VOXELS_AT_ONCE
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(2, CLASSES, *shape, generator=generator) * 3).requires_grad_()
    codes = torch.randint(0, CLASSES + 1, (2, *shape), generator=generator)
    codes = torch.where((codes == CLASSES) | (codes == absent), IGNORE, codes)
    # A part without borders, so that they are not all.
    codes[:, :, :12] = 0
    entropy, overlap = entropy_and_dice(logits, codes, borders)
    plain_entropy, plain_overlap = plain_entropy_and_dice(logits, codes, borders)
    torch.testing.assert_close(entropy, plain_entropy, rtol=1e-5, atol=0)
    torch.testing.assert_close(overlap, plain_overlap, rtol=1e-5, atol=0)
    # Weights tell the two from each other.
    found = gradient(2 * entropy + 3 * overlap, logits)
    true = gradient(2 * plain_entropy + 3 * plain_overlap, logits)
    torch.testing.assert_close(found, true, rtol=1e-3, atol=float(true.abs().max()) * 1e-5)


def test_gradients_of_half_precision_logits_are_of_their_kind() -> None:
    logits = torch.randn(1, CLASSES, 4, 4, 4).bfloat16().requires_grad_()
    codes = torch.randint(0, CLASSES, (1, 4, 4, 4))
    entropy, overlap = entropy_and_dice(logits, codes)
    assert gradient(entropy + overlap, logits).dtype == torch.bfloat16
