"""The same networks in several engines and precisions: time, memory, size and what each costs in DSC.

Each candidate runs in a process of its own (`python -m evaluation.engines NAME …` prints JSON), end to end on the same
CTs, and is scored against the same labels.
"""

import argparse
import importlib.metadata
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastorgan.cascade import Cascade
from fastorgan.errors import DeviceError
from fastorgan.labels import IGNORE, ORGANS
from fastorgan.monitor import MemorySampler
from fastorgan.report import Engine
from fastorgan.runtime import INPUT_SIZES, Network, OpenVinoRuntime, Runtime, TorchRuntime, usable_cores
from fastorgan.volume import load_image, read_volume
from fastorgan.weights import Weights

from .accuracy import PairError, dsc, read_labels
from .benchmark import run_process

PACKAGES = {"torch": "torch", "cuda": "torch", "onnxruntime": "onnxruntime", "openvino": "openvino"}
"""What each engine needs, beside what fastorgan needs anyway."""


class TorchBfloat16(TorchRuntime):
    """torch on the CPU with products in bfloat16."""

    def load(self, weights: Weights, network: str) -> Network:
        """Wrap the network in autocast."""
        import torch

        plain = super().load(weights, network)

        def run(x: NDArray[np.float32]) -> NDArray[np.float32]:
            with torch.autocast("cpu", torch.bfloat16):
                return plain(x)

        return run


class OnnxRuntime:
    """ONNX Runtime on the CPU in float32, from an export of the torch network."""

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads or usable_cores()
        self.faults: list[str] = []
        version = importlib.metadata.version("onnxruntime")
        self.engine = Engine("onnxruntime", version, "cpu", None, "f32", self.threads)

    def load(self, weights: Weights, network: str) -> Network:
        """Export to a temporary file and open it."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "network.onnx"
            # In a process of its own: torch's memory is not ONNX Runtime's.
            run_process([sys.executable, "-m", "evaluation.engines", "export", str(weights.folder), network, str(path)])
            session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])

        def run(x: NDArray[np.float32]) -> NDArray[np.float32]:
            logits: NDArray[np.float32] = session.run(None, {"x": np.ascontiguousarray(x[None, None])})[0][0]
            return logits

        return run


class CudaEager(TorchRuntime):
    """torch on the first card, activations in torch's own layout."""

    def __init__(self) -> None:
        import torch

        super().__init__("cuda:0")
        self.layout = torch.contiguous_format


class CudaGraphs(TorchRuntime):
    """torch on the first card, each network recorded once as a CUDA graph, which spares starting its kernels singly."""

    def __init__(self) -> None:
        super().__init__("cuda:0")

    def prepare(self, module: Callable[[Any], Any], network: str) -> Callable[[Any], Any]:
        """Record the network on an input of its own, into which each pass copies."""
        import torch

        with torch.inference_mode():
            place = torch.zeros(1, 1, *INPUT_SIZES[network], dtype=torch.float16, device=self.device)
            place = place.contiguous(memory_format=self.layout)
            # cuDNN chooses its kernels in the first passes, which may not be recorded, nor be on the usual stream.
            aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(3):
                    module(place)
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = module(place)

        def replay(x: Any) -> Any:
            place.copy_(x)
            graph.replay()
            return logits

        return replay


CANDIDATES: dict[str, Callable[[], Runtime]] = {
    "torch f32": lambda: TorchRuntime("cpu"),
    "torch bf16": lambda: TorchBfloat16("cpu"),
    "onnxruntime f32": OnnxRuntime,
    "openvino f32": lambda: OpenVinoRuntime(precision="f32"),
    "openvino bf16": lambda: OpenVinoRuntime(precision="bf16"),
    "openvino int8": lambda: OpenVinoRuntime(precision="int8"),
    "cuda eager": CudaEager,
    "cuda channels": lambda: TorchRuntime("cuda:0"),
    "cuda graphs": CudaGraphs,
}
"""By name. int8 needs weights to which `python -m training quantise` has added their form in eight bits; the last three
need a card, and compute in half precision."""

