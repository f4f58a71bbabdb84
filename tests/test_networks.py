"""Expected numbers are those of the layer tables that the architectures were settled by."""

import math
from collections.abc import Iterator

import pytest

pytest.importorskip("torch")

import torch
from torch import Tensor, nn

from fastorgan.networks import DenseVNet, RoiUNet, SlimRoiUNet, build
from fastorgan.networks.blocks import OWN_SHARE, CaseBatchNorm, ConvUnit, mac_count, parameter_count, upsample
from fastorgan.networks.densevnet import STACK_UNITS, DenseStack
from fastorgan.networks.guided import FLAT, guided_upsample
from fastorgan.networks.roi import PAPER_WIDTHS
from tests.synthetic_cache import one_thread

ORGAN_SIZE = (96, 128, 192)
ROI_SIZE = (96, 96, 96)


@pytest.fixture(scope="module", autouse=True)
def few_threads() -> Iterator[None]:
    with one_thread():
        yield


def on_paper(network: nn.Module, size: tuple[int, int, int]) -> tuple[nn.Module, Tensor]:
    """A network and its input without memory or arithmetic, shapes only."""
    return network.eval().to("meta"), torch.empty(1, 1, *size, device="meta")


def layer_macs(network: nn.Module, layer: str, size: tuple[int, int, int]) -> int:
    """Multiply-accumulates of one layer, from the shapes of its convolution's weight and output."""
    network, x = on_paper(network, size)
    found = []

    def look(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Conv3d)
        out, inward, *kernel = module.weight.shape
        found.append(math.prod((out, inward, *kernel, *output.shape[2:])))

    for module in network.get_submodule(layer).modules():
        if isinstance(module, nn.Conv3d):
            module.register_forward_hook(look)
    network(x)
    return sum(found)


# Size and cost


def test_the_organ_net_has_exactly_its_parameters() -> None:
    assert parameter_count(DenseVNet()) == 871_922


def test_the_organ_nets_parameters_by_kind() -> None:
    network = DenseVNet()
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv3d)]
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm3d)]
    assert sum(m.weight.numel() for m in convolutions) == 871_131
    assert sum(m.bias.numel() for m in convolutions if m.bias is not None) == 5
    assert sum(m.weight.numel() + m.bias.numel() for m in norms) == 786


def test_the_organ_net_costs_exactly_its_multiply_accumulates() -> None:
    assert mac_count(*on_paper(DenseVNet(), ORGAN_SIZE)) == 23_976_345_600


def test_the_organ_net_at_three_quarters_of_each_side() -> None:
    assert mac_count(*on_paper(DenseVNet(), (72, 96, 144))) == 10_115_020_800


def test_the_roi_net_that_ships() -> None:
    assert parameter_count(SlimRoiUNet()) == 254_382
    assert mac_count(*on_paper(SlimRoiUNet(), ROI_SIZE)) == 3_291_217_920


def test_the_figures_roi_net_at_half_its_widths() -> None:
    assert parameter_count(RoiUNet((8, 16, 32, 64))) == 332_049
    assert mac_count(*on_paper(RoiUNet((8, 16, 32, 64)), ROI_SIZE)) == 11_784_683_520


def test_the_figures_roi_net_at_its_own_widths() -> None:
    assert PAPER_WIDTHS == (16, 32, 64, 128)
    encoders = 464 + 6_944 + 13_888 + 27_712 + 55_424 + 110_720 + 221_440 + 442_624
    reduces = 8_320 + 2_112 + 544
    decoders = 221_312 + 110_720 + 55_360 + 27_712 + 13_856 + 6_944
    assert parameter_count(RoiUNet()) == encoders + reduces + decoders + 17


