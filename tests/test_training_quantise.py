"""`training.quantise`: products in eight bits."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from fastorgan.phantom import make_phantom
from fastorgan.runtime import INPUT_SIZES, INT8, OpenVinoRuntime
from fastorgan.volume import save_image
from fastorgan.weights import MANIFEST, Weights

pytest.importorskip("torch")

from training.quantise import QuantiseError, network_inputs, quantise


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    image, _ = make_phantom(seed=0)
    save_image(image, tmp_path / "ct.nii.gz")
    return tmp_path / "ct.nii.gz"


def test_the_networks_inputs_are_the_cascades_own(scan: Path) -> None:
    inputs = network_inputs(Weights.find(), [scan])
    assert {network: values[0].shape for network, values in inputs.items()} == INPUT_SIZES
    for values in inputs.values():
        assert -1 <= values[0].min() < values[0].max() <= 1


def test_without_nncf_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(QuantiseError, match=r"pip install 'fastorgan\[quantise\]'"):
        quantise(Weights.find(), [])


@pytest.mark.slow
def test_a_release_gets_its_form_in_eight_bits(scan: Path, tmp_path: Path) -> None:
    pytest.importorskip("nncf")
    folder = tmp_path / "weights"
    shutil.copytree(Weights.find().folder, folder)
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    for network in manifest["networks"].values():
        for name in [name for name in network["sha256"] if INT8 in name]:
            del network["sha256"][name]
            (folder / name).unlink()
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    assert not Weights.find(folder).holds("roi", f"{INT8}.xml")
    quantise(Weights.find(folder), [scan])
    weights = Weights.find(folder)
    x = network_inputs(weights, [scan])["roi"][0]
    eight, whole = (OpenVinoRuntime(2, precision).load(weights, "roi")(x)[0] > 0 for precision in ("int8", "f32"))
    assert 2 * np.count_nonzero(eight & whole) / (eight.sum() + whole.sum()) > 0.98
