import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

import fastorgan
from fastorgan import monitor
from fastorgan.errors import DeviceError
from fastorgan.monitor import (
    MIB,
    MemoryPeak,
    MemorySampler,
    Nvml,
    PyNvml,
    ResidentMemory,
    StageTimer,
    cpu_name,
    peak_rss_mib,
    visible_uuid,
)

CARDS = ("GPU-8932f937-d72c", "GPU-8933aaaa-0001", "GPU-b5c0ffee-0002")
NEVER = 3600.0
"""An interval so long that only the readings asked for by the test are taken."""


class RecordedNvml:
    """Plays readings (used MiB of a 12 GiB card, this process's MiB) back, the last one for ever."""

    def __init__(self, *readings: tuple[float | Exception, float | Exception | None]) -> None:
        self.readings = list(readings)
        self.asked = 0
        self.asked_for: set[tuple[str, int]] = set()
        self.closed = 0

    def uuids(self) -> Sequence[str]:
        return CARDS

    def name(self, uuid: str) -> str:
        return f"card {CARDS.index(uuid)}"

    def memory(self, uuid: str) -> tuple[int, int]:
        used = self.readings[min(self.asked, len(self.readings) - 1)][0]
        self.asked += 1
        if isinstance(used, Exception):
            raise used
        total = 12 * 1024 * MIB
        return total, total - round(used * MIB)

    def process_memory(self, uuid: str, pid: int) -> int | None:
        self.asked_for.add((uuid, pid))
        process = self.readings[min(self.asked - 1, len(self.readings) - 1)][1]
        if isinstance(process, Exception):
            raise process
        return None if process is None else round(process * MIB)

    def close(self) -> None:
        self.closed += 1


class RecordedRss(ResidentMemory):
    """Resident memory whose present value and high-water mark the test sets."""

    def __init__(self, present: float, highest: float, restarts: bool = True) -> None:
        super().__init__()
        self.present: float | None = present
        self.highest: float | None = highest
        self.restarts = restarts

    def read(self) -> tuple[float | None, float | None]:
        return self.present, self.highest

    def restart(self) -> float | None:
        if self.restarts:
            self.highest = self.present
        return self.highest


@pytest.fixture(autouse=True)
def _no_cuda_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def sampling(nvml: Nvml, device: int | None = 0, **options: Any) -> MemorySampler:
    return MemorySampler(device, interval=NEVER, nvml=lambda: nvml, **options)


# Stage times