@pytest.mark.parametrize(
    ("layer", "parameters", "macs"),
    [
        ("image_norm", 2, 0),
        ("stem", 3_048, 884_736_000),
        ("stacks.0.units.0", 2_708, 796_262_400),
        ("stacks.0.units.4", 4_436, 1_305_870_336),
        ("skips.0", 14_604, 4_299_816_960),
        ("downs.0", 29_208, 1_074_954_240),
        ("stacks.1.units.0", 5_200, 191_102_976),
        ("stacks.1.units.9", 20_752, 764_411_904),
        ("skips.1", 67_440, 2_484_338_688),
        ("downs.1", 67_440, 310_542_336),
        ("stacks.2.units.9", 72_608, 334_430_208),
        ("skips.2", 119_280, 549_421_056),
        ("classify", 8_240, 2_428_600_320),
    ],
)
def test_layers_of_the_organ_net(layer: str, parameters: int, macs: int) -> None:
    network = DenseVNet()
    assert parameter_count(network.get_submodule(layer)) == parameters
    assert layer_macs(network, layer, ORGAN_SIZE) == macs


@pytest.mark.parametrize(
    ("layer", "parameters", "macs"),
    [
        ("stem", 2_032, 221_184_000),
        ("encode1", 6_944, 764_411_904),
        ("down2", 55_424, 95_551_488),
        ("encode3", 110_720, 191_102_976),
        ("reduce2", 2_112, 3_538_944),
        ("decode1", 6_944, 764_411_904),
        ("coarse", 17, 1_769_472),
        ("refine.0", 224, 191_102_976),
        ("refine.1", 109, 95_551_488),
    ],
)
def test_layers_of_the_roi_net_that_ships(layer: str, parameters: int, macs: int) -> None:
    network = SlimRoiUNet()
    assert parameter_count(network.get_submodule(layer)) == parameters
    assert layer_macs(network, layer, ROI_SIZE) == macs


@pytest.mark.parametrize(
    ("layer", "parameters", "macs"),
    [
        ("encoders.0.0", 232, 191_102_976),
        ("encoders.3.1", 110_720, 191_102_976),
        ("reduces.0", 2_112, 3_538_944),
        ("decoders.0.0", 55_360, 764_411_904),
        ("decoders.2.0", 3_472, 3_057_647_616),
        ("decoders.2.1", 1_744, 1_528_823_808),
        ("out", 9, 7_077_888),
    ],
)
def test_layers_of_the_figures_roi_net(layer: str, parameters: int, macs: int) -> None:
    network = RoiUNet((8, 16, 32, 64))
    assert parameter_count(network.get_submodule(layer)) == parameters
    assert layer_macs(network, layer, ROI_SIZE) == macs


def test_parameters_that_are_frozen_do_not_count() -> None:
    unit = ConvUnit(2, 3)
    unit[0].requires_grad_(False)
    assert parameter_count(unit) == 6


def test_counting_leaves_no_hooks_behind() -> None:
    network, x = on_paper(SlimRoiUNet(), (16, 16, 16))
    assert mac_count(network, x) == mac_count(network, x)
    assert not any(module._forward_hooks for module in network.modules())


# Shapes


def test_shapes_at_full_size() -> None:
    network, x = on_paper(DenseVNet(), ORGAN_SIZE)
    assert network(x).shape == (1, 5, *ORGAN_SIZE)
    for roi in (SlimRoiUNet(), RoiUNet()):
        network, x = on_paper(roi, ROI_SIZE)
        assert network(x).shape == (1, 1, *ROI_SIZE)


def test_stacks_hold_their_input() -> None:
    assert [stack.channels_out for stack in DenseVNet().stacks] == [45, 104, 184]
    torch.manual_seed(0)
    stack = DenseStack(3, 2, 4, drop=0.0).eval()
    x = torch.randn(1, 3, 4, 5, 6)
    out = stack(x)
    assert out.shape == (1, 11, 4, 5, 6)
    assert torch.equal(out[:, :3], x)
    # A unit sees the input and all earlier units.
    assert torch.equal(out[:, 9:], stack.units[3](out[:, :9]))


def test_other_numbers_of_classes_and_batches() -> None:
    network = DenseVNet(classes=3).eval()
    assert network(torch.zeros(2, 1, 16, 16, 24)).shape == (2, 3, 16, 16, 24)


