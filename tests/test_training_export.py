import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("openvino")
pytest.importorskip("safetensors")

import safetensors.torch
import torch
from numpy.typing import NDArray

from fastorgan import box
from fastorgan.errors import WeightsError
from fastorgan.networks import SlimRoiUNet, build
from fastorgan.networks.blocks import parameter_count
from fastorgan.runtime import INPUT_SIZES, OpenVinoRuntime, Runtime, choose_runtime
from fastorgan.weights import MANIFEST, Weights
from tests.synthetic_cache import one_thread, write_cache
from training import export as exporting
from training.cases import DataError
from training.checkpoint import CHECKPOINT, read_checkpoint, write_checkpoint
from training.export import Blend, engine_difference, export
from training.fit import Plan, Run
from training.recipes import PRESETS
from training.statistics import measure_statistics

SMALL = (32, 24, 40)
"""Sides that differ, so that none can be mistaken for another."""

CPU = torch.device("cpu")


pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """Export for inputs that a test can afford, on one core."""
    with pytest.MonkeyPatch.context() as patch, one_thread():
        patch.setattr(exporting, "INPUT_SIZES", {"roi": SMALL, "organs": SMALL})
        patch.setattr(exporting, "choose_runtime", lambda device, engine: choose_runtime(device, engine, 1))
        yield


def checkpoint(folder: Path, network: str, variant: str = "slim", **changes: Any) -> Path:
    """A checkpoint of a network with the running statistics of a few batches, not those that it was born with."""
    torch.manual_seed(0)
    module = build(network, variant).train()
    for _ in range(3):
        module(torch.randn(1, 1, *SMALL))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / CHECKPOINT
    write_checkpoint({"kind": network, "variant": variant, "export": module.state_dict(), **changes}, path)
    return path


def smooth_input() -> NDArray[np.float32]:
    generator = torch.Generator().manual_seed(5)
    coarse = torch.randn(1, 1, 4, 4, 5, generator=generator)
    return torch.nn.functional.interpolate(coarse, SMALL, mode="trilinear")[0, 0].clamp(-1, 1).numpy()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run's checkpoint and the weights exported from it; for reading only."""
    folder = tmp_path_factory.mktemp("released")
    assert export("roi", checkpoint(folder / "run", "roi"), folder / "weights", "1.0") < 0.01
    return folder


def assert_engines_compute_what_was_trained(path: Path, weights: Weights, network: str, variant: str) -> None:
    x = smooth_input()
    trained = build(network, variant).eval()
    trained.load_state_dict(read_checkpoint(path, CPU)["export"])
    with torch.no_grad():
        expected = trained(torch.from_numpy(x)[None, None])[0].numpy()
    engines: tuple[Runtime, Runtime] = (OpenVinoRuntime(1, "f32"), choose_runtime("cpu", "torch", 1))
    for engine in engines:
        logits = engine.load(weights, network)(x)
        assert logits.shape == (5 if network == "organs" else 1, *SMALL)
        assert logits.dtype == np.float32
        # Weights are rounded to half precision.
        assert np.abs(logits - expected).max() < 0.02 * expected.std()


def test_both_engines_compute_what_was_trained(released: Path) -> None:
    weights = Weights.find(released / "weights")
    assert_engines_compute_what_was_trained(released / "run" / CHECKPOINT, weights, "roi", "slim")


def test_the_manifest_says_what_was_released(released: Path) -> None:
    out = released / "weights"
    files = ["roi.bin", "roi.safetensors", "roi.xml"]
    assert sorted(path.name for path in out.iterdir()) == [*files, MANIFEST]
    digests = {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in files}
    assert json.loads((out / MANIFEST).read_text()) == {
        "version": "1.0",
        "networks": {"roi": {"variant": "slim", "sha256": digests}},
    }
    assert Weights.find(out).sha256 == digests


def test_the_files_are_small_and_say_nothing_of_the_machine(released: Path) -> None:
    out = released / "weights"
    # Two bytes a parameter; OpenVINO folds batch norms away, safetensors holds their running statistics too.
    parameters = parameter_count(SlimRoiUNet())
    for name in ("roi.bin", "roi.safetensors"):
        assert parameters * 1.98 < (out / name).stat().st_size < parameters * 2.1
    for content in contents(out).values():
        for path in (released, Path(__file__).parents[1], Path.home()):
            assert str(path).encode() not in content


def test_safetensors_hold_the_trained_weights_in_half_precision(released: Path) -> None:
    stored = safetensors.torch.load_file(released / "weights" / "roi.safetensors")
    trained = read_checkpoint(released / "run" / CHECKPOINT, CPU)["export"]
    assert stored.keys() == {key for key in SlimRoiUNet().state_dict() if not key.endswith("num_batches_tracked")}
    for key, value in stored.items():
        assert value.dtype == torch.float16
        assert torch.equal(value, trained[key].half())


