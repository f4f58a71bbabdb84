"""The run report: what was done to each case, how long it took and what it needed; `docs/report.md` has every key."""

import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import __version__
from .errors import FastorganError
from .files import whole_file
from .labels import ORGANS
from .monitor import MemoryPeak

if TYPE_CHECKING:
    from .organ_statistics import OrganStatistics

SCHEMA_VERSION = 1
"""Rises when a key is renamed, removed or changes its meaning; new keys leave it as it is."""

NOTICE = "fastorgan is not a medical device: not for diagnosis or treatment."


@dataclass(frozen=True)
class OrganMeasure:
    """One organ in a label map.

    Attributes:
        volume_ml: voxels times their volume, in ml; 0.0 for an organ that was not found.
        touches_border: whether a voxel of it lies on one of the volume's six faces. The scan may then have cut the
            organ off, and the volume be only a part of it.
        confidence: how far probability and label agree, 0 to 1; None if that is not known. See `plausibility.Evidence`.
        doubts: a few words for each reason to think that this is not the organ.
    """

    volume_ml: float
    touches_border: bool
    confidence: float | None = None
    doubts: Sequence[str] = ()


@dataclass(frozen=True)
class RoiBox:
    """Where the organ network looked, in voxels along the input file's own axes.

    Attributes:
        start: first voxel on each axis.
        stop: one past the last voxel on each axis.
        fallback: why that is the whole volume; None where the ROI network's box was used.
    """

    start: tuple[int, int, int]
    stop: tuple[int, int, int]
    fallback: str | None = None


def measure(
    labels: NDArray[np.uint8], spacing: tuple[float, float, float], within: RoiBox | None = None
) -> dict[str, OrganMeasure]:
    """Measure every organ of `ORGANS` in a label map, in the order of their codes.

    Args:
        labels: codes, three-dimensional, in any axis order and memory layout; other values are passed over.
        spacing: voxel size in mm along the three axes of `labels`.
        within: a box outside of which nothing is labelled, which spares reading what lies there.

    Returns:
        The measure by organ name; an organ without a voxel has 0.0 ml and touches no border.

    Raises:
        ValueError: `labels` is not a three-dimensional uint8 array, or a spacing is not a positive number.
    """
    if labels.ndim != 3 or labels.dtype != np.uint8:
        raise ValueError(f"labels must be three-dimensional uint8, but are {labels.dtype} of shape {labels.shape}")
    if len(spacing) != 3 or not all(math.isfinite(step) and step > 0 for step in spacing):
        raise ValueError(f"spacing must be three positive numbers of mm, but is {spacing}")
    voxels = dict.fromkeys((organ.code for organ in ORGANS), 0)
    inside = labels if within is None else labels[tuple(map(slice, within.start, within.stop))]
    # A count does not depend on an axis' direction, and NumPy is slow along axes that run backwards in memory.
    inside = inside[tuple(slice(None, None, -1 if stride < 0 else 1) for stride in inside.strides)]
    # Slab by slab along the slowest axis, since a slab's comparison stays in the cache. One np.bincount of the whole
    # would first copy the volume to eight bytes a voxel, and even slab by slab takes several times as long.
    for slab in np.moveaxis(inside, int(np.argmax(inside.strides)), 0):
        for code in voxels:
            voxels[code] += int(np.count_nonzero(slab == code))
    on_border = np.zeros(256, dtype=bool)
    if labels.size:
        for axis in range(3):
            slices = np.moveaxis(labels, axis, 0)
            on_border[slices[0]] = on_border[slices[-1]] = True
    voxel_ml = math.prod(spacing) / 1000.0
    return {organ.name: OrganMeasure(voxels[organ.code] * voxel_ml, bool(on_border[organ.code])) for organ in ORGANS}


