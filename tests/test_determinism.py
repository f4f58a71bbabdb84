"""One input, one result: whatever the threads, the engine, the precision and the neighbours in a batch."""

import gzip
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from evaluation.accuracy import dsc
from evaluation.sample import NAME
from fastorgan.cascade import Cascade
from fastorgan.labels import ORGANS
from fastorgan.phantom import make_phantom
from fastorgan.runtime import INT8, OpenVinoRuntime, TorchRuntime
from fastorgan.volume import load_image
from fastorgan.weights import Weights
from tests.stand_in_card import StandInCard

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "sample" / "images" / f"{NAME}_0000.nii.gz"

LEAST_SAME = 0.9999
"""Share of voxels that must have the same label whatever the number of threads."""

LEAST_DSC = 0.998
"""Of each organ, between engines and between single and half precision."""

LEAST_DSC_BF16 = 0.997
"""Of each organ, between bf16, which has seven bits behind the point, and single precision."""

LEAST_DSC_INT8 = 0.97
"""Of each organ, between eight bits and single precision; `python -m evaluation engines` says what that costs."""

Labels = NDArray[np.uint8]


@pytest.fixture(scope="module", params=["phantom", "sample"])
def image(request: pytest.FixtureRequest) -> nib.Nifti1Image:
    """A synthetic CT, and a real one where `./try.sh` has fetched it."""
    if request.param == "phantom":
        return make_phantom((192, 192, 90), (2.0, 2.0, 3.3), seed=7)[0]
    if not SAMPLE.is_file():
        pytest.skip("no sample; run ./try.sh first")
    return load_image(SAMPLE)


@pytest.fixture(scope="module")
def expected(image: nib.Nifti1Image) -> Labels:
    """What OpenVINO finds with two threads."""
    labels = find(Cascade.load("cpu", engine="openvino", threads=2), image)
    assert set(np.unique(labels)) == {0, 1, 2, 3, 4}
    return labels


@pytest.fixture(scope="module")
def whole(image: nib.Nifti1Image) -> Labels:
    """What OpenVINO finds in single precision."""
    return find(Cascade(OpenVinoRuntime(2, "f32"), Weights.find()), image)


def find(cascade: Cascade, image: nib.Nifti1Image) -> Labels:
    return np.asarray(cascade.segment(image).dataobj, np.uint8)


def agreement(labels: Labels, expected: Labels) -> dict[str, float]:
    return {organ.name: dsc(expected == organ.code, labels == organ.code) for organ in ORGANS}


def test_a_process_repeats_itself_bit_for_bit(image: nib.Nifti1Image, expected: Labels) -> None:
    cascade = Cascade.load("cpu", engine="openvino", threads=2)
    for _ in range(2):
        assert np.array_equal(find(cascade, image), expected)


def test_files_of_two_processes_hold_the_same_byte_for_byte(image: nib.Nifti1Image, tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), image.affine), tmp_path / "ct.nii.gz")
    written = []
    # Several cases at a time, or one; and neighbours that differ.
    for name, jobs in (("a", "1"), ("b", "3")):
        folder = tmp_path / name
        folder.mkdir()
        for number in range(1 if jobs == "1" else 3):
            (folder / f"{number}.nii.gz").symlink_to(tmp_path / "ct.nii.gz")
        command = [sys.executable, "-m", "fastorgan", "predict", str(folder), str(tmp_path / f"out{name}")]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "app")}
        subprocess.run([*command, "--device", "cpu", "--jobs", jobs], check=True, env=environment)
        written += [gzip.decompress(path.read_bytes()) for path in sorted((tmp_path / f"out{name}").iterdir())]
    assert len(written) == 4
    assert len(set(written)) == 1


@pytest.mark.parametrize("threads", [1, 3, 4])
def test_threads_change_next_to_no_voxel(threads: int, image: nib.Nifti1Image, expected: Labels) -> None:
    labels = find(Cascade.load("cpu", engine="openvino", threads=threads), image)
    same = float((labels == expected).mean())
    print(f"{threads} threads: {same:.6%} of voxels")
    assert same >= LEAST_SAME
    # Most voxels are background: the organs themselves must agree as well.
    assert min(agreement(labels, expected).values()) >= LEAST_DSC


def test_eight_bits_agree_with_single_precision(expected: Labels, whole: Labels) -> None:
    if not Weights.find().holds("organs", f"{INT8}.xml"):
        pytest.skip("these weights have no form in eight bits")
    assert not np.array_equal(expected, whole)
    found = agreement(expected, whole)
    print(found)
    assert min(found.values()) >= LEAST_DSC_INT8


def test_bf16_agrees_with_single_precision(image: nib.Nifti1Image, whole: Labels) -> None:
    openvino: Any = pytest.importorskip("openvino")
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("the processor has no instructions for bf16, and OpenVINO would silently take f32")
    found = agreement(find(Cascade(OpenVinoRuntime(2, "bf16"), Weights.find()), image), whole)
    print(found)
    assert min(found.values()) >= LEAST_DSC_BF16


def test_torch_agrees_with_openvino(image: nib.Nifti1Image, whole: Labels) -> None:
    pytest.importorskip("torch")
    found = agreement(find(Cascade.load("cpu", engine="torch", threads=2), image), whole)
    print(found)
    assert min(found.values()) >= LEAST_DSC


class HalfPrecisionCard(StandInCard):
    """Rounds weights, inputs and the result of every layer to half precision.

    Each layer adds up in single precision, as cuDNN does.
    """

    rounded = changed = 0

    def take_network(self, network: Any) -> None:
        network.half()
        for layer in network.modules():
            if not list(layer.children()):
                layer.register_forward_hook(self._round)
                self.rounded += 1

    def _round(self, _layer: Any, _inputs: Any, result: Any) -> Any:
        rounded = result.half().float()
        self.changed += bool((rounded != result).any())
        return rounded

    def take_input(self, values: Any) -> Any:
        return values.half().float()


def test_half_precision_agrees_with_single(
    image: nib.Nifti1Image, whole: Labels, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    card = HalfPrecisionCard(monkeypatch)
    cascade = Cascade(TorchRuntime("cuda:0"), Weights.find())
    assert cascade.engine.precision == "f16"
    assert card.rounded > 50
    labels = find(cascade, image)
    # Labels themselves may well come out alike.
    assert card.changed > 50, "nothing was rounded"
    found = agreement(labels, whole)
    print(found)
    assert min(found.values()) >= LEAST_DSC
