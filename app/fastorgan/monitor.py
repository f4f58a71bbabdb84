"""Time and memory of a run: seconds per stage, GPU memory by NVML, resident memory by the operating system.

GPU memory is read the way FLARE21's organisers read it (`Efficiency.py` of JunMa11/FLARE): total minus free memory of
the whole card every 0.1 s, in MiB. Other programs on the card and the CUDA context therefore count. Importing this
module loads neither pynvml nor torch, and a machine without an NVIDIA driver only costs the GPU figures.
"""

import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

from .errors import DeviceError

INTERVAL_S = 0.1
"""Pause between two readings; the true interval is this plus the reading itself, as it is for the organisers."""

GIVE_UP_AFTER = 20
"""Failed readings in a row after which a source is no longer asked: a card that fell off the bus stays away."""

LEAVE_AFTER_S = 5.0
"""How long the end of a run waits for a reading under way before it leaves a driver that hangs behind."""

MIB = 2**20

T = TypeVar("T")


class StageTimer:
    """Wall seconds per named stage, in the order in which the stages first began.

    A stage that comes again adds to its earlier time. A stage inside another one interrupts it: each second belongs to
    the innermost stage alone, so that `total` counts no second twice. For use by one thread.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._running: list[str] = []
        self._since = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the wall time of the `with` block towards `name`, also where the block raises."""
        self._charge()
        self._seconds.setdefault(name, 0.0)
        self._running.append(name)
        try:
            yield
        finally:
            self._charge()
            self._running.pop()

    def _charge(self) -> None:
        now = self._clock()
        if self._running:
            self._seconds[self._running[-1]] += now - self._since
        self._since = now

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by stage name; empty before the first stage, a running stage up to its last interruption."""
        return dict(self._seconds)

    @property
    def total(self) -> float:
        """The sum of all stages in seconds; time between stages is not in it."""
        return sum(self._seconds.values())


class ResidentMemory:
    """Resident memory (RSS) of this process in MiB, now and at its highest.

    On Linux both come from `/proc/self/status`. `ru_maxrss` would not do there: a new process inherits that of the
    process which started it. Elsewhere the highest value is `ru_maxrss`, and the present one is unknown.
    """

    def __init__(self, proc: Path = Path("/proc/self")) -> None:
        self._proc = proc

    def read(self) -> tuple[float | None, float | None]:
        """Return the present RSS and its high-water mark; None for what the system does not tell."""
        try:
            status = (self._proc / "status").read_bytes()
        except OSError:
            return None, _maxrss_mib()
        kib = {}
        for line in status.splitlines():
            if line.startswith((b"VmRSS:", b"VmHWM:")):
                key, value = line.split()[:2]
                kib[key] = int(value)
        present, highest = kib.get(b"VmRSS:"), kib.get(b"VmHWM:")
        return (
            None if present is None else present / 1024,
            _maxrss_mib() if highest is None else highest / 1024,
        )

    def restart(self) -> float | None:
        """Lower the high-water mark to the present RSS where the system allows it, and return the mark in MiB.

        Linux does on a 5 written to `/proc/self/clear_refs` (proc(5)). The mark is the kernel's only one: `ru_maxrss`
        and what `wait4` or `time -v` tell the parent process fall with it.
        """
        with suppress(OSError):
            # Not opened by `open(..., "w")`, which would make the file where there is none.
            clear_refs = os.open(self._proc / "clear_refs", os.O_WRONLY)
            try:
                os.write(clear_refs, b"5")
            finally:
                os.close(clear_refs)
        return self.read()[1]


def _maxrss_mib() -> float | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    return _maxrss_to_mib(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, sys.platform)


def _maxrss_to_mib(maxrss: int, system: str) -> float:
    # getrusage(2) counts in bytes on macOS and in KiB on Linux and the other BSDs.
    return maxrss / MIB if system == "darwin" else maxrss / 1024


def peak_rss_mib() -> float | None:
    """Highest resident memory of this process in MiB, as the system has it; None where it keeps no such figure.

    A `MemorySampler` restarts the system's mark at each window. Ask its `peak` for the whole run instead.
    """
    return ResidentMemory().read()[1]


def cpu_name() -> str:
    """Name of the processor's model, or of its architecture where the system does not tell the model."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine() or "unknown"