@pytest.mark.parametrize("network", [SlimRoiUNet(), RoiUNet((2, 4, 6, 8)), RoiUNet((3, 5))])
def test_the_roi_nets_keep_the_size(network: nn.Module) -> None:
    assert network.eval()(torch.zeros(1, 1, 16, 24, 32)).shape == (1, 1, 16, 24, 32)


@pytest.mark.parametrize("variant", ["guided", "densevnet"])
def test_half_logits_are_the_logits_before_the_last_enlargement(variant: str) -> None:
    torch.manual_seed(0)
    network = build("organs", variant).eval()
    assert isinstance(network, DenseVNet)
    x = torch.randn(1, 1, 16, 24, 32)
    half = network.half_logits(x)
    assert half.shape == (1, 5, 8, 12, 16)
    assert torch.equal(network(x), guided_upsample(half, x) if variant == "guided" else upsample(half))


def test_enlargement_keeps_voxel_centres() -> None:
    ramp = torch.arange(4.0)[None, None, :, None, None].expand(1, 1, 4, 2, 2)
    along = upsample(ramp)[0, 0, :, 1, 1]
    assert along.tolist() == [0.0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.0]
    assert upsample(ramp, 4).shape == (1, 1, 16, 8, 8)


def test_where_the_image_is_flat_enlargement_is_linear() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, 6)
    torch.testing.assert_close(guided_upsample(logits, torch.full((2, 1, 8, 10, 12), 0.3)), upsample(logits))


def along_z(values: list[float], across: int) -> Tensor:
    """A volume (1, 1, len, across, across) that changes along z alone."""
    return torch.tensor(values)[None, None, :, None, None].repeat(1, 1, 1, across, across)


