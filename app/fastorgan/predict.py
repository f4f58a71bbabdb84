"""Many cases: which files, what is said, what is reported."""

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import nibabel as nib

from .cascade import Cascade, Segmentation
from .console import printable, say, warn
from .errors import DeviceError, FastorganError, VolumeError
from .files import remove_abandoned
from .in_order import InOrder
from .labels import ORGANS
from .monitor import MemorySampler, StageTimer
from .nifti import MAX_VOXELS
from .outputs import FinishedCase, Outputs
from .plausibility import doubts
from .report import CaseRecord, OrganMeasure, RoiBox, RunReport, Status, measure
from .runtime import resolve_device, usable_cores
from .signals import uninterrupted
from .volume import (
    INPUT_SUFFIXES,
    OUTPUT_SUFFIXES,
    label_image,
    load_image,
    make_folder,
    read_volume,
    save_image,
    stem,
)

if TYPE_CHECKING:
    from .dicom import Series

T = TypeVar("T")


_REPORT_EVERY = 200
"""Up to so many cases the report is written after each."""

_REPORT_REST = 20
"""Behind them it is left alone for so many times as long as its writing took."""

_LONG = 3
"""From so many cases for each that is worked on at a time, the networks leave cores to the others."""


@dataclass(frozen=True)
class Job:
    """One case.

    Attributes:
        source: its CT; of a DICOM series the folder.
        target: where its labels go.
        obstacle: why it cannot be done, if that is known beforehand.
        series: the DICOM slices; None for a CT that is a single file.
    """

    source: Path
    target: Path
    obstacle: str | None = None
    series: "Series | None" = None

    @property
    def name(self) -> str:
        """What the case is called."""
        return case_name(self.source) if self.series is None else self.series.name

    def absolute(self) -> "Job":
        """The case under names that do not depend on the working folder."""
        series = None if self.series is None else self.series.absolute()
        return replace(self, source=self.source.absolute(), target=self.target.absolute(), series=series)

    def open(self, max_voxels: int) -> nib.Nifti1Image:
        """The CT, in memory where it is a DICOM series; raises as `load_image` and `Series.load`."""
        return load_image(self.source, max_voxels) if self.series is None else self.series.load(max_voxels)


@dataclass(frozen=True)
class Settings:
    """How to run a batch.

    Attributes:
        device, engine, weights: as `Cascade.load` takes them.
        threads: of the CPU engine; None leaves it to `network_threads`.
        jobs: how many cases are worked on at a time; one is read or written while another is segmented. Each holds
            its scan in memory.
        report: where the run report goes, if anywhere.
        dicom_seg: whether a DICOM SEG (NAME.seg.dcm) is written beside the labels of a DICOM series.
        outputs: what is written besides labels and report.
        resume: leave out the cases whose labels are there; see `is_done`.
        max_voxels: larger volumes are refused.
        debug: let unforeseen errors through with their traceback.
        options: the command's options by name, for the report.
    """

    device: str = "auto"
    engine: str = "auto"
    threads: int | None = None
    weights: Path | None = None
    jobs: int = 2
    report: Path | None = None
    outputs: Outputs = field(default_factory=Outputs)
    debug: bool = False
    options: dict[str, object] = field(default_factory=dict)
    resume: bool = False
    max_voxels: int = MAX_VOXELS
    dicom_seg: bool = False


def plan_jobs(inputs: Sequence[Path], output: Path, *, series: str | None = None, suffix: str = ".nii.gz") -> list[Job]:
    """Say which label file each CT gets: X_0000.nii.gz, X.nii.gz, X.mha and so on become X.nii.gz.

    Args:
        inputs: files, or folders whose volumes are taken in the order of their names; a folder without any, but with
            DICOM slices in or below it, is their series.
        output: a folder; or the label file itself, for a single input.
        series: which of several DICOM series is meant; see `dicom.choose`.
        suffix: of the label files in a folder.

    Raises:
        VolumeError: if the only input is a folder that holds no volume, or several series without a choice, or cannot
            be read. Of several inputs, such a folder is a case with an obstacle.
        DicomError: if it holds DICOM but pydicom is not installed.
    """
    found: list[Job] = []
    for path in inputs:
        if not _is_folder(path):
            slice_of = path.suffix.lower() in (".dcm", ".ima")
            found.append(Job(path, output, "a single DICOM slice; give the folder of its series" if slice_of else None))
        elif volumes := _volumes_in(path):
            found += [Job(volume, output) for volume in volumes]
        else:
            try:
                found += [Job(scan.folder, output, series=scan) for scan in _series_in(path, series)]
            except VolumeError as error:
                if len(inputs) == 1:
                    raise
                found.append(Job(path, output, str(error).removeprefix(f"{path}: ")))
    sources = [job.source for job in found]
    single = len(found) == len(inputs) == 1 and (found[0].series is not None or found[0].source == inputs[0])
    if single and output.name.endswith(OUTPUT_SUFFIXES) and not _is_folder(output):
        targets = [output]
    else:
        targets = [output / f"{job.name}{suffix}" for job in found]
    # Not Path.resolve, which a link to itself makes raise.
    taken = {os.path.realpath(source): source for source in sources}
    given: dict[str, Path] = {}
    jobs = []
    for job, target in zip(found, targets, strict=True):
        obstacle = job.obstacle
        place = os.path.realpath(target)
        if obstacle is not None:
            pass
        elif place in taken:
            obstacle = f"its labels would overwrite the input {taken[place]}; choose another output folder"
        elif place in given:
            obstacle = f"its labels would overwrite those of {given[place]}; give the two different names"
        else:
            given[place] = job.source
        jobs.append(replace(job, target=target, obstacle=obstacle))
    return jobs


