"""Two engines behind one small interface: OpenVINO on a CPU, torch on CUDA.

Both are imported when they are first needed, so that a CPU user needs no torch.
"""

import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .box import CROP_SIZE, ROI_SIZE
from .errors import DeviceError, WeightsError
from .monitor import PyNvml, cpu_name
from .report import Engine
from .weights import Weights

Network = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""Maps a network input (z, y, x) to its logits (classes, z, y, x), both float32."""

ENGINES = ("auto", "openvino", "torch")

INPUT_SIZES = {"roi": ROI_SIZE, "organs": CROP_SIZE}


class Runtime(Protocol):
    """An engine on a device."""

    @property
    def engine(self) -> Engine:
        """What this runs, for the report."""
        ...

    def load(self, weights: Weights, network: str) -> Network:
        """Make the network "roi" or "organs" ready to run."""
        ...


def resolve_device(device: str = "auto", engine: str = "auto") -> str:
    """Turn a wish into "cpu" or "cuda:N" without importing an engine or touching a GPU.

    "auto" is CUDA where torch is installed and an NVIDIA driver answers, else the CPU.

    Raises:
        DeviceError: if there is no such device or engine, or the two do not go together.
    """
    if engine not in ENGINES:
        raise DeviceError(f"there is no engine {engine!r}; choose {', '.join(ENGINES)}")
    match = re.fullmatch(r"auto|cpu|cuda(?::(\d+))?", device)
    if match is None:
        raise DeviceError(f"there is no device {device!r}; choose auto, cpu, cuda or cuda:N")
    if device == "auto":
        device = "cuda" if engine != "openvino" and _cuda_likely() else "cpu"
    if device == "cpu":
        return device
    if engine == "openvino":
        raise DeviceError(f"OpenVINO does not run on {device} here; leave the engine to auto")
    return f"cuda:{match.group(1) or 0}"


def choose_runtime(device: str = "auto", engine: str = "auto", threads: int | None = None) -> Runtime:
    """Start an engine on a device.

    Args:
        device: "auto", "cpu", "cuda" or "cuda:N"; see `resolve_device`.
        engine: "openvino" (CPU only), "torch", or "auto": OpenVINO on a CPU, torch on CUDA.
        threads: of the CPU engine; None takes all cores that the process may use.

    Raises:
        DeviceError: if there is no such device, or its engine is not installed.
    """
    device = resolve_device(device, engine)
    if device == "cpu" and engine != "torch":
        return OpenVinoRuntime(threads)
    return TorchRuntime(device, threads)


class OpenVinoRuntime:
    """OpenVINO on the CPU, in float32.

    Raises:
        DeviceError: if OpenVINO is not installed.
    """

    def __init__(self, threads: int | None = None):
        try:
            import openvino
        except ImportError as error:
            raise DeviceError("OpenVINO is not installed: pip install openvino") from error
        self._core = openvino.Core()
        self.threads = threads or usable_cores()
        self._settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": self.threads,
        }

    @property
    def engine(self) -> Engine:
        """What this runs, for the report."""
        version = importlib.metadata.version("openvino")
        return Engine("openvino", version, "cpu", cpu_name(), "f32", self.threads)

    def load(self, weights: Weights, network: str) -> Network:
        """Compile a network from its intermediate representation (.xml and .bin)."""
        model = self._core.read_model(weights.read(network, ".xml"), weights.read(network, ".bin"))
        compiled = self._core.compile_model(model, "CPU", self._settings)
        request = compiled.create_infer_request()

        def run(x: NDArray[np.float32]) -> NDArray[np.float32]:
            result = request.infer([x[None, None]], share_inputs=True, share_outputs=True)
            logits: NDArray[np.float32] = result[0][0]
            return logits

        return run


class TorchRuntime:
    """torch on CUDA in half precision, or on the CPU in float32.

    Raises:
        DeviceError: if torch is not installed or does not see the device.
    """

    def __init__(self, device: str, threads: int | None = None):
        try:
            import torch
        except ImportError as error:
            raise DeviceError(f"{device} needs torch: pip install 'fastorgan[gpu]'") from error
        self._torch = torch
        self.threads = threads
        if threads is not None:
            torch.set_num_threads(threads)
        self.device = torch.device(device)
        if self.device.type == "cuda":
            if not torch.cuda.is_available():
                raise DeviceError(f"{device} is not available: torch {torch.__version__} sees no usable NVIDIA GPU")
            if (self.device.index or 0) >= torch.cuda.device_count():
                raise DeviceError(f"{device} is not available: torch sees {torch.cuda.device_count()} GPU(s)")

    @property
    def engine(self) -> Engine:
        """What this runs, for the report."""
        cuda = self.device.type == "cuda"
        name = self._torch.cuda.get_device_name(self.device) if cuda else cpu_name()
        threads = None if cuda else self._torch.get_num_threads()
        precision = "f16" if cuda else "f32"
        return Engine("torch", self._torch.__version__, str(self.device), name, precision, threads)

    def load(self, weights: Weights, network: str) -> Network:
        """Build a network and fill it from its .safetensors file."""
        import safetensors.torch

        from .networks import DenseVNet, RoiUNet, SlimRoiUNet

        torch = self._torch
        if network == "organs":
            module: Any = DenseVNet(drop=0.0)
        else:
            module = RoiUNet() if weights.variant(network) == "paper" else SlimRoiUNet()
        state = safetensors.torch.load(weights.read(network, ".safetensors"))
        # Batch norm's step counters are not stored: inference does not need them.
        missing, strange = module.load_state_dict(state, strict=False)
        if strange or any(not name.endswith("num_batches_tracked") for name in missing):
            raise WeightsError(f"{weights.folder}: the {network} weights are of another network")
        kind = torch.float16 if self.device.type == "cuda" else torch.float32
        module.eval().to(self.device, kind, memory_format=torch.channels_last_3d)

        def run(x: NDArray[np.float32]) -> NDArray[np.float32]:
            with torch.inference_mode():
                given = torch.from_numpy(np.ascontiguousarray(x))[None, None].to(self.device, kind)
                logits = module(given.contiguous(memory_format=torch.channels_last_3d))
                result: NDArray[np.float32] = logits[0].float().contiguous().cpu().numpy()
            return result

        return run


def usable_cores() -> int:
    """Cores that this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows
        return os.cpu_count() or 1


def _cuda_likely() -> bool:
    """Whether torch is installed and an NVIDIA driver answers; cheap, torch itself is not imported."""
    if importlib.util.find_spec("torch") is None:
        return False
    try:
        nvml = PyNvml()
    except DeviceError:
        return False
    try:
        return len(nvml.uuids()) > 0
    except Exception:
        # Whatever ails the driver, the CPU is there.
        return False
    finally:
        nvml.close()