def test_the_slope_is_that_of_logits_over_the_image() -> None:
    # Pairs of voxels whose means are -1, -1, 1 and 1.
    image = along_z([-1.0, -1.0, -1.5, -0.5, 1.0, 1.0, 1.0, 1.0], 6)
    logits = along_z([-3.0, -3.0, 3.0, 3.0], 3)
    # Logits are three times the image. Three values of which one differs have a variance of 8/9; at the ends it is 0.
    slope = 3 * (8 / 9) / (8 / 9 + FLAT)
    found = guided_upsample(logits, image)[0, 0, :, 0, 0]
    # Linearly the image of half the size would be -1, -1, -1, -0.5, 0.5, 1, 1, 1 there.
    beyond = [0.0, 0.0, -0.5 * 0.75, 0.0, 0.5, 0.0, 0.0, 0.0]
    linear = [-3.0, -3.0, -3.0, -1.5, 1.5, 3.0, 3.0, 3.0]
    expected = [base + slope * share for base, share in zip(linear, beyond, strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_a_border_goes_to_the_edge_in_the_image() -> None:
    # The edge is one voxel above the middle of the logits' border, within a voxel of the smaller grid.
    image = along_z([-0.4] * 9 + [0.4] * 7, 6)
    logits = along_z([-4.0, -3.0, -2.0, -1.0, 1.0, 2.0, 3.0, 4.0], 3)
    assert (upsample(logits)[0, 0, :, 0, 0] > 0).tolist() == [False] * 8 + [True] * 8
    assert (guided_upsample(logits, image)[0, 0, :, 0, 0] > 0).tolist() == [False] * 9 + [True] * 7


def test_guided_enlargement_is_linear_in_the_logits() -> None:
    # So that what one organ gains at a border its neighbour loses, and a constant added to all classes changes nothing.
    torch.manual_seed(0)
    image = torch.rand(1, 1, 8, 8, 12) * 2 - 1
    logits = torch.randn(1, 2, 4, 4, 6)
    found = guided_upsample(logits, image)
    torch.testing.assert_close(guided_upsample(2 * logits + 5, image), 2 * found + 5, rtol=1e-4, atol=1e-4)


def test_guided_enlargement_has_full_precision_in_half_precision_networks() -> None:
    torch.manual_seed(0)
    logits, image = torch.randn(1, 5, 4, 4, 4).half(), torch.rand(1, 1, 8, 8, 8).half()
    found = guided_upsample(logits, image)
    assert found.dtype == torch.float32
    assert torch.equal(found, guided_upsample(logits.float(), image.float()))


def test_guided_enlargement_can_be_trained_through() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 2, 3, 4, 3, dtype=torch.float32, requires_grad=True)
    image = torch.rand(1, 1, 6, 8, 6)
    (slope,) = torch.autograd.grad(guided_upsample(logits, image)[0, 1, 2, 3, 4], logits)
    nudge = torch.zeros_like(logits)
    nudge[0, 1, 1, 1, 2] = 1e-2
    with torch.no_grad():
        change = (guided_upsample(logits + nudge, image) - guided_upsample(logits, image))[0, 1, 2, 3, 4]
    assert float(slope[0, 1, 1, 1, 2]) == pytest.approx(float(change) / 1e-2, rel=1e-3)
    assert not slope[0, 0].any()


# Layers


def test_the_average_pool_does_not_count_padding() -> None:
    pool = DenseVNet().pool
    x = torch.arange(4.0**3).reshape(1, 1, 4, 4, 4)
    assert torch.equal(pool(torch.ones_like(x)), torch.ones(1, 1, 2, 2, 2))
    pooled = pool(x)
    assert pooled.shape == (1, 1, 2, 2, 2)
    # The first window holds the 2x2x2 voxels of the corner, the last the 3x3x3 of the opposite one.
    assert pooled[0, 0, 0, 0, 0] == x[0, 0, :2, :2, :2].mean()
    assert pooled[0, 0, 1, 1, 1] == x[0, 0, 1:, 1:, 1:].mean()


def test_dropout_is_nowhere_on_the_last_unit_of_a_stack() -> None:
    network = DenseVNet(drop=0.5)
    for stack, units in zip(network.stacks, STACK_UNITS, strict=True):
        assert isinstance(stack, DenseStack)
        dropped = [[m.p for m in unit.modules() if isinstance(m, nn.Dropout)] for unit in stack.units]
        assert dropped == [[0.5]] * (units - 1) + [[]]
    assert not any(isinstance(m, nn.Dropout) for m in network.stem.modules())
    assert sum(isinstance(m, nn.Dropout) for m in network.modules()) == 4 + 9 + 9 + 3 + 2


def test_without_dropout_there_is_no_such_layer() -> None:
    assert not any(isinstance(m, nn.Dropout) for m in DenseVNet(drop=0.0).modules())


def test_dropout_is_for_training_only() -> None:
    torch.manual_seed(0)
    network = DenseVNet().eval()
    x = torch.randn(1, 1, 16, 16, 16)
    assert torch.equal(network(x), network(x))
    network.train()
    assert not torch.equal(network(x), network(x))


def test_only_the_classifying_convolution_of_the_organ_net_has_a_bias() -> None:
    convolutions = {name: m for name, m in DenseVNet().named_modules() if isinstance(m, nn.Conv3d)}
    assert [name for name, m in convolutions.items() if m.bias is not None] == ["classify"]


def test_all_layers_but_the_stem_are_rectified() -> None:
    torch.manual_seed(0)
    network = DenseVNet(drop=0.0).eval()
    x = torch.randn(1, 1, 16, 16, 16)
    assert network.stem(x).min() < 0
    units = [m for m in network.modules() if isinstance(m, ConvUnit)]
    assert len(units) == 1 + sum(STACK_UNITS) + 3 + 2
    for unit in units:
        assert any(isinstance(m, nn.ReLU) for m in unit) is (unit is not network.stem)
    assert ConvUnit(1, 4)(x).min() == 0


def test_batch_norms_are_niftynets() -> None:
    norms = [m for m in DenseVNet().modules() if isinstance(m, nn.BatchNorm3d)]
    assert {m.eps for m in norms} == {1e-5}
    assert all(m.affine for m in norms)


def case_norm() -> CaseBatchNorm:
    """Of one channel, with statistics 1 and 3, weight 2 and bias 0.5, for inference."""
    norm = CaseBatchNorm(1, eps=0.0).eval()
    norm.load_state_dict(
        {"weight": torch.tensor([2.0]), "bias": torch.tensor([0.5])}
        | {"running_mean": torch.tensor([1.0]), "running_var": torch.tensor([3.0])},
        strict=False,
    )
    return norm


def test_a_case_is_normalised_partly_by_itself() -> None:
    assert OWN_SHARE == 0.25
    # Mean 5 and variance 4; with a quarter of each: 2 and 3.25.
    x = torch.tensor([3.0, 7.0, 3.0, 7.0]).reshape(1, 1, 1, 2, 2)
    expected = [(value - 2.0) / math.sqrt(3.25) * 2.0 + 0.5 for value in (3.0, 7.0, 3.0, 7.0)]
    assert case_norm()(x).flatten().tolist() == pytest.approx(expected)


def test_a_case_is_normalised_alike_in_whatever_company() -> None:
    torch.manual_seed(0)
    norm, x = case_norm(), torch.randn(3, 1, 4, 5, 6)
    assert torch.allclose(norm(x), torch.cat([norm(case[None]) for case in x]), atol=1e-6)


def test_a_case_is_normalised_in_the_type_of_its_activations() -> None:
    # As autocast has it: activations in bf16, statistics in f32.
    x = torch.arange(8.0).reshape(1, 1, 2, 2, 2)
    found = case_norm()(x.bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), case_norm()(x), rtol=0.02, atol=0.02)