@pytest.mark.parametrize("suffix", [".safetensors", ".xml", ".bin"])
def test_a_tampered_file_is_refused(released: Path, tmp_path: Path, suffix: str) -> None:
    out = shutil.copytree(released / "weights", tmp_path / "weights")
    path = out / f"roi{suffix}"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    engine = "torch" if suffix == ".safetensors" else "openvino"
    with pytest.raises(WeightsError, match=r"is not the released file") as caught:
        choose_runtime("cpu", engine, 1).load(Weights.find(out), "roi")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_second_network_and_a_newer_one_join_the_first(released: Path, tmp_path: Path) -> None:
    out = shutil.copytree(released / "weights", tmp_path / "weights")
    first = Weights.find(out).sha256
    recipe = replace(PRESETS["light"], size=(24, 24, 32))
    Run(Plan("organs", write_cache(tmp_path / "cache"), tmp_path / "organs", recipe, steps=3)).fit()
    export("organs", tmp_path / "organs" / CHECKPOINT, out, "1.1")
    both = Weights.find(out)
    assert (both.version, both.variant("organs"), both.variant("roi")) == ("1.1", "guided", "slim")
    assert {name: both.sha256[name] for name in first} == first
    assert_engines_compute_what_was_trained(tmp_path / "organs" / CHECKPOINT, both, "organs", "guided")

    for name in ("roi-int8.xml", "roi-int8.bin", "organs-int8.xml"):
        (out / name).touch()
    export("roi", checkpoint(tmp_path / "roi", "roi", "paper"), out, "2.0")
    # What was made of the roi net before is not of this one.
    assert [path.name for path in out.glob("*-int8*")] == ["organs-int8.xml"]
    newer = Weights.find(out)
    assert (newer.version, newer.variant("organs"), newer.variant("roi")) == ("2.0", "guided", "paper")
    assert all(newer.sha256[name] != first[name] for name in first)
    assert_engines_compute_what_was_trained(tmp_path / "roi" / CHECKPOINT, newer, "roi", "paper")
    assert max(engine_difference(newer, network) for network in ("roi", "organs")) < 0.01


def test_with_a_cache_the_statistics_are_of_the_scans_that_were_trained_on(released: Path, tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "cache", ["p0", "p1"])
    path = checkpoint(tmp_path / "run", "roi", left_out=["p1"])
    assert export("roi", path, tmp_path / "weights", "1.0", cache=cache) < 0.01
    stored = safetensors.torch.load_file(tmp_path / "weights" / "roi.safetensors")
    before = safetensors.torch.load_file(released / "weights" / "roi.safetensors")
    trained = {key for key in before if "running" not in key}
    assert all(torch.equal(stored[key], before[key]) for key in trained)
    network = build("roi", "slim").eval()
    network.load_state_dict(read_checkpoint(path, CPU)["export"])
    measure_statistics(network, "roi", SMALL, cache, ["p1"])
    for key in before.keys() - trained:
        assert not torch.equal(stored[key], before[key])
        # Of weights in half precision here, of the trained ones there.
        assert torch.allclose(stored[key].float(), network.state_dict()[key], rtol=0.05, atol=0.02)


def test_another_networks_checkpoint_is_refused(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "run", "roi")
    with pytest.raises(WeightsError, match="holds the roi net, not the organs net"):
        export("organs", path, tmp_path / "weights", "1.0")
    assert not (tmp_path / "weights").exists()


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"checkpoint\.pt: cannot be read"):
        export("organs", tmp_path / CHECKPOINT, tmp_path / "weights", "1.0")


def test_engines_that_disagree_change_nothing(released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = shutil.copytree(released / "weights", tmp_path / "weights")
    before = contents(out)
    monkeypatch.setattr(exporting, "engine_difference", lambda *_: 0.06)
    with pytest.raises(WeightsError, match=r"the engines' logits differ by 0\.06"):
        export("roi", checkpoint(tmp_path / "bad", "roi", "paper"), out, "2.0")
    assert contents(out) == before


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "run", "roi")
    state = read_checkpoint(path, CPU)
    state["export"]["coarse.bias"].fill_(float("nan"))
    write_checkpoint(state, path)
    with pytest.raises(WeightsError, match="differ by nan"):
        export("roi", path, tmp_path / "weights", "1.0")
    assert not list((tmp_path / "weights").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("network", ["roi", "organs"])
def test_the_exported_networks_take_the_cascades_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: str
) -> None:
    assert INPUT_SIZES == {"roi": box.ROI_SIZE, "organs": box.CROP_SIZE}
    monkeypatch.setattr(exporting, "INPUT_SIZES", INPUT_SIZES)
    assert export(network, checkpoint(tmp_path / "run", network), tmp_path / "weights", "1.0") < 0.02
    x = np.zeros(INPUT_SIZES[network], np.float32)
    logits = choose_runtime("cpu", "openvino").load(Weights.find(tmp_path / "weights"), network)(x)
    assert logits.shape[1:] == INPUT_SIZES[network]


def test_a_blend_is_the_mean_by_shares(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.tensor([4.0]), "b": torch.tensor([8.0])}, tmp_path / "other.safetensors")
    state = {"a": torch.tensor([0.0]), "b": torch.tensor([16.0]), "count": torch.tensor(3)}
    # "count", which is no float, is not looked for in the other.
    mean = Blend(tmp_path / "other.safetensors", 0.25).into(state)
    assert {name: value.item() for name, value in mean.items()} == {"a": 1.0, "b": 14.0, "count": 3}


def test_a_blend_with_another_network_is_refused(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match=r"other\.safetensors: cannot be read, or holds the weights of another"):
        Blend(tmp_path / "other.safetensors", 0.5).into({"b": torch.zeros(1)})