def case_name(path: Path) -> str:
    """The case that a CT file stands for: its name without its suffix and without the channel _0000."""
    return stem(path).removesuffix("_0000") or stem(path)


def network_threads(cases: int, at_once: int) -> int | None:
    """How many CPU threads the networks take in a batch; None is all cores.

    The networks run one case at a time, and each part of a layer is as late as the slowest thread. A thread that shares
    its core with another case's reading halts the rest, so that in a long batch the other cases have cores of their
    own. In a short one the first and the last networks have nobody beside them and take all cores.
    """
    return max(1, usable_cores() - (at_once - 1)) if at_once > 1 and cases >= _LONG * at_once else None


def run_batch(jobs: Sequence[Job], settings: Settings) -> RunReport:
    """Segment all jobs and say so; a case that fails does not stop the others.

    Raises:
        FastorganError: if no case can run: no such device, no weights, an output folder or report that cannot be
            written.
    """
    begun = time.perf_counter()
    device = resolve_device(settings.device, settings.engine)
    # The sampler starts before CUDA does, so that its first reading is what the device held without this run.
    sampler = MemorySampler(int(device.removeprefix("cuda:")) if device != "cpu" else None)
    folders = sorted({job.target.parent for job in jobs})
    for folder in folders:
        make_folder(folder)
        remove_abandoned(folder)
    settings.outputs.begin(folders)
    loaded: Future[Cascade] = Future()

    def run(job: Job) -> CaseRecord:
        return run_case(loaded, job, sampler, settings)

    report: RunReport | None = None
    records = InOrder(run, jobs, settings.jobs)
    try:
        # The first cases are read while the networks are loaded.
        with sampler, records, _quick_turns(), _told(loaded):
            threads = settings.threads or network_threads(len(jobs), settings.jobs)
            # Not `device`: a card that was not asked for by name may be left for the CPU.
            cascade = Cascade.load(settings.device, engine=settings.engine, threads=threads, weights=settings.weights)
            report = RunReport(cascade.engine, cascade.weights.sha256, settings.options, planned=len(jobs))
            report.warnings += cascade.faults
            for line in cascade.faults:
                warn(f"warning: {line}")
            report.load_seconds = time.perf_counter() - begun
            if sampler.samples:
                report.gpu_at_start_mib = sampler.samples[0].device_mib
            if settings.report is not None:
                # Where it cannot be written, this is the time to say so.
                report.write(settings.report)
            with uninterrupted():
                loaded.set_result(cascade)
            note_cases(report, jobs, records, settings)
    except BaseException:
        if report is not None:
            # An interrupt comes while cases are under way; those have ended by now.
            report.cases = records.ended()
            report.memory = sampler.peak
            with suppress(FastorganError):
                if settings.report is not None:
                    report.write(settings.report)
        with suppress(FastorganError):
            settings.outputs.end(report, sampler.samples)
        raise
    report.memory = sampler.peak
    report.total_seconds = time.perf_counter() - begun
    if settings.report is not None:
        report.write(settings.report)
    settings.outputs.end(report, sampler.samples)
    return report