class Status(StrEnum):
    """How a case ended."""

    DONE = "done"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class CaseRecord:
    """What was done to one case. Shape, spacing and box follow the input file's own axes.

    Attributes:
        input: the input file's name.
        status: how it ended.
        output: the output file's name; None where there is none.
        error: one line, for a failed or skipped case why.
        warnings: one line each.
        device: name of the processor or card that ran the networks; None where none ran.
        shape: voxels per axis; None if the file could not be read.
        spacing: voxel size in mm per axis; None if the file could not be read.
        roi: the box that the organ network saw; None where it did not run.
        organs: the measures by organ name; None where there is no label map.
        statistics: HU and boxes by organ name; None where they were not asked for.
        seconds: wall seconds by stage, in the order of the stages.
        total_seconds: wall seconds of the whole case; None if it was not timed.
        memory: peaks while the case was worked on.
    """

    input: str
    status: Status
    output: str | None = None
    error: str | None = None
    warnings: Sequence[str] = ()
    device: str | None = None
    shape: tuple[int, int, int] | None = None
    spacing: tuple[float, float, float] | None = None
    roi: RoiBox | None = None
    organs: Mapping[str, OrganMeasure] | None = None
    statistics: "Mapping[str, OrganStatistics] | None" = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    total_seconds: float | None = None
    memory: MemoryPeak = field(default_factory=MemoryPeak)

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON has it, its keys always all there and in the same order."""
        return {
            "input": self.input,
            "output": self.output,
            "status": self.status.value,
            "error": self.error,
            "warnings": list(self.warnings),
            "shape": _plain(self.shape),
            "spacing_mm": None if self.spacing is None else [_rounded(step, 6) for step in self.spacing],
            "roi": None
            if self.roi is None
            else {
                "start": _plain(self.roi.start),
                "stop": _plain(self.roi.stop),
                "fallback": self.roi.fallback,
            },
            "organs": None
            if self.organs is None
            else {
                name: {
                    "volume_ml": _rounded(organ.volume_ml, 2),
                    "touches_border": organ.touches_border,
                    "confidence": _rounded(organ.confidence, 3),
                    "doubts": list(organ.doubts),
                }
                for name, organ in self.organs.items()
            },
            "statistics": None
            if self.statistics is None
            else {name: organ.to_dict() for name, organ in self.statistics.items()},
            "seconds": {stage: _rounded(seconds, 4) for stage, seconds in self.seconds.items()},
            "total_seconds": _rounded(self.total_seconds, 4),
            "device": self.device,
            "memory": _memory(self.memory),
        }


@dataclass(frozen=True)
class Engine:
    """What ran the networks.

    Attributes:
        name: the engine, such as "openvino" or "torch".
        version: the engine's own version.
        device: as asked for: "cpu" or "cuda:N".
        device_name: name of the processor or card; None if unknown.
        precision: arithmetic of the networks, such as "f32" or "bf16".
        threads: CPU threads of the engine; None if it chose them itself.
    """

    name: str
    version: str
    device: str
    device_name: str | None
    precision: str
    threads: int | None

    def to_dict(self) -> dict[str, Any]:
        """Return the engine as JSON has it."""
        return {
            "name": self.name,
            "version": self.version,
            "device": self.device,
            "device_name": self.device_name,
            "precision": self.precision,
            "threads": _plain(self.threads),
        }


@dataclass
class RunReport:
    """One run of the command and all its cases.

    Attributes:
        engine: what ran the networks.
        weights: SHA-256 in hexadecimal digits by name of the weights file.
        options: the command's options by name; values that JSON does not know are written as text.
        planned: how many cases the run set out to do; None if that is not known.
        started: when the run began, with its time zone.
        load_seconds: wall seconds until the networks were ready, imports included; None if they were not.
        warnings: one line each, about the run as a whole, such as a card that was left for the CPU.
        cases: one record per case, in the order of the work.
        total_seconds: wall seconds of the run; None while it goes on, and so in the report of a run that was killed.
        memory: peaks of the run.
        gpu_at_start_mib: memory in use on the card before the run used it; None if not read.
    """

    engine: Engine
    weights: Mapping[str, str]
    options: Mapping[str, object]
    planned: int | None = None
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    load_seconds: float | None = None
    warnings: list[str] = field(default_factory=list)
    cases: list[CaseRecord] = field(default_factory=list)
    total_seconds: float | None = None
    memory: MemoryPeak = field(default_factory=MemoryPeak)
    gpu_at_start_mib: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON has it, its keys always all there and in the same order.

        Raises:
            ValueError: `started` has no time zone.
        """
        if self.started.tzinfo is None:
            raise ValueError("started must have a time zone")
        statuses = [case.status for case in self.cases]
        return {
            "schema_version": SCHEMA_VERSION,
            "notice": NOTICE,
            "fastorgan": __version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "engine": self.engine.to_dict(),
            "weights_sha256": dict(self.weights),
            "options": _plain(self.options),
            "started": self.started.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
            "load_seconds": _rounded(self.load_seconds, 4),
            "total_seconds": _rounded(self.total_seconds, 4),
            "memory": _memory(self.memory) | {"gpu_at_start_mib": _rounded(self.gpu_at_start_mib, 1)},
            "warnings": list(self.warnings),
            "planned": self.planned,
            "counts": {status.value: statuses.count(status) for status in Status},
            "cases": [case.to_dict() for case in self.cases],
        }

    def write(self, path: Path) -> None:
        """Write the report to `path` as JSON, whole or not at all; a report that is there is replaced.

        The text goes to a file beside `path` first, which then takes its name. So a reader never meets half a report,
        and the report may be written anew after each case.

        Raises:
            FastorganError: the file cannot be written there, or `path` names something that is no regular file.
        """
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"
        try:
            if path.exists() and not path.is_file():
                # To put a file in the place of /dev/null would do more harm than to refuse it.
                raise FastorganError(f"{path}: not a regular file; name a file for the report")
            with whole_file(path, ".json") as partial:
                partial.write_text(text, encoding="ascii")
        except OSError as error:
            raise FastorganError(f"{path}: cannot be written ({error.strerror or error})") from error


def _memory(peak: MemoryPeak) -> dict[str, Any]:
    return {
        "gpu_peak_mib": _rounded(peak.device_mib, 1),
        "gpu_process_peak_mib": _rounded(peak.process_mib, 1),
        "gpu_note": peak.gpu_note,
        "rss_peak_mib": _rounded(peak.rss_mib, 1),
    }


def _rounded(value: float | None, digits: int) -> float | None:
    # JSON has no NaN and no infinity; float() also takes NumPy's scalars off.
    if value is None or not math.isfinite(value):
        return None
    return round(float(value), digits)


def _plain(value: object) -> Any:
    """Return `value` in JSON's own types: NumPy's scalars become numbers, NaN None, and what JSON lacks its text."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value)