ON_CPU = tuple(name for name in CANDIDATES if not name.startswith("cuda"))
ON_CARD = ("openvino f32", *(name for name in CANDIDATES if name.startswith("cuda")))
"""What is compared where nobody says more; on a card, with the CPU."""


@dataclass(frozen=True)
class Outcome:
    """One candidate.

    Attributes:
        name: of the candidate.
        seconds: wall seconds of each network by case.
        cpu_seconds: processor seconds of each network by case.
        rss_mb: highest resident memory in MB, scans included.
        size_mb: of the engine's package on disk in MB.
        gpu_mib: highest memory in use on the whole card less what was in use before; None without a card.
        dsc: by organ, one value a case that has the organ's label.
    """

    name: str
    seconds: dict[str, list[float]]
    cpu_seconds: dict[str, list[float]]
    rss_mb: float
    size_mb: float
    gpu_mib: float | None
    dsc: dict[str, dict[str, float]]


def find_cases(folder: Path, names: Sequence[str] | None = None) -> list[tuple[Path, Path]]:
    """CT and labels of the cases in a folder with images/NAME_0000.nii.gz and labels/NAME.nii.gz.

    Raises:
        PairError: if there is none.
    """
    cases = []
    for labels in sorted((folder / "labels").glob("*.nii.gz")):
        name = labels.name.removesuffix(".nii.gz")
        if names is None or name in names:
            cases.append((folder / "images" / f"{name}_0000.nii.gz", labels))
    if not cases:
        raise PairError(f"{folder}: no such case in images/ and labels/")
    return cases


def compare(names: Sequence[str], cases: Sequence[tuple[Path, Path]], weights: Path) -> list[Outcome]:
    """Run each candidate on all cases.

    Args:
        names: of `CANDIDATES`.
        cases: CT and label file of each.
        weights: the release.

    Raises:
        BenchmarkError: if a candidate fails.
    """
    outcomes = []
    for name in names:
        files = [str(path) for case in cases for path in case]
        run = run_process([sys.executable, "-m", "evaluation.engines", "run", name, str(weights), *files])
        said = json.loads(run.said.splitlines()[-1])
        outcomes.append(Outcome(name=name, rss_mb=run.rss_mb, **said))
        print(row(outcomes[-1], outcomes[0]), flush=True)
    return outcomes


def header() -> str:
    """The titles of `row`'s columns."""
    organs = "".join(f"{organ.name:>17}" for organ in ORGANS)
    memory = f"{'RSS, MB':>9}{'size, MB':>9}{'GPU, MiB':>9}"
    return f"{'':16}{'ROI net, s':>11}{'organ net, s':>13}{'CPU, s':>8}{memory}{organs}"


def row(outcome: Outcome, first: Outcome) -> str:
    """One line: medians, and mean DSC in percent with the loss against the first candidate."""
    roi, organs = (statistics.median(outcome.seconds[network]) for network in ("roi", "organs"))
    cpu = sum(statistics.median(outcome.cpu_seconds[network]) for network in ("roi", "organs"))
    cells = ""
    for organ in ORGANS:
        found, before = (statistics.mean(o.dsc[organ.name].values()) for o in (outcome, first))
        cells += f"{f'{100 * found:.2f} ({100 * (found - before):+.2f})':>17}"
    card = "-" if outcome.gpu_mib is None else f"{outcome.gpu_mib:.0f}"
    memory = f"{outcome.rss_mb:9.0f}{outcome.size_mb:9.0f}{card:>9}"
    return f"{outcome.name:16}{roi:11.3f}{organs:13.3f}{cpu:8.2f}{memory}{cells}"


def describe_card() -> str:
    """One line: the first card, its driver, torch, and what a process takes on it that only opens a CUDA context.

    Raises:
        BenchmarkError: if there is no such card, or no torch for it.
    """
    said = json.loads(run_process([sys.executable, "-m", "evaluation.engines", "context"]).said.splitlines()[-1])
    return (
        f"{said['name']}, driver {said['driver']}, torch {said['torch']}; a CUDA context alone takes "
        f"{said['context_mib']:.0f} MiB"
    )


