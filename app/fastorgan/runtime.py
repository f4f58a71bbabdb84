"""Two engines behind one small interface: OpenVINO on a CPU, torch on CUDA.

Both are imported when they are first needed, so that a CPU user needs no torch. Whatever ails a card is a
`DeviceError`; where the user did not ask for the card by name, the CPU takes over.
"""

import importlib.metadata
import importlib.util
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .box import CROP_SIZE, ROI_SIZE
from .errors import DeviceError, WeightsError
from .monitor import PyNvml, cpu_name
from .report import Engine
from .weights import Weights

Network = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""Maps a network input (z, y, x) to its logits (classes, z, y, x), both float32; threads may share it."""

ENGINES = ("auto", "openvino", "torch")

INT8 = "-int8"
"""Between a network's name and .xml or .bin where its products are in eight bits (`training.quantise`)."""

INPUT_SIZES = {"roi": ROI_SIZE, "organs": CROP_SIZE}


class Runtime(Protocol):
    """An engine on a device.

    Attributes:
        faults: one line for each device that was meant to run the networks and does not.
    """

    faults: list[str]

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
        device = "cuda" if engine != "openvino" and _cuda_fault() is None else "cpu"
    if device == "cpu":
        return device
    if engine == "openvino":
        raise DeviceError(f"OpenVINO does not run on {device} here; leave the engine to auto")
    return f"cuda:{match.group(1) or 0}"


def choose_runtime(device: str = "auto", engine: str = "auto", threads: int | None = None) -> Runtime:
    """Start an engine on a device.

    Args:
        device: "auto", "cpu", "cuda" or "cuda:N"; see `resolve_device`. Under "auto" the CPU takes over from a card
            that fails, now or later (`FallbackRuntime`).
        engine: "openvino" (CPU only), "torch", or "auto": OpenVINO on a CPU, torch on CUDA.
        threads: of the CPU engine; None takes all cores that the process may use.

    Raises:
        DeviceError: if there is no such device, or its engine is not installed.
    """

    def on_cpu() -> Runtime:
        return TorchRuntime("cpu", threads) if engine == "torch" else OpenVinoRuntime(threads)

    found = resolve_device(device, engine)
    if found != "cpu":
        if device != "auto":
            return TorchRuntime(found, threads)
        return FallbackRuntime(lambda: TorchRuntime(found, threads), on_cpu)
    runtime = on_cpu()
    if device == "auto" and engine != "openvino" and _built_for_cuda() and (fault := _cuda_fault()) is not None:
        # Whoever installed the gigabytes of torch for CUDA expects a card.
        runtime.faults.append(f"{fault}; the CPU is used instead (--device cpu would say so)")
    return runtime


class FallbackRuntime:
    """A card as long as it works, and the CPU from its first fault on.

    A network that fails runs again on the CPU with the same input, so that a fault costs time and no labels. The card
    is not tried again: after some faults CUDA answers nothing but errors until the process ends.
    """

    def __init__(self, card: Callable[[], Runtime], cpu: Callable[[], Runtime]):
        self.faults: list[str] = []
        self._busy = threading.Lock()
        self._cpu: Callable[[], Runtime] | None = cpu
        try:
            self._runtime = card()
        except DeviceError as fault:
            self._leave_card(fault)

    @property
    def engine(self) -> Engine:
        """What runs now, for the report."""
        return self._runtime.engine

    def load(self, weights: Weights, network: str) -> Network:
        """Make the network "roi" or "organs" ready to run, on whichever device works at the time of each call.

        Raises:
            DeviceError: if neither device works.
        """
        try:
            home, loaded = self._runtime, self._runtime.load(weights, network)
        except DeviceError as fault:
            self._leave_card(fault)
            home, loaded = self._runtime, self._runtime.load(weights, network)

        def run(x: NDArray[np.float32]) -> NDArray[np.float32]:
            nonlocal home, loaded
            # One thread at a time: the others must find the card either working or left.
            with self._busy:
                if home is self._runtime:
                    try:
                        return loaded(x)
                    except DeviceError as fault:
                        self._leave_card(fault)
                # The card was left, in this call or while the other network ran.
                home, loaded = self._runtime, self._runtime.load(weights, network)
                return loaded(x)

        return run

    def _leave_card(self, fault: DeviceError) -> None:
        if self._cpu is None:
            # It is the CPU that failed.
            raise fault
        cpu, self._cpu = self._cpu, None
        try:
            self._runtime = cpu()
        except DeviceError as error:
            raise DeviceError(f"{fault}; nor can the CPU be used: {error}") from fault
        self.faults.append(f"{fault}; the CPU is used instead")


