"""Time and resources of a program's runs, as the FLARE challenges put them in figures, files and plots.

The formulas, columns and roundings are those of JunMa11/FLARE: `load_json.py` of FLARE21, FLARE22 and FLARE24, whose
file is FLARE23's too. What these files call MB is MiB.
"""

import csv
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastorgan.errors import FastorganError
from fastorgan.monitor import INTERVAL_S

if TYPE_CHECKING:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

STABLE_SHARE = 0.02
"""A reading counts as stable if its exact value makes up more than this share of all readings (FLARE21, FLARE22)."""

IDLE_OFFSET_S = 0.1
"""Added to the CPU seconds that the idle share is taken of (FLARE22); see `Reading.cpu_percent`."""

NOT_RUN = 125
"""Exit code of `docker container run` where Docker itself failed, so that the program never ran."""

HUNG_TIME_S = 3600.0
HUNG_GPU_AUC_MIB_S = HUNG_TIME_S * (10 * 1024 - 2048)
HUNG_CPU_AUC_PERCENT_S = HUNG_TIME_S * 100
"""What a case counts whose container had to be stopped (https://flare22.grand-challenge.org/Evaluation/)."""


class EfficiencyError(FastorganError):
    """Measurements cannot be written."""


@dataclass(frozen=True)
class Reading:
    """One reading of the whole host, whoever uses it.

    Attributes:
        seconds: since the sampling began.
        gpu_mib: total minus free memory of the card in MiB; None if it was not read.
        user_s, system_s, idle_s: CPU seconds since the reading before, summed over all cores. Neither niced programs
            nor waiting for a disk count, as in FLARE22.
        ram_mib: memory in use in MiB, as psutil counts it.
    """

    seconds: float
    gpu_mib: float | None
    user_s: float
    system_s: float
    idle_s: float
    ram_mib: float

    @property
    def cpu_percent(self) -> float:
        """CPU utilisation of the whole host in percent, by FLARE22's formula.

        It is 100 minus the idle seconds' share, and 0.1 s is added to the sum that the share is taken of. An idle host
        of n cores read every 0.1 s therefore shows 100 / (n + 1), not 0, and one without any time between two
        readings 100.
        """
        total = sum((self.user_s, self.system_s, self.idle_s))
        return 100 - 100.0 * self.idle_s / (total + IDLE_OFFSET_S)


def stable_maximum(values: Sequence[float]) -> float:
    """Compute FLARE21's maximum: the largest value that occurs, exactly, in more than 2 % of all readings.

    Where none does, which stops the organisers' script, it is the plain maximum, FLARE23's rule. 0.0 without readings.
    """
    stable = [value for value, count in Counter(values).items() if count > STABLE_SHARE * len(values)]
    return max(stable or values, default=0.0)


def area(values: Iterable[float]) -> float:
    """Compute the area under a curve as FLARE does: the sum of the readings times 0.1 s; 0.0 without readings.

    The true interval is longer, by what the reading itself takes.
    """
    return sum(values) * INTERVAL_S