def _context() -> dict[str, Any]:
    import pynvml
    import torch

    with MemorySampler(0) as sampler:
        torch.zeros(1, device="cuda:0").cpu()
    used = _used_on_card(sampler)
    if used is None:
        raise DeviceError(f"the card's memory cannot be read: {sampler.peak.gpu_note}")
    pynvml.nvmlInit()
    driver = pynvml.nvmlSystemGetDriverVersion()
    return {"name": sampler.device_name, "driver": driver, "torch": torch.__version__, "context_mib": used}


def _used_on_card(sampler: MemorySampler) -> float | None:
    """MiB in use on the card at the most, less what was in use when the sampler began; None if not known."""
    before, most = sampler.samples[0].device_mib, sampler.peak.device_mib
    return None if before is None or most is None else most - before


def _run(name: str, weights: Weights, cases: Sequence[tuple[Path, Path]]) -> dict[str, Any]:
    # Before CUDA is there, so that its first reading is what the card held without it.
    with MemorySampler(0 if name.startswith("cuda") else None) as sampler:
        said = _measure(name, weights, cases)
    return said | {"gpu_mib": _used_on_card(sampler)}


def _measure(name: str, weights: Weights, cases: Sequence[tuple[Path, Path]]) -> dict[str, Any]:
    runtime = CANDIDATES[name]()
    seconds: dict[str, list[float]] = {network: [] for network in INPUT_SIZES}
    cpu: dict[str, list[float]] = {network: [] for network in INPUT_SIZES}

    class Timed:
        """The runtime, with the time of each pass kept."""

        faults = runtime.faults
        engine = runtime.engine

        def load(self, weights: Weights, network: str) -> Network:
            plain = runtime.load(weights, network)

            def run(x: NDArray[np.float32]) -> NDArray[np.float32]:
                wall, processor = time.perf_counter(), time.process_time()
                logits = plain(x)
                seconds[network].append(time.perf_counter() - wall)
                cpu[network].append(time.process_time() - processor)
                return logits

            return run

    cascade = Cascade(Timed(), weights)
    scores: dict[str, dict[str, float]] = {organ.name: {} for organ in ORGANS}
    for ct, path in cases:
        found = cascade.find_organs(read_volume(load_image(ct), str(ct))).labels
        truth = read_labels(path).array
        for organ in ORGANS:
            expected = truth == organ.code
            if expected.any():
                scores[organ.name][path.name] = dsc(expected, (found == organ.code) & (truth != IGNORE))
    package = importlib.metadata.files(PACKAGES[name.split()[0]]) or []
    places = [Path(str(file.locate())) for file in package]
    size = sum(place.stat().st_size for place in places if place.is_file()) / 1e6
    return {"seconds": seconds, "cpu_seconds": cpu, "dsc": scores, "size_mb": size}


def _export(weights: Weights, network: str, path: Path) -> None:
    import safetensors.torch
    import torch

    from fastorgan.networks import build

    module = build(network, weights.variant(network))
    module.load_state_dict(safetensors.torch.load(weights.read(network, ".safetensors")), strict=False)
    module.float().eval()
    x = torch.zeros(1, 1, *INPUT_SIZES[network])
    torch.onnx.export(module, (x,), str(path), input_names=["x"], opset_version=18, dynamo=True, external_data=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one candidate, export a network for ONNX Runtime, or open a CUDA context."""
    parser = argparse.ArgumentParser(prog="python -m evaluation.engines", description=__doc__)
    parser.add_argument("what", choices=("run", "export", "context"))
    parser.add_argument("rest", nargs="*")
    args = parser.parse_args(argv)
    if args.what == "context":
        print(json.dumps(_context()))
        return 0
    if args.what == "export":
        folder, network, path = args.rest
        _export(Weights.find(Path(folder)), network, Path(path))
        return 0
    name, folder, *files = args.rest
    paths = [Path(file) for file in files]
    cases = list(zip(paths[::2], paths[1::2], strict=True))
    print(json.dumps(_run(name, Weights.find(Path(folder)), cases)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