@cache
def _openvino_core() -> Any:
    """The process' one OpenVINO core, which stays.

    Its CPU plugin sets the thread's stack for signals and puts the one before back when it goes. Of two that overlap,
    the later one would put back the earlier one's, which is gone: the next Ctrl-C or SIGTERM would be a crash.
    """
    import openvino

    return openvino.Core()


class OpenVinoRuntime:
    """OpenVINO on the CPU.

    Args:
        threads: None takes all cores that the process may use.
        precision: of the products: "int8", "bf16" or "f32"; "auto" is int8 where the weights have a form of the network
            in eight bits, else bf16 where the processor has instructions for it, else f32.

    Raises:
        DeviceError: if OpenVINO is not installed.
    """

    def __init__(self, threads: int | None = None, precision: str = "auto"):
        try:
            import openvino  # noqa: F401
        except ImportError as error:
            raise DeviceError("OpenVINO is not installed: pip install openvino") from error
        self.faults: list[str] = []
        self._core = _openvino_core()
        self.threads = threads or usable_cores()
        self._wish = self._precision = precision

    @property
    def engine(self) -> Engine:
        """What this runs, for the report."""
        version = importlib.metadata.version("openvino")
        return Engine("openvino", version, "cpu", cpu_name(), self._precision, self.threads)

    def load(self, weights: Weights, network: str) -> Network:
        """Compile a network from its intermediate representation (.xml and .bin)."""
        form = INT8 if self._choose(weights, network) == "int8" else ""
        model = self._core.read_model(weights.read(network, f"{form}.xml"), weights.read(network, f"{form}.bin"))
        settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            # Of what is not in eight bits, where anything is.
            "INFERENCE_PRECISION_HINT": "bf16" if self._precision == "bf16" else "f32",
            "INFERENCE_NUM_THREADS": self.threads,
            # Pinned, one thread of each process would be on the first core: there the networks of all processes of
            # a cluster's node would wait for each other, while other cores idle.
            "ENABLE_CPU_PINNING": False,
        }
        compiled = self._core.compile_model(model, "CPU", settings)
        request = compiled.create_infer_request()
        # One pass at a time: each request more would hold the network's activations once more.
        busy = threading.Lock()

        def run(x: NDArray[np.float32]) -> NDArray[np.float32]:
            with busy:
                result = request.infer([x[None, None]], share_inputs=True, share_outputs=False)
            logits: NDArray[np.float32] = result[0][0]
            return logits

        return run

    def _choose(self, weights: Weights, network: str) -> str:
        if self._wish != "auto":
            return self._wish
        if weights.holds(network, f"{INT8}.xml"):
            self._precision = "int8"
        else:
            # Asked for bf16 where there are no instructions for it, OpenVINO would compute in f32 and not say so.
            able = self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
            self._precision = "bf16" if "BF16" in able else "f32"
        return self._precision