def test_in_training_it_is_batch_norm() -> None:
    torch.manual_seed(0)
    own, plain, x = CaseBatchNorm(2), nn.BatchNorm3d(2), torch.randn(2, 2, 4, 5, 6)
    assert torch.equal(own(x), plain(x))
    assert own.running_mean is not None
    assert plain.running_mean is not None
    assert torch.equal(own.running_mean, plain.running_mean)


@pytest.mark.parametrize(("network", "own"), [(DenseVNet(), 32), (SlimRoiUNet(), 0), (RoiUNet((4, 8, 8, 8)), 0)])
def test_the_organ_net_alone_normalises_so(network: nn.Module, own: int) -> None:
    assert sum(isinstance(m, CaseBatchNorm) for m in network.modules()) == own


@pytest.mark.parametrize("build", [DenseVNet, SlimRoiUNet, RoiUNet])
def test_he_initialisation(build: type[nn.Module]) -> None:
    torch.manual_seed(0)
    checked = 0
    for module in build().modules():
        if isinstance(module, nn.Conv3d):
            fan_in = module.weight[0].numel()
            deviation = math.sqrt(2.0 / fan_in)
            # The sample's SD of n normal numbers scatters by 1 / sqrt(2 n) of itself, its mean by 1 / sqrt(n).
            scatter = 5.0 / math.sqrt(module.weight.numel())
            assert float(module.weight.detach().std(correction=0)) == pytest.approx(deviation, rel=scatter)
            assert abs(float(module.weight.detach().mean())) < scatter * deviation
            assert module.bias is None or not module.bias.any()
            checked += 1
    assert checked > 10


@pytest.mark.parametrize("network", [DenseVNet(), SlimRoiUNet(), RoiUNet((4, 8, 8, 8))])
def test_training_in_bfloat16_on_the_cpu(network: nn.Module) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 1, 24, 24, 32)
    with torch.autocast("cpu", torch.bfloat16):
        logits = network.train()(x)
    assert logits.isfinite().all()
    logits.float().square().mean().backward()
    gradients = [p.grad for p in network.parameters()]
    assert all(g is not None and bool(g.isfinite().all()) for g in gradients)
    assert sum(bool(g.any()) for g in gradients if g is not None) > 0.9 * len(gradients)