class Nvml(Protocol):
    """The few questions asked of NVIDIA's management library. Each may raise any exception."""

    def uuids(self) -> Sequence[str]:
        """Return the UUIDs of the cards in NVML's order, that of the PCI bus."""
        ...

    def name(self, uuid: str) -> str:
        """Return the product's name."""
        ...

    def memory(self, uuid: str) -> tuple[int, int]:
        """Return total and free bytes of the whole card."""
        ...

    def process_memory(self, uuid: str, pid: int) -> int | None:
        """Return the bytes that one process holds on the card; None where the driver does not tell."""
        ...

    def close(self) -> None:
        """Let go of the library."""
        ...


class PyNvml:
    """`Nvml` by the package nvidia-ml-py.

    Raises:
        DeviceError: the package, the driver or its library is not there.
    """

    def __init__(self) -> None:
        try:
            import pynvml
        except ImportError as error:
            raise DeviceError("the package nvidia-ml-py is not installed") from error
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise DeviceError(f"no NVIDIA driver answers here (NVML: {error})") from error
        self._nvml: Any = pynvml
        self._handles: dict[str, Any] = {}
        self._processes: Callable[[Any], Sequence[Any]] = pynvml.nvmlDeviceGetComputeRunningProcesses_v3

    def uuids(self) -> list[str]:
        """Return the UUIDs of all cards that the driver lists."""
        for index in range(self._nvml.nvmlDeviceGetCount()):
            handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
            self._handles[self._nvml.nvmlDeviceGetUUID(handle)] = handle
        return list(self._handles)

    def _handle(self, uuid: str) -> Any:
        # The slices of a divided card (MIG) are not among the cards listed, but have a UUID of their own.
        if uuid not in self._handles:
            self._handles[uuid] = self._nvml.nvmlDeviceGetHandleByUUID(uuid)
        return self._handles[uuid]

    def name(self, uuid: str) -> str:
        """Return the product's name, such as "NVIDIA TITAN X"."""
        return str(self._nvml.nvmlDeviceGetName(self._handle(uuid)))

    def memory(self, uuid: str) -> tuple[int, int]:
        """Return total and free bytes of the whole card."""
        memory = self._nvml.nvmlDeviceGetMemoryInfo(self._handle(uuid))
        return int(memory.total), int(memory.free)

    def process_memory(self, uuid: str, pid: int) -> int | None:
        """Return the bytes that process `pid` holds on the card, or None where the driver does not tell."""
        try:
            processes = self._processes(self._handle(uuid))
        except self._nvml.NVMLError_FunctionNotFound:
            # Drivers before 510 know the second version only.
            self._processes = self._nvml.nvmlDeviceGetComputeRunningProcesses_v2
            processes = self._processes(self._handle(uuid))
        used = sum(process.usedGpuMemory or 0 for process in processes if process.pid == pid)
        # A process on the list holds at least its CUDA context; some drivers say 0 to one inside a container.
        return used or None

    def close(self) -> None:
        """Let go of the library."""
        self._nvml.nvmlShutdown()


def visible_uuid(index: int, uuids: Sequence[str], environ: Mapping[str, str]) -> str:
    """Return the UUID of the card that CUDA calls `cuda:index`.

    Follows `CUDA_VISIBLE_DEVICES` where it is set: numbers, UUIDs or their beginnings ("GPU-8932f937"), MIG UUIDs; as
    in CUDA, the first entry that names no card ends the list. Numbers count along the PCI bus; CUDA does so too if
    `CUDA_DEVICE_ORDER=PCI_BUS_ID` is set or the cards are all alike.

    Raises:
        DeviceError: there is no such card, or the variable hides it.
    """
    entries = environ.get("CUDA_VISIBLE_DEVICES")
    if entries is None:
        visible = list(uuids)
    else:
        visible = []
        for entry in entries.split(","):
            uuid = _named_uuid(entry.strip(), uuids)
            if uuid is None:
                break
            visible.append(uuid)
    if 0 <= index < len(visible):
        return visible[index]
    if entries is None:
        raise DeviceError(f"the NVIDIA driver lists {len(uuids)} device(s), so there is no cuda:{index}")
    raise DeviceError(f"CUDA_VISIBLE_DEVICES={entries!r} leaves {len(visible)} device(s), so there is no cuda:{index}")


def _named_uuid(entry: str, uuids: Sequence[str]) -> str | None:
    if entry.isdecimal():
        return uuids[int(entry)] if int(entry) < len(uuids) else None
    if entry.startswith("MIG-"):
        return entry
    matches = [uuid for uuid in uuids if uuid.startswith(entry)] if entry.startswith("GPU-") else []
    return matches[0] if len(matches) == 1 else None


