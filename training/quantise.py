"""Round a release's OpenVINO networks to eight bits, with real scans to find the ranges of their values (NNCF)."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastorgan.box import CROP_SIZE
from fastorgan.errors import FastorganError
from fastorgan.intensity import to_network
from fastorgan.labels import CLASSES
from fastorgan.resample import resize
from fastorgan.roi import locate, overview
from fastorgan.runtime import INT8, OpenVinoRuntime
from fastorgan.volume import load_image, read_volume
from fastorgan.weights import MANIFEST, Weights

from .export import sha256

COMPUTED = ("Convolution", "AvgPool", "Interpolate", "Multiply", "Add", "Subtract", "Divide")
"""OpenVINO's names of operations that could be in eight bits."""


class QuantiseError(FastorganError):
    """The networks cannot be rounded to eight bits."""


def quantise(weights: Weights, scans: Sequence[Path]) -> None:
    """Add to a release its OpenVINO networks with products in eight bits, and name them in its manifest.

    The first convolution, which sees the scan itself, and the last, which decides, stay in floats, as does what is made
    of its logits (`fastorgan.networks.guided`).

    Args:
        weights: the release.
        scans: CTs that the networks were trained on; what they make of these sets the ranges.

    Raises:
        QuantiseError: if NNCF is not installed.
        VolumeError: if a scan cannot be read.
    """
    try:
        import nncf
        import openvino
    except ImportError as error:
        raise QuantiseError(f"eight bits need NNCF: pip install 'fastorgan[quantise]' ({error})") from error
    core = openvino.Core()
    for network, values in network_inputs(weights, scans).items():
        model = core.read_model(weights.read(network, ".xml"), weights.read(network, ".bin"))
        rounded = nncf.quantize(
            model,
            nncf.Dataset([x[None, None] for x in values]),
            subset_size=len(values),
            preset=nncf.QuantizationPreset.MIXED,
            ignored_scope=nncf.IgnoredScope(names=_ends(model)),
        )
        with tempfile.TemporaryDirectory(prefix=".quantise-", dir=weights.folder) as folder:
            openvino.save_model(rounded, Path(folder) / f"{network}{INT8}.xml", compress_to_fp16=True)
            for path in sorted(Path(folder).iterdir()):
                weights.manifest["networks"][network]["sha256"][path.name] = sha256(path)
                path.replace(weights.folder / path.name)
    (weights.folder / MANIFEST).write_text(json.dumps(weights.manifest, indent=2) + "\n", encoding="utf-8")


def _ends(model: Any) -> list[str]:
    """Names of the operations that make one channel, or as many as there are classes, and of convolutions of one."""
    names = []
    for operation in model.get_ordered_ops():
        kind = operation.get_type_name()
        if kind in COMPUTED:
            read, made = (node.get_partial_shape() for node in (operation.input(0), operation.output(0)))
            scan = kind == "Convolution" and read[1].get_length() == 1
            if scan or (len(made) == 5 and made[1].get_length() in (1, CLASSES)):
                names.append(operation.get_friendly_name())
    return names


def network_inputs(weights: Weights, scans: Sequence[Path]) -> dict[str, list[NDArray[np.float32]]]:
    """What each network sees of each scan, in the cascade."""
    roi_net = OpenVinoRuntime(precision="f32").load(weights, "roi")
    inputs: dict[str, list[NDArray[np.float32]]] = {"roi": [], "organs": []}
    for scan in scans:
        volume = read_volume(load_image(scan), str(scan))
        body, whole = overview(volume)
        roi = locate(roi_net(whole)[0] > 0, body, volume.shape, volume.spacing)
        crop = to_network(volume.unit(resize(volume.array, roi.box, CROP_SIZE, volume.windowed)))
        inputs["roi"].append(whole)
        inputs["organs"].append(crop)
    return inputs