class Hands:
    """A clock that stands where the test puts it."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_stages_keep_their_order_and_add_up() -> None:
    clock = Hands()
    timer = StageTimer(clock)
    assert timer.seconds == {}
    assert timer.total == 0
    for stage, seconds in (("read", 2.0), ("organs", 0.5), ("read", 0.25)):
        with timer.stage(stage):
            clock.now += seconds
        clock.now += 7.0  # between the stages
    assert list(timer.seconds.items()) == [("read", 2.25), ("organs", 0.5)]
    assert timer.total == 2.75


def test_an_inner_stage_interrupts_the_outer_one() -> None:
    clock = Hands()
    timer = StageTimer(clock)
    with timer.stage("organs"):
        clock.now += 1.0
        with timer.stage("restore"):
            clock.now += 0.5
            with timer.stage("organs"):
                clock.now += 4.0
        clock.now += 2.0
    assert timer.seconds == {"organs": 7.0, "restore": 0.5}
    assert timer.total == 7.5


def test_a_stage_that_raises_is_counted_and_ended() -> None:
    clock = Hands()
    timer = StageTimer(clock)

    def fail() -> None:
        with timer.stage("read"):
            clock.now += 3.0
            raise OSError

    with pytest.raises(OSError):
        fail()
    clock.now += 10.0
    with timer.stage("write"):
        clock.now += 1.0
    assert timer.seconds == {"read": 3.0, "write": 1.0}


# Which card


@pytest.mark.parametrize(
    ("visible", "index", "card"),
    [
        (None, 0, 0),
        (None, 2, 2),
        ("1", 0, 1),
        ("2, 0", 0, 2),
        ("2,0", 1, 0),
        (CARDS[2], 0, 2),
        ("GPU-b5c0", 0, 2),
        ("1,GPU-8932", 1, 0),
    ],
)
def test_cuda_index_to_card(visible: str | None, index: int, card: int) -> None:
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert visible_uuid(index, CARDS, environ) == CARDS[card]


def test_a_mig_slice_is_taken_by_its_uuid() -> None:
    assert visible_uuid(0, CARDS, {"CUDA_VISIBLE_DEVICES": "MIG-77"}) == "MIG-77"


@pytest.mark.parametrize(
    ("visible", "index", "left"),
    [
        ("", 0, 0),
        ("-1", 0, 0),
        ("NoDevFiles", 0, 0),
        ("1", 1, 1),
        ("3", 0, 0),
        ("0,-1,1", 1, 1),  # the first entry that names no card ends the list
        ("GPU-893", 0, 0),  # the beginning of two UUIDs
        ("0", -1, 1),
    ],
)
def test_hidden_cards(visible: str, index: int, left: int) -> None:
    with pytest.raises(DeviceError, match=f"CUDA_VISIBLE_DEVICES='{visible}' leaves {left} device.*no cuda:{index}"):
        visible_uuid(index, CARDS, {"CUDA_VISIBLE_DEVICES": visible})


def test_no_such_card() -> None:
    with pytest.raises(DeviceError, match=r"lists 3 device\(s\), so there is no cuda:3"):
        visible_uuid(3, CARDS, {})


def test_the_sampler_follows_cuda_visible_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0")
    nvml = RecordedNvml((100, 10))
    with sampling(nvml) as sampler:
        assert sampler.device_name == "card 2"
    assert nvml.asked_for == {(CARDS[2], os.getpid())}
    assert nvml.closed == 1


# GPU memory


def test_peaks_by_window_and_over_the_run() -> None:
    # start; window a opens, inside, closes; between; window b opens, closes; end
    nvml = RecordedNvml(
        (300, None), (310, None), (2048.5, 1700), (900, 600), (5000, 600), (950, 650), (940, 640), (320, None)
    )
    with sampling(nvml) as sampler:
        with sampler.window() as a:
            sampler.sample()
        sampler.sample()
        with sampler.window() as b:
            pass
    assert (a.peak.device_mib, a.peak.process_mib, a.peak.gpu_note) == (2048.5, 1700, None)
    assert (b.peak.device_mib, b.peak.process_mib, b.peak.gpu_note) == (950, 650, None)
    assert (sampler.peak.device_mib, sampler.peak.process_mib) == (5000, 1700)
    assert [sample.device_mib for sample in sampler.samples] == [300, 310, 2048.5, 900, 5000, 950, 940, 320]
    assert sampler.samples[0].process_mib is None
    assert sampler.reason is None


def test_windows_may_overlap() -> None:
    nvml = RecordedNvml((0, 1), (1, 1), (2, 1), (9, 1), (3, 1), (4, 1), (0, 1))
    with sampling(nvml) as sampler:
        first, second = sampler.window(), sampler.window()
        a = first.__enter__()  # reads 1
        b = second.__enter__()  # reads 2
        sampler.sample()  # reads 9
        first.__exit__(None, None, None)  # reads 3
        peak_of_first = a.peak.device_mib
        second.__exit__(None, None, None)  # reads 4
    assert peak_of_first == a.peak.device_mib == 9
    assert b.peak.device_mib == 9


def test_the_thread_reads_at_the_interval_and_misses_a_shorter_spike() -> None:
    clock = Hands()
    asleep, wake = threading.Semaphore(0), threading.Semaphore(0)
    pauses = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        asleep.release()
        assert wake.acquire(timeout=10)
        clock.now += seconds

    class Spiky(RecordedNvml):
        def memory(self, uuid: str) -> tuple[int, int]:
            elapsed = clock.now - 100.0
            used = 4000 if 0.22 < elapsed < 0.28 else 1000 + 100 * round(elapsed / 0.1)
            return 12000 * MIB, (12000 - used) * MIB

    sampler = MemorySampler(0, nvml=lambda: Spiky((0, None)), clock=clock, sleep=sleep)
    with sampler:
        for _ in range(4):
            assert asleep.acquire(timeout=10)
            wake.release()
        assert asleep.acquire(timeout=10)
        seen = sampler.samples
        peak = sampler.peak.device_mib
        clock.now = 100.25
        in_the_spike = sampler.sample()
        sampler._stop.set()
        wake.release()
    assert [sample.seconds for sample in seen] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert [sample.device_mib for sample in seen] == [1000, 1100, 1200, 1300, 1400]
    assert peak == 1400
    assert pauses == [0.1] * 5
    assert in_the_spike.device_mib == sampler.peak.device_mib == 4000


def test_real_clock_and_thread() -> None:
    nvml = RecordedNvml((7, 3))
    with MemorySampler(0, interval=0.005, nvml=lambda: nvml) as sampler:
        limit = time.monotonic() + 10
        while len(sampler.samples) < 5:
            assert time.monotonic() < limit
            time.sleep(0.005)
        before_leaving = time.monotonic()
    assert time.monotonic() - before_leaving < 2
    seconds = [sample.seconds for sample in sampler.samples]
    assert seconds == sorted(seconds)
    assert sampler.peak.device_mib == 7
    count = len(sampler.samples)
    time.sleep(0.03)
    assert len(sampler.samples) == count


def test_failed_readings_leave_gaps_and_a_note() -> None:
    lost = RuntimeError("GPU is lost")
    nvml = RecordedNvml((100, 50), (200, 60), (lost, lost), (lost, lost), (150, 55))
    with sampling(nvml) as sampler, sampler.window() as case:
        sampler.sample()
        sampler.sample()
        in_the_middle = case.peak
    assert [sample.device_mib for sample in sampler.samples] == [100, 200, None, None, 150, 150]
    assert in_the_middle.device_mib == 200
    assert case.peak.device_mib == 200
    assert case.peak.process_mib == 60
    assert case.peak.gpu_note == "2 of 4 readings of the GPU's memory failed (GPU is lost)"
    assert sampler.peak.gpu_note == "2 of 6 readings of the GPU's memory failed (GPU is lost)"


def test_a_card_that_stays_away_is_left_in_peace() -> None:
    lost = RuntimeError("GPU is lost")
    nvml = RecordedNvml((100, 50), (lost, lost))
    with sampling(nvml) as sampler:
        for _ in range(3 * monitor.GIVE_UP_AFTER):
            sampler.sample()
        with sampler.window() as late:
            pass
    assert nvml.asked == 1 + monitor.GIVE_UP_AFTER
    assert sampler.peak.device_mib == 100
    assert late.peak.device_mib is None
    assert late.peak.process_mib is None
    assert late.peak.gpu_note is not None
    assert late.peak.gpu_note.startswith("2 of 2 readings of the GPU's memory failed (GPU is lost)")
    assert nvml.closed == 1


def test_failures_with_readings_in_between_do_not_end_the_asking() -> None:
    lost = RuntimeError("Timeout")
    pattern: list[tuple[float | Exception, float | None]] = [(lost, 1.0)] * (monitor.GIVE_UP_AFTER - 1) + [(5.0, 1.0)]
    nvml = RecordedNvml(*pattern * 3)
    with sampling(nvml) as sampler:
        for _ in range(len(pattern) * 3 - 1):
            sampler.sample()
    assert nvml.asked == len(pattern) * 3 + 1
    assert sum(sample.device_mib == 5 for sample in sampler.samples) == 4


def test_no_permission_to_see_processes() -> None:
    nvml = RecordedNvml((100, PermissionError("Insufficient Permissions")))
    with sampling(nvml) as sampler, sampler.window() as case:
        pass
    assert case.peak.device_mib == 100
    assert case.peak.process_mib is None
    assert case.peak.gpu_note == "this process's part is unknown (Insufficient Permissions)"


def test_a_process_that_the_driver_does_not_list() -> None:
    with sampling(RecordedNvml((100, None))) as sampler:
        pass
    assert sampler.peak.device_mib == 100
    assert sampler.peak.process_mib is None
    assert "does not list this process" in str(sampler.peak.gpu_note)


def test_a_run_on_the_cpu_never_opens_nvml() -> None:
    def opened() -> Nvml:
        raise AssertionError

    with MemorySampler(None, interval=NEVER, nvml=opened) as sampler, sampler.window() as case:
        pass
    assert sampler.reason == "the run uses no GPU"
    assert sampler.device_name is None
    assert (case.peak.device_mib, case.peak.process_mib) == (None, None)
    assert case.peak.gpu_note == "the run uses no GPU"
    assert case.peak.rss_mib is not None


def test_no_driver() -> None:
    def opened() -> Nvml:
        raise DeviceError("no NVIDIA driver answers here (NVML: Driver Not Loaded)")

    with MemorySampler(0, interval=NEVER, nvml=opened) as sampler:
        pass
    assert sampler.reason == sampler.peak.gpu_note == "no NVIDIA driver answers here (NVML: Driver Not Loaded)"
    assert all(sample.device_mib is None for sample in sampler.samples)


def test_a_card_that_is_not_there_closes_nvml() -> None:
    nvml = RecordedNvml((100, 50))
    with sampling(nvml, device=5) as sampler:
        pass
    assert "no cuda:5" in str(sampler.reason)
    assert nvml.asked == 0
    assert nvml.closed == 1


def test_nvml_that_fails_to_close_does_not_matter() -> None:
    class Sticky(RecordedNvml):
        def close(self) -> None:
            raise RuntimeError("Uninitialized")

    with sampling(Sticky((100, 50))) as sampler:
        pass
    assert sampler.peak.device_mib == 100


def test_a_driver_that_hangs_does_not_hold_the_run_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "LEAVE_AFTER_S", 0.05)
    hanging, released = threading.Event(), threading.Event()

    class Hanging(RecordedNvml):
        def memory(self, uuid: str) -> tuple[int, int]:
            if threading.current_thread().name == "fastorgan-memory":
                hanging.set()
                released.wait(10)
            return 12 * MIB, 2 * MIB

    begun = time.monotonic()
    with MemorySampler(0, interval=0.001, nvml=lambda: Hanging((0, None))) as sampler:
        assert hanging.wait(10)
    assert time.monotonic() - begun < 5
    assert sampler.peak.device_mib == 10
    released.set()


def test_a_sampler_runs_once_and_windows_need_it_running() -> None:
    sampler = MemorySampler(None, interval=NEVER)
    assert sampler.peak == MemoryPeak()
    with pytest.raises(RuntimeError, match="enter the MemorySampler"), sampler.window():
        pass
    with sampler:
        pass
    with pytest.raises(RuntimeError, match="only once"):
        sampler.__enter__()


# The adapter to nvidia-ml-py


class FakePynvml(ModuleType):
    """The part of the module `pynvml` that the adapter uses, for two cards and a driver without third versions."""

    class NVMLError(Exception):
        pass

    class NVMLError_FunctionNotFound(NVMLError):
        pass

    def __init__(self, processes: list[SimpleNamespace], third_version: bool = True) -> None:
        super().__init__("pynvml")
        self.processes = processes
        self.third_version = third_version
        self.calls: list[str] = []

    def nvmlInit(self) -> None:
        self.calls.append("init")

    def nvmlShutdown(self) -> None:
        self.calls.append("shutdown")

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return f"slice {uuid}"

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return CARDS[handle]

    def nvmlDeviceGetName(self, handle: int | str) -> str:
        return f"NVIDIA {handle}"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(total=24 * MIB, free=(20 - handle) * MIB, used=1 * MIB)

    def nvmlDeviceGetComputeRunningProcesses_v3(self, handle: int) -> list[SimpleNamespace]:
        self.calls.append("v3")
        if not self.third_version:
            raise self.NVMLError_FunctionNotFound
        return self.processes

    def nvmlDeviceGetComputeRunningProcesses_v2(self, handle: int) -> list[SimpleNamespace]:
        self.calls.append("v2")
        return self.processes


def process(pid: int, used: int | None) -> SimpleNamespace:
    return SimpleNamespace(pid=pid, usedGpuMemory=used)


def test_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakePynvml([process(41, 5 * MIB), process(42, 3 * MIB), process(42, 2 * MIB), process(43, None)])
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    nvml = PyNvml()
    assert nvml.uuids() == list(CARDS[:2])
    assert nvml.name(CARDS[1]) == "NVIDIA 1"
    assert nvml.name("MIG-77") == "NVIDIA slice MIG-77"
    assert nvml.memory(CARDS[1]) == (24 * MIB, 19 * MIB)
    assert nvml.process_memory(CARDS[0], 42) == 5 * MIB
    assert nvml.process_memory(CARDS[0], 43) is None  # the driver hides the amount
    assert nvml.process_memory(CARDS[0], 44) is None  # not on the list
    nvml.close()
    assert fake.calls == ["init", "v3", "v3", "v3", "shutdown"]


def test_adapter_takes_a_process_without_memory_for_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakePynvml([process(42, 0)]))
    nvml = PyNvml()
    assert nvml.process_memory(nvml.uuids()[0], 42) is None


def test_adapter_falls_back_to_the_second_version(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakePynvml([process(42, MIB)], third_version=False)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    nvml = PyNvml()
    uuid = nvml.uuids()[0]
    assert nvml.process_memory(uuid, 42) == nvml.process_memory(uuid, 42) == MIB
    assert fake.calls == ["init", "v3", "v2", "v2"]


def test_sampler_through_the_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakePynvml([process(os.getpid(), 2 * MIB)]))
    with MemorySampler(1, interval=NEVER) as sampler:
        pass
    assert sampler.device_name == "NVIDIA 1"
    # Total minus free, 24 - 19, and not the bindings' own "used".
    assert (sampler.peak.device_mib, sampler.peak.process_mib) == (5, 2)


def test_adapter_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakePynvml([])

    def fail() -> None:
        raise fake.NVMLError("Driver Not Loaded")

    monkeypatch.setattr(fake, "nvmlInit", fail)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    with MemorySampler(0, interval=NEVER) as sampler:
        pass
    assert sampler.reason == "no NVIDIA driver answers here (NVML: Driver Not Loaded)"


def test_adapter_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with MemorySampler(0, interval=NEVER) as sampler:
        pass
    assert sampler.reason == "the package nvidia-ml-py is not installed"


def test_the_names_that_the_adapter_uses_exist() -> None:
    pynvml = pytest.importorskip("pynvml")
    used = [name for name in vars(FakePynvml) if name.startswith(("nvml", "NVML"))]
    assert len(used) == 12
    assert all(hasattr(pynvml, name) for name in used)


@pytest.mark.gpu
def test_a_real_card() -> None:
    with MemorySampler(0, interval=0.01) as sampler:
        time.sleep(0.1)
    if sampler.reason is not None:
        pytest.skip(sampler.reason)
    assert sampler.device_name
    assert sampler.peak.device_mib is not None


# Resident memory


def status(proc: Path, **kib: int) -> None:
    (proc / "status").write_text("Name:\tx\n" + "".join(f"{key}:\t{value:8} kB\n" for key, value in kib.items()))


def test_resident_memory_from_proc(tmp_path: Path) -> None:
    status(tmp_path, VmPeak=9999, VmHWM=3072, VmRSS=1536)
    resident = ResidentMemory(tmp_path)
    assert resident.read() == (1.5, 3.0)
    assert resident.restart() == 3.0  # no clear_refs there: the mark stays
    assert not (tmp_path / "clear_refs").exists()
    (tmp_path / "clear_refs").write_text("")
    assert resident.restart() == 3.0
    assert (tmp_path / "clear_refs").read_text() == "5"


def test_resident_memory_without_proc(tmp_path: Path) -> None:
    present, highest = ResidentMemory(tmp_path).read()
    assert present is None
    assert highest is not None
    assert highest > 5
    status(tmp_path)  # a status without the two lines
    assert ResidentMemory(tmp_path).read()[0] is None


def test_maxrss_units() -> None:
    assert monitor._maxrss_to_mib(3 * MIB, "darwin") == 3
    assert monitor._maxrss_to_mib(3 * 1024, "linux") == 3


def test_the_mark_is_restarted_for_each_window_and_kept_for_the_run() -> None:
    rss = RecordedRss(present=200, highest=900)  # 900 before the sampler began
    with sampling(RecordedNvml((0, 0)), device=None, resident=rss) as sampler:
        with sampler.window() as a:
            rss.highest = 500  # a spike that no reading saw
        rss.highest = 700  # between the windows
        rss.present = 150
        with sampler.window() as b:
            pass
    assert a.peak.rss_mib == 500
    assert b.peak.rss_mib == 150
    assert sampler.peak.rss_mib == 900


def test_restarting_for_an_inner_window_takes_nothing_from_the_outer() -> None:
    rss = RecordedRss(present=100, highest=100)
    with sampling(RecordedNvml((0, 0)), device=None, resident=rss) as sampler, sampler.window() as outer:
        rss.highest = 800
        with sampler.window() as inner:
            rss.highest = 300
    assert outer.peak.rss_mib == 800
    assert inner.peak.rss_mib == 300
    assert sampler.peak.rss_mib == 800


def test_without_the_right_to_restart_the_mark_counts_only_if_it_rises() -> None:
    rss = RecordedRss(present=200, highest=900, restarts=False)
    with sampling(RecordedNvml((0, 0)), device=None, resident=rss) as sampler:
        with sampler.window() as a:
            rss.present = 450
            sampler.sample()
            rss.present = 210
        with sampler.window() as b:
            rss.highest = 950
    assert a.peak.rss_mib == 450
    assert b.peak.rss_mib == 950
    assert sampler.peak.rss_mib == 950


def test_a_system_that_knows_only_the_mark() -> None:
    rss = RecordedRss(present=0, highest=400, restarts=False)
    rss.present = None
    with sampling(RecordedNvml((0, 0)), device=None, resident=rss) as sampler:
        with sampler.window() as a:
            pass
        with sampler.window() as b:
            rss.highest = 500
    assert a.peak.rss_mib is None
    assert b.peak.rss_mib == 500
    assert sampler.peak.rss_mib == 500


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_short_allocation_is_seen_by_the_real_mark() -> None:
    with MemorySampler(None, interval=NEVER) as sampler:
        with sampler.window() as first:
            before = sampler.sample().rss_mib
            np.ones(2**24, dtype=np.float64)  # 128 MiB, touched and freed between two readings
        with sampler.window() as second:
            pass
    assert before is not None
    assert first.peak.rss_mib is not None
    assert second.peak.rss_mib is not None
    assert sampler.peak.rss_mib is not None
    assert second.peak.rss_mib < before + 64
    assert sampler.peak.rss_mib >= first.peak.rss_mib
    # Where the mark can neither be restarted nor rises, the readings alone count.
    if peak_rss_mib() == pytest.approx(second.peak.rss_mib, abs=16):
        assert first.peak.rss_mib > before + 100


def test_peak_rss_is_that_of_this_process_and_not_of_its_parent() -> None:
    ballast = np.ones(2**24, dtype=np.float64)  # 128 MiB in the parent
    answer = python("from fastorgan.monitor import peak_rss_mib; print(peak_rss_mib())")
    assert 1 < float(answer) < ballast.nbytes / MIB


# The rest


def python(code: str) -> str:
    app = str(Path(fastorgan.__file__).parents[1])
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env=os.environ | {"PYTHONPATH": app}, capture_output=True, text=True, check=True
    ).stdout


def test_importing_loads_no_engine_and_no_nvml() -> None:
    code = "import sys, fastorgan.monitor; print(sorted({'torch', 'openvino', 'pynvml', 'numpy'} & set(sys.modules)))"
    assert python(code).strip() == "[]"


def test_cpu_name() -> None:
    assert cpu_name().strip() == cpu_name() != ""