class TorchRuntime:
    """torch on CUDA in half precision, or on the CPU in float32.

    Raises:
        DeviceError: if torch is not installed or does not see the device; with CUDA also from `load` and from the
            networks, if the card fails or a network's values are not finite.
    """

    def __init__(self, device: str, threads: int | None = None):
        try:
            import torch
        except ImportError as error:
            raise DeviceError(f"{device} needs torch: pip install 'fastorgan[gpu]'") from error
        except OSError as error:
            # One of its shared libraries is missing or damaged.
            raise DeviceError(f"{device} needs torch, which cannot be loaded ({_first_sentence(error)})") from error
        self.faults: list[str] = []
        self._torch = torch
        self.threads = threads
        if threads is not None:
            torch.set_num_threads(threads)
        self.device = torch.device(device)
        if self.device.type == "cuda":
            with self._card_faults(), warnings.catch_warnings(record=True) as said:
                # A driver that is too old for this build of torch is told of in a warning alone.
                warnings.simplefilter("always")
                available, count = torch.cuda.is_available(), torch.cuda.device_count()
            if not available:
                why = f" ({_first_sentence(said[0].message)})" if said else ""
                raise DeviceError(
                    f"{device} is not available: torch {torch.__version__} sees no usable NVIDIA GPU{why}"
                )
            if (self.device.index or 0) >= count:
                raise DeviceError(f"{device} is not available: torch sees {count} GPU(s)")
        self.layout = torch.channels_last_3d
        self.engine = self._describe()

    def load(self, weights: Weights, network: str) -> Network:
        """Build a network and fill it from its .safetensors file."""
        import safetensors.torch

        from .networks import build

        torch = self._torch
        module: Any = build(network, weights.variant(network))
        state = safetensors.torch.load(weights.read(network, ".safetensors"))
        # Batch norm's step counters are not stored: inference does not need them.
        missing, strange = module.load_state_dict(state, strict=False)
        if strange or any(not name.endswith("num_batches_tracked") for name in missing):
            raise WeightsError(f"{weights.folder}: the {network} weights are of another network")
        kind = torch.float16 if self.device.type == "cuda" else torch.float32
        with self._card_faults():
            forward = self.prepare(module.eval().to(self.device, kind, memory_format=self.layout), network)

        busy = threading.Lock()

        def run(x: NDArray[np.float32]) -> NDArray[np.float32]:
            with busy, torch.inference_mode(), self._card_faults():
                given = torch.from_numpy(np.ascontiguousarray(x))[None, None].to(self.device, kind)
                logits = forward(given.contiguous(memory_format=self.layout))
                # Half precision ends at 65,504, and a comparison with NaN would quietly make background of it.
                finite = kind is torch.float32 or bool(torch.isfinite(logits).all())
                result: NDArray[np.float32] = logits[0].float().contiguous().cpu().numpy()
            if not finite:
                raise DeviceError(f"{self.device} failed: the {network} network gave values that are not finite")
            return result

        return run

    def prepare(self, module: Callable[[Any], Any], network: str) -> Callable[[Any], Any]:
        """What carries out a pass of a network on the device: the module as it is, which others may wrap."""
        return module

    def _describe(self) -> Engine:
        cuda = self.device.type == "cuda"
        with self._card_faults():
            name = self._torch.cuda.get_device_name(self.device) if cuda else cpu_name()
        threads = None if cuda else self._torch.get_num_threads()
        precision = "f16" if cuda else "f32"
        return Engine("torch", self._torch.__version__, str(self.device), name, precision, threads)

    @contextmanager
    def _card_faults(self) -> Iterator[None]:
        """Make a `DeviceError` of whatever CUDA raises: out of memory, busy, lost, or unknown to this build."""
        try:
            yield
        except (RuntimeError, AssertionError, OSError) as error:
            if self.device.type != "cuda":
                raise
            raise DeviceError(f"{self.device} failed: {_first_sentence(error)}") from error


def usable_cores() -> int:
    """Cores that this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows
        return os.cpu_count() or 1


def _cuda_fault() -> str | None:
    """What keeps torch from a card here, None if nothing is known to; cheap, torch itself is not imported."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    try:
        nvml = PyNvml()
    except DeviceError as error:
        return str(error)
    try:
        return None if len(nvml.uuids()) > 0 else "the NVIDIA driver lists no GPU"
    except Exception as error:
        # Whatever ails the driver, the CPU is there.
        return f"the NVIDIA driver fails ({_first_sentence(error)})"
    finally:
        nvml.close()


def _built_for_cuda() -> bool:
    """Whether the torch that is installed brings its CUDA part; cheap, torch itself is not imported."""
    spec = importlib.util.find_spec("torch")
    places = spec.submodule_search_locations if spec is not None else None
    names = ("libtorch_cuda.so", "torch_cuda.dll")
    return any((Path(place) / "lib" / name).exists() for place in places or () for name in names)


def _first_sentence(error: object) -> str:
    """The first sentence of what torch says: its messages go on with addresses and advice over many lines."""
    line = str(error).strip().partition("\n")[0]
    return line.partition(". ")[0].rstrip(".") or type(error).__name__
