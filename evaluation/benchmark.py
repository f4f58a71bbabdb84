"""Time and memory of `fastorgan predict` on one CT, beside the straightforward way in the same run.

Every measurement is a process of its own, timed from its start to its end, fastorgan and `reference` in turns, so that
a machine that is busy for a while slows both. Warm cases are the second and later ones of one `predict` process.
"""

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from fastorgan.errors import FastorganError
from fastorgan.files import whole_file
from fastorgan.labels import ORGANS
from fastorgan.monitor import MIB, ResidentMemory, cpu_name
from fastorgan.runtime import usable_cores
from fastorgan.volume import load_image

from .accuracy import dsc, read_labels

MB = 1e6

WATCH_EVERY_S = 0.01
"""How often a process' memory is read: what it takes for shorter before its end is missed."""


class BenchmarkError(FastorganError):
    """A measured process failed."""


@dataclass(frozen=True)
class Run:
    """One process.

    Attributes:
        seconds: wall time from its start to its end.
        cpu_seconds: processor time, of all its threads; hardly changed by other work on the machine.
        rss_mb: its highest resident memory in MB (10^6 bytes).
        said: standard output.
    """

    seconds: float
    cpu_seconds: float
    rss_mb: float
    said: str


def run_process(command: Sequence[str]) -> Run:
    """Run a command to its end and measure it.

    Raises:
        BenchmarkError: if it exits with another code than 0.
    """
    # Files, not pipes: nobody reads while it runs.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        begun = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=errors)
        with _WatchedMemory(process.pid) as memory:
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - begun
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        errors.seek(0)
        if process.returncode != 0:
            last = errors.read().decode(errors="replace").strip().splitlines()[-1:]
            raise BenchmarkError(f"{shlex.join(command)}: exit code {process.returncode} {' '.join(last)}".rstrip())
        unit = 1 if sys.platform == "darwin" else 1024
        rss = memory.highest_mib * MIB or usage.ru_maxrss * unit
        return Run(seconds, usage.ru_utime + usage.ru_stime, rss / MB, out.read().decode())


class _WatchedMemory:
    """The highest resident memory of another process while the block runs, by its own mark.

    `wait4` tells no less than what the process that started it once held, and misses what `MemorySampler` set back.
    """

    def __init__(self, pid: int):
        self.highest_mib = 0.0
        self._memory = ResidentMemory(Path(f"/proc/{pid}"))
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(WATCH_EVERY_S):
            present, highest = self._memory.read()
            # Without a present figure the process has ended, or the system does not tell.
            if present is not None and highest is not None:
                self.highest_mib = max(self.highest_mib, highest)


@dataclass
class Samples:
    """What one program took, run by run.

    Attributes:
        cold: whole processes, one case each.
        warm: seconds of a case with everything loaded.
        stages: seconds by stage of the warm cases.
        gpu_mib: the highest memory of the whole card, where a card was used.
    """

    cold: list[Run] = field(default_factory=list)
    warm: list[float] = field(default_factory=list)
    stages: dict[str, list[float]] = field(default_factory=dict)
    gpu_mib: list[float] = field(default_factory=list)

    def add_warm(self, seconds: float, stages: Mapping[str, float]) -> None:
        """Take in one warm case."""
        self.warm.append(seconds)
        for stage, value in stages.items():
            self.stages.setdefault(stage, []).append(value)

    def to_dict(self) -> dict[str, Any]:
        """All readings, as JSON has them."""
        return {
            "cold_seconds": [run.seconds for run in self.cold],
            "cold_cpu_seconds": [run.cpu_seconds for run in self.cold],
            "rss_mb": [run.rss_mb for run in self.cold],
            "gpu_mib": self.gpu_mib,
            "warm_seconds": self.warm,
            "warm_stages": self.stages,
        }


