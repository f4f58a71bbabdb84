"""Tests of the optimisers, against singular values and AdamW alone."""

import copy

import pytest

torch = pytest.importorskip("torch", reason="training needs torch")

from torch import nn  # noqa: E402

from training.optimisers import KERNEL_RATE, KernelMuon, make_optimiser, orthogonal, set_rate  # noqa: E402


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kernels = nn.Conv3d(2, 8, 3)
        self.norm = nn.BatchNorm3d(8)
        self.classify = nn.Conv3d(8, 5, 1)


def give_gradients(model: nn.Module, seed: int = 1) -> None:
    chance = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=chance))


def test_the_names_of_recipes() -> None:
    assert isinstance(make_optimiser("sgd", Network(), 0.0), torch.optim.SGD)
    assert isinstance(make_optimiser("adamw", Network(), 0.0), torch.optim.AdamW)
    assert isinstance(make_optimiser("muon", Network(), 0.0), KernelMuon)


def test_every_parameter_has_one_optimiser() -> None:
    model = Network()
    optimiser = KernelMuon(list(model.parameters()), 0.0)
    (group,) = optimiser.parts["muon"].param_groups
    assert [kernel is model.kernels.weight for kernel in group["params"]] == [True]
    others = [p for group in optimiser.parts["adamw"].param_groups for p in group["params"]]
    # Five filters, as the classifying kernels have, are too few.
    assert {id(p) for p in others} == {id(p) for p in model.parameters()} - {id(model.kernels.weight)}


def test_kernels_have_a_multiple_of_the_rate() -> None:
    optimiser = KernelMuon(list(Network().parameters()), 0.0)
    set_rate(optimiser, 0.25)
    assert [group["lr"] for group in optimiser.param_groups] == [0.25, KERNEL_RATE * 0.25]
    sgd = make_optimiser("sgd", Network(), 0.0)
    set_rate(sgd, 0.25)
    assert [group["lr"] for group in sgd.param_groups] == [0.25]


def test_a_step_of_muon_is_orthogonal_and_as_long_as_its_rate_says() -> None:
    """The first step along G = U S V' is rate * 0.2 * sqrt(the longer side) * U V': here 8 filters of 54 taps."""
    model = Network()
    optimiser = KernelMuon(list(model.parameters()), 0.0)
    give_gradients(model)
    before = model.kernels.weight.detach().clone()
    set_rate(optimiser, 0.01)
    optimiser.step()
    gradient = model.kernels.weight.grad
    assert gradient is not None
    moved = (before - model.kernels.weight.detach()).flatten(1)
    u, _, v = torch.linalg.svd(gradient.flatten(1), full_matrices=False)
    length = KERNEL_RATE * 0.01 * 0.2 * 54**0.5
    # The five steps of Newton and Schulz leave singular values between 0.68 and 1.14, see Jordan et al. 2024.
    singular = torch.linalg.svdvals(moved) / length
    assert 0.6 < float(singular.min()) <= float(singular.max()) < 1.25
    assert float(((u @ v) * moved).sum() / moved.norm() / 8**0.5) > 0.97


@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (1, 5)])
def test_orthogonal_keeps_the_directions_and_levels_their_lengths(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape) * 100
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    found = u.T @ orthogonal(matrix) @ v.T
    assert float((found - found.diag().diag()).abs().max()) < 1e-4
    assert 0.6 < float(found.diag().min()) <= float(found.diag().max()) < 1.25


def test_orthogonal_leaves_nothing_at_nothing() -> None:
    assert torch.equal(orthogonal(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_the_layout_in_memory_changes_nothing() -> None:
    models = [Network(), Network()]
    models[1].to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    assert not models[1].kernels.weight.is_contiguous()
    for model in models:
        optimiser = KernelMuon(list(model.parameters()), 1e-2)
        for seed in range(3):
            give_gradients(model, seed)
            set_rate(optimiser, 0.01)
            optimiser.step()
    begun = Network()
    for one, other, start in zip(*(model.parameters() for model in (*models, begun)), strict=True):
        assert not torch.equal(one, start)
        assert float((one - other).detach().abs().max()) < 1e-4 * float((one - start).detach().abs().max())


def test_the_rest_is_adamws() -> None:
    model, plain = Network(), Network()
    optimiser = KernelMuon(list(model.parameters()), 1e-2)
    reference = torch.optim.AdamW(plain.parameters(), weight_decay=1e-2)
    for each, its in ((model, optimiser), (plain, reference)):
        give_gradients(each)
        set_rate(its, 0.01)
        its.step()
    same = [torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True)]
    assert same == [False, True, True, True, True, True]


def test_what_has_no_gradient_stays() -> None:
    model = Network()
    optimiser = KernelMuon(list(model.parameters()), 0.0)
    give_gradients(model)
    model.kernels.weight.grad = None
    set_rate(optimiser, 0.01)
    optimiser.step()
    assert torch.equal(model.kernels.weight, Network().kernels.weight)
    assert not torch.equal(model.classify.weight, Network().classify.weight)


def test_a_state_goes_on_where_it_was_left() -> None:
    models = [Network(), Network()]
    optimisers = [KernelMuon(list(model.parameters()), 0.0) for model in models]
    for seed in range(4):
        if seed == 2:
            fresh = Network()
            fresh.load_state_dict(models[1].state_dict())
            models[1], optimisers[1] = fresh, KernelMuon(list(fresh.parameters()), 0.0)
            optimisers[1].load_state_dict(copy.deepcopy(optimisers[0].state_dict()))
        for model, optimiser in zip(models, optimisers, strict=True):
            give_gradients(model, seed)
            set_rate(optimiser, 0.01)
            optimiser.step()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)