@dataclass(frozen=True)
class Measurement:
    """One container run on one case.

    Attributes:
        case: name of the input file without suffix, so with its _0000.
        command: the command line, its two folders called inputs and outputs.
        seconds: wall time from before `docker container run` until it has returned.
        readings: in the order of time; those of the GPU's memory may be missing.
        exit_code: of the container; None if it was stopped at the time limit.
        gpu_note: why readings of the GPU's memory are missing; None if none is.
        problems: what went wrong, a phrase each.
    """

    case: str
    command: str
    seconds: float
    readings: tuple[Reading, ...]
    exit_code: int | None
    gpu_note: str | None = None
    problems: tuple[str, ...] = ()

    @property
    def ran(self) -> bool:
        """Whether there was a container to be measured."""
        return self.exit_code != NOT_RUN

    @property
    def hung(self) -> bool:
        """Whether the container was stopped; time and areas are then FLARE22's penalties."""
        return self.exit_code is None

    @property
    def time_s(self) -> float:
        """Wall time in s."""
        return HUNG_TIME_S if self.hung else self.seconds

    @property
    def gpu_mib(self) -> tuple[float, ...]:
        """Readings of the GPU's memory in MiB, without the missing ones."""
        return tuple(reading.gpu_mib for reading in self.readings if reading.gpu_mib is not None)

    @property
    def gpu_stable_mib(self) -> float:
        """Stable maximum of the GPU's memory in MiB; 0.0 if it was never read."""
        return stable_maximum(self.gpu_mib)

    @property
    def gpu_max_mib(self) -> float:
        """Plain maximum of the GPU's memory in MiB; 0.0 if it was never read."""
        return max(self.gpu_mib, default=0.0)

    @property
    def gpu_auc_mib_s(self) -> float:
        """Area under the GPU's memory in MiB·s; 0.0 if it was never read."""
        return HUNG_GPU_AUC_MIB_S if self.hung else area(self.gpu_mib)

    @property
    def cpu_max_percent(self) -> float:
        """Maximum of the CPU utilisation in percent."""
        return max((reading.cpu_percent for reading in self.readings), default=0.0)

    @property
    def cpu_auc_percent_s(self) -> float:
        """Area under the CPU utilisation in %·s."""
        return HUNG_CPU_AUC_PERCENT_S if self.hung else area(reading.cpu_percent for reading in self.readings)

    @property
    def ram_max_mib(self) -> float:
        """Maximum of the host's memory in use in MiB."""
        return max((reading.ram_mib for reading in self.readings), default=0.0)

    @property
    def ram_auc_mib_s(self) -> float:
        """Area under the host's memory in use in MiB·s."""
        return area(reading.ram_mib for reading in self.readings)

    def to_dict(self) -> dict[str, object]:
        """Return figures and raw readings as JSON has them; the wall time is the true one also of a stopped run."""
        return {
            "case": self.case,
            "command": self.command,
            "exit_code": self.exit_code,
            "hung": self.hung,
            "problems": list(self.problems),
            "wall_time_s": round(self.seconds, 4),
            "gpu_note": self.gpu_note,
            "gpu_memory_stable_max_mib": self.gpu_stable_mib,
            "gpu_memory_max_mib": self.gpu_max_mib,
            "gpu_memory_auc_mib_s": self.gpu_auc_mib_s,
            "cpu_utilisation_max_percent": self.cpu_max_percent,
            "cpu_utilisation_auc_percent_s": self.cpu_auc_percent_s,
            "ram_max_mib": self.ram_max_mib,
            "ram_auc_mib_s": self.ram_auc_mib_s,
            "readings": {
                "interval_s": INTERVAL_S,
                "time_s": [round(reading.seconds, 4) for reading in self.readings],
                "gpu_memory_mib": [reading.gpu_mib for reading in self.readings],
                "cpu_utilisation_percent": [reading.cpu_percent for reading in self.readings],
                "cpu_user_s": [reading.user_s for reading in self.readings],
                "cpu_system_s": [reading.system_s for reading in self.readings],
                "cpu_idle_s": [reading.idle_s for reading in self.readings],
                "ram_mib": [reading.ram_mib for reading in self.readings],
            },
        }


@dataclass(frozen=True)
class Layout:
    """A challenge's efficiency file.

    Attributes:
        name: of the challenge.
        header: its columns.
        row: computes a case's cells.
    """

    name: str
    header: tuple[str, ...]
    row: Callable[[Measurement], list[str | float]]


def _rounded_row(run: Measurement, gpu_mib: float) -> list[str | float]:
    # NumPy's rounding, not Python's: they differ in the last digit, and the organisers' is NumPy's.
    return [
        f"{run.case}.nii.gz",
        float(np.round(run.time_s, 2)),
        float(np.round(gpu_mib)),
        float(np.round(run.gpu_auc_mib_s)),
        float(np.round(run.cpu_max_percent, 2)),
        float(np.round(run.cpu_auc_percent_s, 2)),
        float(np.round(run.ram_max_mib, 2)),
        float(np.round(run.ram_auc_mib_s)),
    ]


FLARE21 = Layout(
    "flare21",
    ("name", "time", "gpu_memory", "time_multiply_memory"),
    lambda run: [run.case, run.time_s, run.gpu_stable_mib, run.gpu_auc_mib_s],
)
"""Nothing is rounded and the name has no suffix. GPU memory is the stable maximum."""

FLARE22 = Layout(
    "flare22",
    ("Name", "Time", "GPU_Mem", "AUC_GPU_Time", "CPU_Utilization", "AUC_CPU_Time", "RAM", "AUC_RAM_Time"),
    lambda run: _rounded_row(run, run.gpu_stable_mib),
)
"""GPU memory is the stable maximum."""

FLARE23 = Layout(
    "flare23",
    ("Name", "Time", "MaxGPU_Mem", "AUC_GPU_Time", "MaxCPU_Utilization", "AUC_CPU_Time", "MaxRAM", "AUC_RAM_Time"),
    lambda run: _rounded_row(run, run.gpu_max_mib),
)
"""Also FLARE24's. GPU memory is the plain maximum."""