@dataclass(frozen=True)
class Result:
    """A benchmark of one CT.

    Attributes:
        ct: the file.
        shape: its voxels.
        engine: what ran fastorgan's networks, as the run report has it.
        ours, reference: the readings; no reference where it was left out.
        agreement: DSC between the labels of the two by organ.
    """

    ct: Path
    shape: tuple[int, ...]
    engine: Mapping[str, Any]
    ours: Samples
    reference: Samples | None
    agreement: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """The whole of it, as JSON has it."""
        return {
            "ct": self.ct.name,
            "shape": list(self.shape),
            "bytes": self.ct.stat().st_size,
            "machine": {
                "cpu": cpu_name(),
                "cores": usable_cores(),
                "load": os.getloadavg()[0],
                "system": platform.platform(),
                "python": platform.python_version(),
            },
            "engine": dict(self.engine),
            "fastorgan": self.ours.to_dict(),
            "reference": None if self.reference is None else self.reference.to_dict(),
            "agreement": dict(self.agreement),
        }

    def write(self, path: Path) -> None:
        """Write `to_dict` as JSON.

        Raises:
            BenchmarkError: if the file cannot be written.
        """
        try:
            with whole_file(path, ".json") as partial:
                partial.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="ascii")
        except OSError as error:
            raise BenchmarkError(f"{path}: cannot be written ({error.strerror or error})") from error

    def text(self) -> str:
        """A table: medians, lowest and highest of each, and how many times as much the reference takes."""
        engine = f"{self.engine['name']} {self.engine['version']} {self.engine['precision']}"
        size = f"{' x '.join(map(str, self.shape))}, {self.ct.stat().st_size / MB:.1f} MB"
        lines = [
            f"{self.ct.name}: {size}; {cpu_name()}, {usable_cores()} cores, load {os.getloadavg()[0]:.1f}",
            f"{engine}, {self.engine['threads']} threads, {self.engine['device_name']}; "
            f"medians of {len(self.ours.cold)} runs (lowest to highest)",
            f"{'':24}{'fastorgan':>24}{'reference':>26}{'ratio':>9}",
        ]

        def row(name: str, ours: Sequence[float], theirs: Sequence[float], form: str) -> None:
            ratio = f"{statistics.median(theirs) / statistics.median(ours):8.1f}x" if theirs and ours else ""
            lines.append(f"{name:24}{_spread(ours, form):>24}{_spread(theirs, form):>26}{ratio}".rstrip())

        ours, other = self.ours, self.reference or Samples()
        row("process, s", _seconds(ours), _seconds(other), ".2f")
        row("  processor time, s", _cpu(ours), _cpu(other), ".2f")
        row("peak RSS, MB", _rss(ours), _rss(other), ".0f")
        row("GPU, MiB (whole card)", ours.gpu_mib, other.gpu_mib, ".0f")
        row("warm case, s", ours.warm, other.warm, ".2f")
        for stage in ours.stages:
            row(f"  {stage}", ours.stages[stage], other.stages.get(stage, ()), ".3f")
        if self.agreement:
            shown = ", ".join(f"{name} {100 * value:.1f}" for name, value in self.agreement.items())
            lines.append(f"DSC of the two programs' labels, %: {shown}")
        return "\n".join(lines)


def benchmark(ct: Path, runs: int, options: Sequence[str] = (), *, reference: bool = True) -> Result:
    """Measure fastorgan on one CT, and the reference in turns with it.

    Args:
        ct: the file.
        runs: of each program; fastorgan's warm cases are as many.
        options: of `fastorgan predict`, such as `--device cuda`.
        reference: whether the straightforward way is run as well.

    Raises:
        BenchmarkError: if a process fails.
        VolumeError: if the CT cannot be opened.
    """
    shape = load_image(ct).shape
    ours, other = Samples(), Samples()
    engine: Mapping[str, Any] = {}
    agreement: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="fastorgan-benchmark-") as folder:
        labels, plain, report = Path(folder) / "a.nii.gz", Path(folder) / "b.nii.gz", Path(folder) / "run.json"
        predict = [sys.executable, "-m", "fastorgan", "predict"]
        for _ in range(runs):
            ours.cold.append(
                run_process([*predict, str(ct.absolute()), str(labels), "--report", str(report), *options])
            )
            peak = json.loads(report.read_text(encoding="ascii"))["memory"]["gpu_peak_mib"]
            if peak is not None:
                ours.gpu_mib.append(peak)
            if reference:
                run = run_process([sys.executable, "-m", "evaluation.reference", str(ct.absolute()), str(plain)])
                other.cold.append(run)
                said = json.loads(run.said)
                other.add_warm(said["case"], said["stages"])
        inputs = Path(folder) / "cases"
        inputs.mkdir()
        for number in range(runs + 1):
            (inputs / f"{number:03}{''.join(ct.suffixes[-2:])}").symlink_to(ct.absolute())
        command = [*predict, str(inputs), str(Path(folder) / "out"), "--jobs", "1", "--report", str(report), *options]
        run_process(command)
        written = json.loads(report.read_text(encoding="ascii"))
        engine = written["engine"]
        for case in written["cases"][1:]:
            ours.add_warm(case["total_seconds"], case["seconds"])
        if reference:
            first, second = (read_labels(path).array for path in (labels, plain))
            agreement = {organ.name: dsc(second == organ.code, first == organ.code) for organ in ORGANS}
    return Result(ct, shape, engine, ours, other if reference else None, agreement)


