"""Put trained weights into the form that is released, and prove that both engines compute the same with them."""

import hashlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastorgan.errors import WeightsError
from fastorgan.networks import build
from fastorgan.runtime import INPUT_SIZES, INT8, OpenVinoRuntime, Runtime, choose_runtime
from fastorgan.weights import MANIFEST, Weights

from .checkpoint import read_checkpoint
from .statistics import measure_statistics

NETWORKS = ("roi", "organs")
SUFFIXES = (".safetensors", ".xml", ".bin")

LARGEST_DIFFERENCE = 0.05
"""Between the engines' logits on random input, relative to their spread; half-precision weights keep it far below."""


@dataclass(frozen=True)
class Blend:
    """Released weights that a run's are averaged with, number by number.

    A run that started from them lies near enough for the mean to work, often better than either (Wortsman et al.,
    Robust fine-tuning of zero-shot models, CVPR 2022).

    Attributes:
        file: the .safetensors file.
        share: of the mean that it has, 0 to 1.
    """

    file: Path
    share: float

    def into(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The mean of both.

        Raises:
            WeightsError: if the file cannot be read or is of another network.
        """
        import safetensors.torch

        try:
            other = safetensors.torch.load_file(self.file)
            return {
                k: (1 - self.share) * v.float() + self.share * other[k].float() if v.is_floating_point() else v
                for k, v in state.items()
            }
        except (OSError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
            raise WeightsError(f"{self.file}: cannot be read, or holds the weights of another network") from error


def export(
    network: str, checkpoint: Path, out: Path, version: str, blend: Blend | None = None, cache: Path | None = None
) -> float:
    """Write a network's .safetensors (torch) and .xml and .bin (OpenVINO) to `out`, and update its manifest.

    Weights are rounded to half precision first, so that both engines run the same numbers from small files.

    Args:
        network: "roi" or "organs".
        checkpoint: of a run of `fit`.
        out: the folder of released weights.
        version: of the release.
        blend: weights to average the run's with.
        cache: folder of scans to measure batch norm's statistics on anew, but for the patients that the run left out;
            None keeps those that came with the weights.

    Returns:
        The largest difference between the two engines' logits, relative to the logits' standard deviation.

    Raises:
        DataError: if the checkpoint or the cache cannot be read.
        WeightsError: if the checkpoint is another network's or the engines disagree; `out` then stays as it was.
    """
    import openvino
    import safetensors.torch

    state = read_checkpoint(checkpoint, torch.device("cpu"))
    if state["kind"] != network:
        raise WeightsError(f"{checkpoint}: holds the {state['kind']} net, not the {network} net")
    module = build(network, state["variant"]).eval()
    trained = state["export"] if blend is None else blend.into(state["export"])
    size = INPUT_SIZES[network]
    module.load_state_dict(_rounded(trained))
    if cache is not None:
        measure_statistics(module, network, size, cache, state.get("left_out", ()))
        module.load_state_dict(_rounded(module.state_dict()))

    out.mkdir(parents=True, exist_ok=True)
    manifest = _manifest(out)
    manifest["version"] = version
    with tempfile.TemporaryDirectory(prefix=".export-", dir=out) as folder:
        fresh = Path(folder)
        kept = {
            k: v.contiguous() for k, v in _rounded(module.state_dict()).items() if not k.endswith("num_batches_tracked")
        }
        (fresh / f"{network}.safetensors").write_bytes(safetensors.torch.save(kept))
        with torch.no_grad():
            model = openvino.convert_model(module, example_input=torch.zeros(1, 1, *size), input=[1, 1, *size])
        openvino.save_model(model, fresh / f"{network}.xml", compress_to_fp16=True)
        files = [f"{network}{suffix}" for suffix in SUFFIXES]
        manifest["networks"][network] = {
            "variant": state["variant"],
            "sha256": {name: sha256(fresh / name) for name in files},
        }
        difference = engine_difference(Weights(fresh, manifest), network)
        # Written so that NaN, from weights that are not finite, fails too.
        if not difference <= LARGEST_DIFFERENCE:
            raise WeightsError(f"{checkpoint}: the engines' logits differ by {difference:.3g} of their spread")
        for name in files:
            (fresh / name).replace(out / name)
    for suffix in (".xml", ".bin"):
        # In eight bits the network is still the one before; `quantise` makes it anew.
        (out / f"{network}{INT8}{suffix}").unlink(missing_ok=True)
    (out / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return difference


def engine_difference(weights: Weights, network: str) -> float:
    """Largest difference between OpenVINO's and torch's logits on smooth random input, over their SD."""
    random = np.random.default_rng(0)
    coarse = torch.from_numpy(random.normal(0, 1, (1, 1, 12, 16, 24)).astype(np.float32))
    x = nn.functional.interpolate(coarse, INPUT_SIZES[network], mode="trilinear")[0, 0].clamp(-1, 1).numpy()
    engines: tuple[Runtime, Runtime] = (OpenVinoRuntime(precision="f32"), choose_runtime("cpu", "torch"))
    first, second = (engine.load(weights, network)(x) for engine in engines)
    return float(np.abs(first - second).max() / first.std())


def _rounded(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.half() if v.is_floating_point() else v for k, v in state.items()}


def _manifest(out: Path) -> dict[str, Any]:
    if (out / MANIFEST).is_file():
        return Weights.find(out).manifest
    return {"version": "", "networks": {}}


def sha256(path: Path) -> str:
    """Hexadecimal digits of a file's SHA-256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