LAYOUTS = (FLARE21, FLARE22, FLARE23)


def write_csv(runs: Iterable[Measurement], layout: Layout, path: Path) -> None:
    """Write measurements as the challenge's CSV file; only the header without any.

    Raises:
        EfficiencyError: if the file cannot be written.
    """
    try:
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(layout.header)
            writer.writerows(layout.row(run) for run in runs)
    except OSError as error:
        raise EfficiencyError(f"{path}: cannot be written ({error.strerror})") from error


def write_json(run: Measurement, path: Path) -> None:
    """Write a run's figures and raw readings; every key ends in its unit.

    Raises:
        EfficiencyError: if the file cannot be written.
    """
    try:
        path.write_text(json.dumps(run.to_dict(), indent=1, allow_nan=False) + "\n", encoding="ascii")
    except OSError as error:
        raise EfficiencyError(f"{path}: cannot be written ({error.strerror})") from error


def load_plotting() -> "tuple[type[Figure], type[FigureCanvasAgg]]":
    """Import what `plot` needs: a figure, and the canvas that needs no display.

    Raises:
        EfficiencyError: if matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise EfficiencyError("matplotlib is not installed; pip install 'fastorgan[evaluation]'") from error
    return Figure, FigureCanvasAgg


def plot(run: Measurement, path: Path) -> None:
    """Draw GPU memory, RAM and CPU utilisation against time as a PNG; no panel for a GPU that was never read.

    Raises:
        EfficiencyError: if matplotlib is not installed or the file cannot be written.
    """
    figure_type, canvas_type = load_plotting()
    panels: list[tuple[str, list[float]]] = [
        ("RAM in use (MiB)", [reading.ram_mib for reading in run.readings]),
        ("CPU utilisation (%)", [reading.cpu_percent for reading in run.readings]),
    ]
    if run.gpu_mib:
        gpu = [np.nan if reading.gpu_mib is None else reading.gpu_mib for reading in run.readings]
        panels.insert(0, ("GPU memory in use (MiB)", gpu))
    figure = figure_type(figsize=(8.0, 2.2 * len(panels) + 0.6), layout="constrained")
    canvas_type(figure)
    axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    times = [reading.seconds for reading in run.readings]
    for axis, (label, values) in zip(axes, panels, strict=True):
        axis.plot(times, values)
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("time (s)")
    title = f"{run.case}: {run.seconds:.1f} s" + (", stopped" if run.hung else "")
    if run.gpu_note is not None:
        title += f"\nGPU: {run.gpu_note}"
    # A file name may have dollar signs, which are no formula.
    figure.suptitle(title, fontsize="medium", parse_math=False, wrap=True)
    try:
        figure.savefig(path, dpi=100)
    except OSError as error:
        raise EfficiencyError(f"{path}: cannot be written ({error.strerror})") from error


@dataclass(frozen=True)
class Table:
    """FLARE22's figures as text, a line a case, in the units that the CSV files leave out.

    Attributes:
        cases: their names, for the first column's width.
    """

    cases: Collection[str]

    def header(self) -> str:
        """The line that names the columns."""
        return self._line("case", _TITLES)

    def row(self, run: Measurement) -> str:
        """One case's line."""
        return self._numbers(run.case, _figures(run))

    def mean(self, runs: Sequence[Measurement]) -> str:
        """The means over one or more cases."""
        return self._numbers("mean", [float(np.mean(column)) for column in zip(*map(_figures, runs), strict=True)])

    def _numbers(self, name: str, values: Iterable[float]) -> str:
        return self._line(name, (f"{value:.{digits}f}" for value, digits in zip(values, _DIGITS, strict=True)))

    def _line(self, name: str, cells: Iterable[str]) -> str:
        width = max(len("case"), len("mean"), *map(len, self.cases))
        return "  ".join((name.ljust(width), *(cell.rjust(len(t)) for cell, t in zip(cells, _TITLES, strict=True))))


_TITLES = ("  time s", "GPU max MiB", " GPU MiB·s", "CPU max %", "  CPU %·s", "RAM max MiB", "  RAM MiB·s")
_DIGITS = (2, 0, 0, 1, 0, 0, 0)


def _figures(run: Measurement) -> tuple[float, ...]:
    return (
        run.time_s,
        run.gpu_stable_mib,
        run.gpu_auc_mib_s,
        run.cpu_max_percent,
        run.cpu_auc_percent_s,
        run.ram_max_mib,
        run.ram_auc_mib_s,
    )