def note_cases(report: RunReport, jobs: Sequence[Job], records: Iterable[CaseRecord], settings: Settings) -> None:
    """Say how each case ended as soon as its record is there, and keep it in the report.

    Args:
        report: is added to, and written where `settings` says so.
        jobs: all cases.
        records: of the cases, in the order of `jobs`.
        settings: of the run.
    """
    due = 0.0
    for number, (job, record) in enumerate(_with_progress(zip(jobs, records, strict=True), len(jobs)), 1):
        report.cases.append(record)
        _tell(record, job, number, len(jobs))
        if settings.report is not None and (number <= _REPORT_EVERY or time.perf_counter() >= due):
            begun = time.perf_counter()
            # Should the disk be full, the cases go on, and the last report says so.
            with suppress(FastorganError):
                report.write(settings.report)
            # Of thousands of cases the report takes as long to write as a case to segment.
            due = time.perf_counter() + _REPORT_REST * (time.perf_counter() - begun)


@contextmanager
def _quick_turns() -> Iterator[None]:
    """Let threads ask for the interpreter ten times as often as Python does by itself, every 5 ms.

    One that comes back from inflating or from NumPy needs it for a moment only, and many times a case.
    """
    usual = sys.getswitchinterval()
    sys.setswitchinterval(usual / 10)
    try:
        yield
    finally:
        sys.setswitchinterval(usual)


@contextmanager
def _told(promised: Future[Cascade]) -> Iterator[None]:
    """Tell those who wait for what the block makes that it will not come, where the block fails."""
    try:
        yield
    except BaseException as error:
        with uninterrupted():
            if not promised.done():
                promised.set_exception(error)
        raise


def run_case(loaded: Future[Cascade], job: Job, sampler: MemorySampler, settings: Settings) -> CaseRecord:
    """Segment one case and write what it is asked for; a case that fails has a record that says so.

    Args:
        loaded: the networks, waited for when the case is read.
        job: the case.
        sampler: entered.
        settings: of the run.

    Raises:
        Exception: any unforeseen one, with `settings.debug` only.
    """
    begun = time.perf_counter()
    caught: tuple[type[Exception], ...] = (FastorganError,) if settings.debug else (Exception,)
    with sampler.window() as window:
        try:
            if job.obstacle is not None:
                raise VolumeError(f"{job.source}: {job.obstacle}")
            if settings.resume and is_done(job, settings):
                there = f"{job.source}: its labels are there already"
                return CaseRecord(str(job.source), Status.SKIPPED, str(job.target), error=there)
            timer = StageTimer()
            with timer.stage("read"):
                image = job.open(settings.max_voxels)
                volume = read_volume(image, str(job.source))
            with timer.stage("wait"):
                cascade = loaded.result()
            found = cascade.find_organs(volume)
            seconds = timer.seconds | found.seconds
            spacing = tuple(float(s) for s in nib.affines.voxel_sizes(image.affine))
            roi = RoiBox(*volume.grid.box_in_file(found.roi.box), found.roi.fallback)
            organs = judged(measure(found.labels, (spacing[0], spacing[1], spacing[2]), roi), found)
            with timer.stage("write"):
                # Labels come last: where they are, all is there.
                said = _write_segmentation(job, found, settings)
                save_image(label_image(found.labels, image), job.target)
            noted = [] if job.series is None else job.series.warnings()
            warnings = [*noted, *volume.warnings, *warnings_for(found, organs), *said]
            case = FinishedCase(job.name, job.target, image, volume, found.labels, found.roi.box)
            extra = settings.outputs.of_case(case, warned=bool(warnings))
        except caught as error:
            text = str(error) if isinstance(error, FastorganError) else _unforeseen(job, error)
            if isinstance(error, MemoryError):
                text = f"{job.source}: does not fit into this machine's memory; --jobs 1 needs the least"
            if isinstance(error, DeviceError):
                # It knows of cards and not of files.
                text = f"{job.source}: {text}"
            return CaseRecord(
                str(job.source),
                Status.FAILED,
                error=text,
                memory=window.peak,
                total_seconds=time.perf_counter() - begun,
            )
    return CaseRecord(
        str(job.source),
        Status.DONE,
        str(job.target),
        warnings=[*warnings, *extra.warnings],
        device=found.device,
        shape=volume.grid.shape,
        spacing=(spacing[0], spacing[1], spacing[2]),
        roi=roi,
        organs=organs,
        statistics=extra.statistics,
        seconds=seconds | timer.seconds | extra.seconds,
        total_seconds=time.perf_counter() - begun,
        memory=window.peak,
    )


def judged(organs: dict[str, OrganMeasure], found: Segmentation) -> dict[str, OrganMeasure]:
    """Add to each organ's measure how sure the network is of it, and what speaks against it."""
    said = doubts(found.evidence)
    return {
        name: replace(organ, confidence=found.evidence[name].confidence, doubts=tuple(said.get(name, ())))
        if name in found.evidence
        else organ
        for name, organ in organs.items()
    }