@dataclass(frozen=True)
class Sample:
    """One reading.

    Attributes:
        seconds: since the sampler's start.
        device_mib: memory in use on the whole card, by anyone; None if not read.
        process_mib: this process's part of it; None if the driver does not tell.
        rss_mib: resident memory of this process; None if the system does not tell.
    """

    seconds: float
    device_mib: float | None
    process_mib: float | None
    rss_mib: float | None


@dataclass(frozen=True)
class MemoryPeak:
    """The highest values in an interval, in MiB.

    Attributes:
        device_mib: memory in use on the whole card, by anyone; None if never read.
        process_mib: this process's part of it; None if the driver never told.
        rss_mib: resident memory of this process; None if the system does not tell.
        gpu_note: why a GPU figure is missing or less sure than it looks; None where there is nothing to say.
    """

    device_mib: float | None = None
    process_mib: float | None = None
    rss_mib: float | None = None
    gpu_note: str | None = "not measured"


class _Query(Generic[T]):
    """One question asked over and over; its failures are kept, never raised."""

    def __init__(self, ask: Callable[[], T]) -> None:
        self._ask = ask
        self._failures_in_a_row = 0
        self.error: str | None = None

    def __call__(self) -> T | None:
        if self._failures_in_a_row >= GIVE_UP_AFTER:
            return None
        try:
            answer = self._ask()
        # Whatever NVML or its bindings do, it must not end the run.
        except Exception as error:
            self._failures_in_a_row += 1
            self.error = str(error) or type(error).__name__
            return None
        self._failures_in_a_row = 0
        self.error = None
        return answer


@dataclass(frozen=True)
class _Reading:
    """A sample, what went wrong with it, and the system's high-water mark of the resident memory in MiB."""

    sample: Sample
    device_error: str | None
    process_error: str | None
    rss_mark: float | None


class Window:
    """Peaks of the readings between the opening and the closing of one interval; see `MemorySampler.window`."""

    def __init__(self, reason: str | None, rss_mark: float | None) -> None:
        self._reason = reason
        self._rss_mark = rss_mark
        self._readings = 0
        self._unread = 0
        self._error: str | None = None
        self._process_error: str | None = None
        self._device_mib: float | None = None
        self._process_mib: float | None = None
        self._rss_mib: float | None = None

    def add(self, reading: _Reading) -> None:
        """Take one reading in."""
        self._readings += 1
        self._device_mib = _higher(self._device_mib, reading.sample.device_mib)
        self._process_mib = _higher(self._process_mib, reading.sample.process_mib)
        self._rss_mib = _higher(self._rss_mib, reading.sample.rss_mib)
        if reading.device_error is not None:
            self._unread += 1
            self._error = reading.device_error
        if reading.process_error is not None:
            self._process_error = reading.process_error
        # A mark that has not risen since the window opened is older than the window.
        mark = reading.rss_mark
        if mark is not None and (self._rss_mark is None or mark > self._rss_mark):
            self._rss_mib = _higher(self._rss_mib, mark)

    @property
    def peak(self) -> MemoryPeak:
        """The peaks so far."""
        return MemoryPeak(self._device_mib, self._process_mib, self._rss_mib, self._note())

    def _note(self) -> str | None:
        if self._reason is not None:
            return self._reason
        notes = []
        if self._unread:
            notes.append(f"{self._unread} of {self._readings} readings of the GPU's memory failed ({self._error})")
        if self._process_mib is None:
            cause = self._process_error or "the driver does not list this process: GPU unused, or run in a container"
            notes.append(f"this process's part is unknown ({cause})")
        return "; ".join(notes) or None


def _higher(a: float | None, b: float | None) -> float | None:
    if a is None or b is None:
        return b if a is None else a
    return max(a, b)


