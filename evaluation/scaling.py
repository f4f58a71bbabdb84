"""Cost against the number of slices and of threads: one process for each, and a plot."""

import csv
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from .benchmark import run_process
from .efficiency import load_plotting
from .stretched import stretch


@dataclass(frozen=True)
class Point:
    """One process.

    Attributes:
        slices: of the CT.
        threads: as `--threads` has them.
        seconds: from its start to its end.
        cpu_seconds: processor time.
        rss_mb: its highest resident memory in MB.
        case_seconds: of the same case by a process that has everything loaded.
    """

    slices: int
    threads: int
    seconds: float
    cpu_seconds: float
    rss_mb: float
    case_seconds: float


def measure_scaling(ct: Path, slices: Sequence[int], threads: Sequence[int], runs: int) -> Iterator[Point]:
    """Stretch a CT to each number of slices and measure each number of threads; the fastest of `runs` each.

    Raises:
        BenchmarkError: if a process fails.
        VolumeError: if the CT cannot be opened.
    """
    with tempfile.TemporaryDirectory(prefix="fastorgan-benchmark-") as folder:
        inputs, report = Path(folder) / "cases", Path(folder) / "run.json"
        inputs.mkdir()
        source = inputs / "0.nii.gz"
        (inputs / "1.nii.gz").symlink_to(source)
        for count in slices:
            stretch(ct, source, count)
            for number in threads:
                command = [sys.executable, "-m", "fastorgan", "predict", "--threads", str(number), "--jobs", "1"]
                command += ["--report", str(report)]
                cold = [run_process([*command, str(source), str(Path(folder) / "a.nii.gz")]) for _ in range(runs)]
                warm = []
                for _ in range(runs):
                    run_process([*command, str(inputs), str(Path(folder) / "out")])
                    warm.append(json.loads(report.read_text(encoding="ascii"))["cases"][1]["total_seconds"])
                yield Point(
                    count,
                    number,
                    min(run.seconds for run in cold),
                    min(run.cpu_seconds for run in cold),
                    max(run.rss_mb for run in cold),
                    min(warm),
                )


def write_points(points: Sequence[Point], path: Path) -> None:
    """Write the points as CSV."""
    with path.open("w", newline="", encoding="ascii") as file:
        writer = csv.writer(file)
        writer.writerow(field.name for field in fields(Point))
        writer.writerows([round(value, 3) for value in astuple(point)] for point in points)


def plot_points(points: Sequence[Point], path: Path) -> None:
    """Plot seconds and memory against slices, a line for each number of threads."""
    figure_of, canvas_of = load_plotting()
    figure = figure_of(figsize=(10, 3.6), layout="constrained")
    canvas_of(figure)
    time_axes, cpu_axes, memory_axes = figure.subplots(1, 3)
    for colour, threads in zip(("#3b6ea5", "#c8553d", "#5a8f5a", "#8a6bb1"), _threads(points), strict=False):
        line = [point for point in points if point.threads == threads]
        x = [point.slices for point in line]
        name = f"{threads} thread{'s' if threads > 1 else ''}"
        time_axes.plot(x, [point.seconds for point in line], "o-", color=colour, label=f"{name}, process")
        time_axes.plot(x, [point.case_seconds for point in line], "o--", color=colour, label=f"{name}, warm case")
        cpu_axes.plot(x, [point.cpu_seconds for point in line], "o-", color=colour, label=name)
        memory_axes.plot(x, [point.rss_mb for point in line], "o-", color=colour, label=name)
    x = sorted({point.slices for point in points})
    memory_axes.plot(x, [count * 512 * 512 * 2 / 1e6 for count in x], ":", color="grey", label="the volume, int16")
    for axes, title in (
        (time_axes, "wall time, s"),
        (cpu_axes, "processor time of the process, s"),
        (memory_axes, "peak RSS, MB"),
    ):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("slices of 512 x 512")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def _threads(points: Sequence[Point]) -> list[int]:
    return sorted({point.threads for point in points})