def is_done(job: Job, settings: Settings) -> bool:
    """Whether a case's labels are there from an earlier run: of the input's shape and not older than it.

    Labels take their name only when they are whole, so that what an interrupted run left is never taken for them.
    """
    try:
        labels = load_image(job.target, settings.max_voxels)
        if job.series is None:
            newest, shape = job.source.stat().st_mtime_ns, load_image(job.source, settings.max_voxels).shape
        else:
            newest, shape = max(part.path.stat().st_mtime_ns for part in job.series.slices), job.series.shape
        if job.target.stat().st_mtime_ns < newest or labels.shape != shape:
            return False
    except (OSError, VolumeError):
        # Whatever is the matter, the case itself will tell.
        return False
    if settings.dicom_seg and job.series is not None and not _segmentation_path(job).exists():
        return False
    return settings.outputs.are_beside(job.target)


def warnings_for(found: Segmentation, organs: dict[str, OrganMeasure]) -> list[str]:
    """What a user should know about a result before trusting it, one line each."""
    lines = list(found.faults)
    if found.roi.fallback is not None:
        lines.append(f"the whole volume was searched: {found.roi.fallback}")
    missing = [name for name, organ in organs.items() if organ.volume_ml == 0]
    if len(missing) == len(organs):
        lines.append("no organ was found; is this a CT of the abdomen, in HU?")
    elif missing:
        lines.append(f"not found: {', '.join(missing)}")
    doubtful = {name: organ.doubts for name, organ in organs.items() if organ.doubts}
    if 2 * len(doubtful) > len(organs):
        lines.append("most of what was found is doubtful; is this a CT of the abdomen, in HU, with the right header?")
    lines += [f"{name} is doubtful: {'; '.join(said)}" for name, said in doubtful.items()]
    parts = [name for name, organ in organs.items() if organ.touches_border]
    if parts:
        lines.append(f"cut off by the border of the scan, so that the volume may be only a part: {', '.join(parts)}")
    return lines


def _write_segmentation(job: Job, found: Segmentation, settings: Settings) -> list[str]:
    """Write the DICOM SEG where it is asked for; returns what is to be said of it."""
    if not settings.dicom_seg:
        return []
    if job.series is None:
        return ["not a DICOM series, so there is no DICOM SEG"]
    from .dicom_seg import save_segmentation

    return save_segmentation(found.labels, job.series, _segmentation_path(job))


def _segmentation_path(job: Job) -> Path:
    return job.target.with_name(f"{case_name(job.target)}.seg.dcm")


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        # A name that is too long, or below a folder that may not be entered: opening it will say so.
        return False


def _volumes_in(folder: Path) -> list[Path]:
    try:
        # A pair is one volume, and goes by its header.
        suffixes = tuple(suffix for suffix in INPUT_SUFFIXES if suffix != ".img")
        files = sorted(p for p in folder.iterdir() if p.name.endswith(suffixes) and not p.name.startswith("."))
    except OSError as error:
        raise VolumeError(f"{folder}: cannot be read ({error.strerror or error})") from error
    return files


def _series_in(folder: Path, choice: str | None) -> "list[Series]":
    from .dicom import choose, find_series

    found = find_series(folder)
    if not found:
        raise VolumeError(f"{folder}: holds no CT volume ({', '.join(INPUT_SUFFIXES)}, or DICOM slices)")
    return choose(found, choice, folder)


def _with_progress(done: Iterable[T], total: int) -> Iterator[T]:
    """Yield what is done behind a progress bar on a terminal, plainly elsewhere."""
    if not sys.stderr.isatty():
        yield from done
        return
    from tqdm import tqdm

    yield from tqdm(done, total=total, unit="case", leave=False)


def _tell(record: CaseRecord, job: Job, number: int, total: int) -> None:
    """One line to standard output for a case that is done, to standard error for one that is not."""
    writer = nullcontext()
    if sys.stderr.isatty():
        from tqdm import tqdm

        writer = tqdm.external_write_mode()
    with writer:
        if record.status is Status.SKIPPED:
            say(f"[{number}/{total}] {job.target}: skipped, its labels are there already")
            return
        if record.organs is None:
            warn(str(record.error))
            return
        volumes = ", ".join(f"{organ.name} {record.organs[organ.name].volume_ml:.0f} ml" for organ in ORGANS)
        say(f"[{number}/{total}] {job.target}: {volumes}; {record.total_seconds:.2f} s")
        for line in record.warnings:
            warn(f"warning: {job.source}: {line}")


def _unforeseen(job: Job, error: Exception) -> str:
    text = " ".join(str(error).split())
    return printable(f"{job.source}: failed unexpectedly ({type(error).__name__}: {text}); --debug shows where")