def _seconds(samples: Samples) -> list[float]:
    return [run.seconds for run in samples.cold]


def _cpu(samples: Samples) -> list[float]:
    return [run.cpu_seconds for run in samples.cold]


def _rss(samples: Samples) -> list[float]:
    return [run.rss_mb for run in samples.cold]


def _spread(values: Sequence[float], form: str) -> str:
    if not values:
        return "-"
    return f"{statistics.median(values):{form}} ({min(values):{form}}-{max(values):{form}})"


@dataclass(frozen=True)
class Throughput:
    """Cases a minute of one `predict` on a folder.

    Attributes:
        cases: how many.
        rates: by `--jobs` the cases a minute of each run, loading apart.
        rss_mb: by `--jobs` the highest resident memory.
    """

    cases: int
    rates: Mapping[int, Sequence[float]]
    rss_mb: Mapping[int, Sequence[float]]

    def text(self) -> str:
        """A table with the rates against those of `--jobs 1`."""
        lines = [f"{'jobs':>4}{'cases a minute':>28}{'against one':>13}{'peak RSS, MB':>24}"]
        one = statistics.median(self.rates[1])
        for jobs, rates in self.rates.items():
            ratio = f"{statistics.median(rates) / one:.2f}x"
            lines.append(f"{jobs:4}{_spread(rates, '.1f'):>28}{ratio:>13}{_spread(self.rss_mb[jobs], '.0f'):>24}")
        return "\n".join(lines)


def throughput(
    cts: Sequence[Path], cases: int, runs: int, jobs: Sequence[int], options: Sequence[str] = ()
) -> Throughput:
    """Measure how many cases a minute `predict` does on a folder, by its `--jobs`.

    Args:
        cts: the cases, taken round and round.
        cases: in the folder.
        runs: for each number of jobs, in turns.
        jobs: numbers to try; 1 is always among them.
        options: of `fastorgan predict`.

    Raises:
        BenchmarkError: if a process fails.
    """
    tried = sorted({1, *jobs})
    rates: dict[int, list[float]] = {number: [] for number in tried}
    rss: dict[int, list[float]] = {number: [] for number in tried}
    with tempfile.TemporaryDirectory(prefix="fastorgan-benchmark-") as folder:
        inputs, report = Path(folder) / "cases", Path(folder) / "run.json"
        inputs.mkdir()
        for number in range(cases):
            ct = cts[number % len(cts)].absolute()
            (inputs / f"{number:03}{''.join(ct.suffixes[-2:])}").symlink_to(ct)
        command = [sys.executable, "-m", "fastorgan", "predict", str(inputs), str(Path(folder) / "out")]
        for _ in range(runs):
            for number in tried:
                run = run_process([*command, "--jobs", str(number), "--report", str(report), *options])
                written = json.loads(report.read_text(encoding="ascii"))
                rates[number].append(60 * cases / (written["total_seconds"] - written["load_seconds"]))
                rss[number].append(run.rss_mb)
    return Throughput(cases, rates, rss)
