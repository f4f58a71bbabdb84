import pytest

pytest.importorskip("torch")

import torch

from fastorgan.labels import IGNORE
from fastorgan.networks import DenseVNet
from fastorgan.networks.blocks import upsample
from training.cache import STRUCTURES
from training.losses import entropy_and_dice
from training.structures import TwoHeads, enlarge, split_codes, structures_loss


def test_codes_are_parted() -> None:
    codes = torch.tensor([0, 1, 4, 5, 12, IGNORE])
    organs, structures = split_codes(codes)
    assert organs.tolist() == [0, 1, 4, 0, 0, IGNORE]
    assert structures.tolist() == [0, 0, 0, 1, 8, IGNORE]
    assert len(STRUCTURES) == 8


def test_the_second_head_leaves_the_first_as_it_is() -> None:
    torch.manual_seed(0)
    network = DenseVNet().eval()
    x = torch.randn(1, 1, 16, 24, 32)
    both = TwoHeads(network).eval()
    organs, structures = both(x)
    torch.testing.assert_close(organs, network(x), rtol=0, atol=1e-5)
    torch.testing.assert_close(structures, both.head(network.features(x)), rtol=0, atol=1e-5)
    assert structures.shape == (1, 9, 8, 12, 16)


def test_logits_are_enlarged_as_in_inference() -> None:
    logits = torch.randn(2, 5, 3, 4, 6, requires_grad=True)
    slopes = torch.randn(2, 5, 6, 8, 12)
    torch.testing.assert_close(enlarge(logits), upsample(logits))
    (found,), (expected,) = (torch.autograd.grad(f(logits), logits, slopes) for f in (enlarge, upsample))
    torch.testing.assert_close(found, expected)


def test_the_loss_is_entropy_and_dice_at_half_the_size() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 9, 4, 4, 4)
    coarse = torch.randint(0, 9, (1, 4, 4, 4))
    coarse[0, 0] = IGNORE
    codes = coarse.repeat_interleave(2, 1).repeat_interleave(2, 2).repeat_interleave(2, 3)
    entropy, overlap = entropy_and_dice(logits, coarse)
    assert float(structures_loss(logits, codes)) == pytest.approx(float(entropy + overlap), rel=1e-6)


@pytest.mark.parametrize("code", [0, IGNORE])
def test_where_no_structure_is_marked_nothing_is_learnt(code: int) -> None:
    logits = torch.randn(1, 9, 4, 4, 4, requires_grad=True)
    loss = structures_loss(logits, torch.full((1, 8, 8, 8), code))
    assert float(loss.detach()) == 0.0
    (slope,) = torch.autograd.grad(loss, logits)
    assert not slope.any()