class MemorySampler:
    """Reads GPU and resident memory every 0.1 s in a thread of its own, from entering the context until leaving it.

    Enter it before CUDA is initialised: the first sample is then what the card held without this program. A spike
    between two readings is missed, as it is by the organisers' sampler; only the resident memory has a mark that
    the system itself keeps. Nothing that NVML does raises: what it does not tell is None, and `reason` or the peaks'
    `gpu_note` says why.

    Args:
        device: N of `cuda:N`; None for a run on the CPU.
        interval: pause between two readings in s.
        nvml: opens NVML; called once, when the context is entered.
        resident: where the resident memory is read.
        clock: seconds from any origin.
        sleep: waits for the seconds given; the default wakes at once when the context is left.
    """

    def __init__(
        self,
        device: int | None,
        *,
        interval: float = INTERVAL_S,
        nvml: Callable[[], Nvml] = PyNvml,
        resident: ResidentMemory | None = None,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        self._device = device
        self._interval = interval
        self._open_nvml = nvml
        self._resident = resident or ResidentMemory()
        self._clock = clock
        self._stop = threading.Event()
        self._sleep = sleep or self._stop.wait
        # Held while reading, so that a window opens and closes between two readings, not within one.
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._nvml: Nvml | None = None
        self._read_device: _Query[tuple[int, int]] | None = None
        self._read_process: _Query[int | None] | None = None
        self._started = 0.0
        self._samples: list[Sample] = []
        self._whole = Window("not measured", None)
        self._windows: list[Window] = []
        self.device_name: str | None = None
        """Product name of the card; None where there is none to read."""
        self.reason: str | None = "not measured"
        """Why the card cannot be read at all; None where it can."""

    def __enter__(self) -> Self:
        if self._thread is not None:
            raise RuntimeError("a MemorySampler can be entered only once")
        self.reason = self._connect()
        self._started = self._clock()
        # No mark to rise above: the peak of the whole run has in it what came before the sampler.
        self._whole = Window(self.reason, None)
        self._windows.append(self._whole)
        self.sample()
        self._thread = threading.Thread(target=self._run, name="fastorgan-memory", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=LEAVE_AFTER_S)
            # A driver that hangs keeps the thread; it dies with the process.
            if self._thread.is_alive():
                return
        self.sample()
        self._disconnect()

    def _connect(self) -> str | None:
        if self._device is None:
            return "the run uses no GPU"
        try:
            nvml = self._nvml = self._open_nvml()
            uuid = visible_uuid(self._device, nvml.uuids(), os.environ)
            self.device_name = nvml.name(uuid)
        except Exception as error:
            return str(error) or type(error).__name__
        pid = os.getpid()
        self._read_device = _Query(lambda: nvml.memory(uuid))
        self._read_process = _Query(lambda: nvml.process_memory(uuid, pid))
        return None

    def _disconnect(self) -> None:
        self._read_device = self._read_process = None
        if self._nvml is not None:
            with suppress(Exception):
                self._nvml.close()
            self._nvml = None

    def _run(self) -> None:
        while True:
            self._sleep(self._interval)
            if self._stop.is_set():
                return
            self.sample()

    def sample(self) -> Sample:
        """Take a reading now, beside the regular ones, and return it."""
        with self._lock:
            return self._read().sample

    def _read(self) -> _Reading:
        memory = self._read_device() if self._read_device else None
        process = self._read_process() if self._read_process else None
        rss, mark = self._resident.read()
        sample = Sample(
            self._clock() - self._started,
            None if memory is None else (memory[0] - memory[1]) / MIB,
            None if process is None else process / MIB,
            rss,
        )
        reading = _Reading(
            sample,
            self._read_device.error if self._read_device else None,
            self._read_process.error if self._read_process else None,
            mark,
        )
        self._samples.append(sample)
        for window in self._windows:
            window.add(reading)
        return reading

    @contextmanager
    def window(self) -> Iterator[Window]:
        """Gather the peaks of the `with` block, one case say, in the `Window` yielded.

        A reading is taken at both ends. Windows may overlap or nest. Opening one restarts the system's mark of the
        resident memory (see `ResidentMemory.restart`); where that is not allowed and the mark does not rise in the
        block, the resident memory's peak is the highest of the readings.

        Raises:
            RuntimeError: the sampler has not been entered.
        """
        if self._thread is None:
            raise RuntimeError("enter the MemorySampler before opening a window")
        with self._lock:
            reading = self._read()
            # The windows already open have just taken the old mark in.
            window = Window(self.reason, self._resident.restart())
            window.add(replace(reading, rss_mark=None))
            self._windows.append(window)
        try:
            yield window
        finally:
            with self._lock:
                self._read()
                self._windows.remove(window)

    @property
    def peak(self) -> MemoryPeak:
        """The peaks since the start; resident memory since the process began."""
        return self._whole.peak

    @property
    def samples(self) -> tuple[Sample, ...]:
        """All readings so far, oldest first; the first is from before the program's own use of the card."""
        with self._lock:
            return tuple(self._samples)
