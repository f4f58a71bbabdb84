"""The FLARE organisers' loop: one container per case, timed from outside, while the whole host is watched.

Repeats `Time_GPUMem_eval.py` and `Efficiency.py` of JunMa11/FLARE (FLARE21; `resource_eval.py` since FLARE22): copy one
case into a folder `inputs`, read the card, the processor and the memory every 0.1 s, run the container by its command
line, and take the case away again. Each case gets folders of its own here, so that what a container leaves behind is
seen and meets no other case.
"""

import filecmp
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Protocol, Self

from fastorgan.errors import FastorganError
from fastorgan.monitor import INTERVAL_S, LEAVE_AFTER_S, MIB, Nvml, PyNvml
from fastorgan.predict import case_name

from . import efficiency
from .accuracy import case_of
from .efficiency import Measurement, Reading

LIMIT_S = efficiency.HUNG_TIME_S
"""After this a container counts as hung."""

FOLDER = "efficiency"
"""Where, in the folder of the labels, the measurements go."""

STOPPING_S = 30.0
"""How long Docker may take to remove a container before its command line is killed instead."""

Form = Literal["flare21", "flare23"]

FORMS: dict[Form, tuple[str, ...]] = {"flare21": (), "flare23": ("--shm-size=28gb", "-m", "28G")}
"""What each form of the organisers' command line has before `--gpus`; FLARE22's is FLARE21's, FLARE24's FLARE23's."""


class TimingError(FastorganError):
    """The containers cannot be run as asked."""


def find_cases(inputs: Path) -> list[Path]:
    """Find the cases: one file, or a folder's *.nii.gz files in the order of their names.

    Raises:
        TimingError: if there is none, or two would have one output file.
    """
    if not inputs.exists():
        raise TimingError(f"{inputs}: no such file or folder")
    files = sorted(inputs.iterdir()) if inputs.is_dir() else [inputs]
    sources = [path for path in files if path.name.endswith(".nii.gz") and not path.name.startswith(".")]
    if not sources:
        raise TimingError(f"{inputs}: no *.nii.gz file; the organisers' containers get no others")
    by_output: dict[str, Path] = {}
    for source in sources:
        other = by_output.setdefault(case_name(source), source)
        if other is not source:
            raise TimingError(f"{other} and {source}: both would become {case_name(source)}.nii.gz")
    return sources


@dataclass(frozen=True)
class Container:
    """A program's container, by the organisers' command line.

    Attributes:
        image: with its tag; see `with_tag`.
        name: of the container. The organisers take the team's, which is the image's.
        gpu: number of the card along the PCI bus, as Docker counts; None for a container without a GPU.
        form: of the command line.
        docker: the program that runs containers, and options of its own.
    """

    image: str
    name: str
    gpu: int | None = None
    form: Form = "flare21"
    docker: tuple[str, ...] = ("docker",)

    def command(self, inputs: Path | str, outputs: Path | str) -> list[str]:
        """The command line with two folders of the host; a shell would print it with the organisers' quotes."""
        gpus = [] if self.gpu is None else [f"--gpus=device={self.gpu}"]
        volumes = ["-v", f"{inputs}/:/workspace/inputs/", "-v", f"{outputs}/:/workspace/outputs/"]
        head = [*self.docker, "container", "run", *FORMS[self.form], *gpus, "--name", self.name, "--rm", *volumes]
        return [*head, self.image, "/bin/bash", "-c", "sh predict.sh"]

    def check(self) -> None:
        """Make sure that the image is here and the name is free.

        Docker would otherwise ask a registry for the image, within the time that is measured.

        Raises:
            TimingError: if that is not so, or Docker does not answer.
        """
        found = self._ask("image", "inspect", "--format", "{{.Id}}", self.image)
        if found.returncode != 0:
            raise TimingError(
                f"{self.image}: Docker does not find the image; build it or `docker image load` it first "
                f"({_last_words(found.stderr)})"
            )
        if self._ask("container", "inspect", "--format", "{{.Id}}", self.name).returncode == 0:
            raise TimingError(f"a container is already called {self.name}; remove it or choose another name")

    def run(self, inputs: Path, outputs: Path, log: IO[bytes], limit_s: float) -> int | None:
        """Run the container to its end.

        Args:
            inputs, outputs: absolute paths of the folders that it gets.
            log: gets what it prints.
            limit_s: seconds after which it is removed.

        Returns:
            The exit code; None if it was removed.
        """
        process = subprocess.Popen(
            self.command(inputs, outputs), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
        removed = threading.Event()

        def remove() -> None:
            removed.set()
            self._remove(process)

        # Not `wait(limit_s)`: it looks every 50 ms only, which would be in the time measured.
        timer = threading.Timer(limit_s, remove)
        timer.daemon = True
        timer.start()
        try:
            code = process.wait()
        except BaseException:
            # Left alone, the container would go on without its command line.
            self._remove(process)
            raise
        finally:
            timer.cancel()
        if removed.is_set():
            timer.join()
            return None
        return code

    def _remove(self, process: "subprocess.Popen[bytes]") -> None:
        try:
            self._ask("container", "rm", "--force", self.name)
            process.wait(STOPPING_S)
        except (TimingError, subprocess.TimeoutExpired):
            process.kill()

    def _ask(self, *words: str) -> "subprocess.CompletedProcess[str]":
        command = [*self.docker, *words]
        try:
            return subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=STOPPING_S,
                check=False,
            )
        except OSError as error:
            raise TimingError(f"{self.docker[0]}: cannot be run ({error.strerror}); is Docker installed?") from error
        except subprocess.TimeoutExpired as error:
            raise TimingError(f"{shlex.join(command)}: no answer within {STOPPING_S:g} s") from error


def with_tag(image: str) -> str:
    """Add the organisers' tag, latest, to an image's name that has neither tag nor digest."""
    last = image.rpartition("/")[2]
    return image if ":" in last or "@" in last else f"{image}:latest"


def team_of(image: str) -> str:
    """Cut registry, tag and digest off an image's name; what is left is the team's name to the organisers."""
    return image.partition("@")[0].rpartition("/")[2].partition(":")[0]


@dataclass(frozen=True)
class Card:
    """The card whose memory is read.

    Attributes:
        gpu: its number along the PCI bus; None if the container gets no GPU.
        name: of the product; None if it cannot be read.
        used_mib: reads total minus free memory of the whole card in MiB; None if it cannot be read.
        reason: why it cannot be read; None if it can.
    """

    gpu: int | None
    name: str | None
    used_mib: Callable[[], float] | None
    reason: str | None


def open_card(gpu: int | Literal["auto", "none"], open_nvml: Callable[[], Nvml] = PyNvml) -> Card:
    """Open the card that the containers get; it stays open until the process ends.

    `CUDA_VISIBLE_DEVICES` changes nothing: neither NVML nor Docker heeds it.

    Args:
        gpu: its number; "auto" for the first one where there is any; "none" for containers without a GPU.
        open_nvml: opens NVML.

    Raises:
        TimingError: if the driver answers, but has no such card.
    """
    if gpu == "none":
        return Card(None, None, None, "the containers get no GPU (--gpu none)")
    number = 0 if gpu == "auto" else gpu
    try:
        nvml = open_nvml()
        uuids = nvml.uuids()
        uuid = uuids[number] if 0 <= number < len(uuids) else None
        name = None if uuid is None else nvml.name(uuid)
    # Whatever NVML or its bindings do, it costs the GPU's figures alone.
    except Exception as error:
        return Card(None if gpu == "auto" else gpu, None, None, _text(error))
    if uuid is None:
        if gpu == "auto":
            return Card(None, None, None, "the NVIDIA driver lists no device")
        raise TimingError(f"--gpu {gpu}: the NVIDIA driver lists {len(uuids)} device(s), counted from 0")

    def used_mib() -> float:
        total, free = nvml.memory(uuid)
        return (total - free) / MIB

    return Card(number, name, used_mib, None)


class Host(Protocol):
    """The processor and the memory of the whole host."""

    def cpu_seconds(self) -> tuple[float, float, float]:
        """Return the seconds that all cores together have spent on users' programs, on the system, and idle."""
        ...

    def ram_mib(self) -> float:
        """Return the memory in use in MiB."""
        ...


class PsutilHost:
    """`Host` by the package psutil, as FLARE22 reads it.

    Raises:
        TimingError: psutil is not installed.
    """

    def __init__(self) -> None:
        try:
            import psutil
        except ImportError as error:
            raise TimingError("psutil is not installed; pip install 'fastorgan[evaluation]'") from error
        self._psutil: Any = psutil

    def cpu_seconds(self) -> tuple[float, float, float]:
        """Return user, system and idle seconds since the host's start; niced programs are in none of them on Linux."""
        times = self._psutil.cpu_times()
        return times.user, times.system, times.idle

    def ram_mib(self) -> float:
        """Return the memory in use in MiB; caches do not count."""
        return float(self._psutil.virtual_memory().used) / MIB


class HostSampler:
    """Reads card, processor and memory every 0.1 s in a thread of its own, from entering the context to leaving it.

    Entering takes one interval: the first reading then has a stretch of CPU time to look back on and shows the host
    without the container. A reading of the card that fails is None, and `gpu_note` says why.

    Args:
        card: the card.
        host: the host.
        clock: seconds from any origin.
        sleep: waits for the seconds given; the default wakes at once when the context is left.
    """

    def __init__(
        self,
        card: Card,
        host: Host,
        *,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        self._card = card
        self._host = host
        self._clock = clock
        self._stop = threading.Event()
        self._sleep = sleep or self._stop.wait
        self._thread = threading.Thread(target=self._run, name="host-sampler", daemon=True)
        self._readings: list[Reading] = []
        self._began = 0.0
        self._cpu = (0.0, 0.0, 0.0)
        self._gpu_error: str | None = None

    def __enter__(self) -> Self:
        self._began = self._clock()
        self._cpu = self._host.cpu_seconds()
        self._sleep(INTERVAL_S)
        self._read()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        # A driver that hangs keeps the thread; it dies with the process.
        self._thread.join(LEAVE_AFTER_S)

    def _run(self) -> None:
        while True:
            self._sleep(INTERVAL_S)
            if self._stop.is_set():
                return
            self._read()

    def _read(self) -> None:
        gpu_mib = self._read_card()
        cpu = self._host.cpu_seconds()
        user, system, idle = (now - before for now, before in zip(cpu, self._cpu, strict=True))
        self._cpu = cpu
        self._readings.append(Reading(self._clock() - self._began, gpu_mib, user, system, idle, self._host.ram_mib()))

    def _read_card(self) -> float | None:
        if self._card.used_mib is None:
            return None
        try:
            return self._card.used_mib()
        # As in `open_card`.
        except Exception as error:
            self._gpu_error = _text(error)
            return None

    @property
    def readings(self) -> tuple[Reading, ...]:
        """All readings so far, oldest first."""
        return tuple(self._readings)

    @property
    def gpu_note(self) -> str | None:
        """Why readings of the card are missing; None if none is."""
        if self._card.reason is not None:
            return self._card.reason
        readings = self.readings
        failed = sum(reading.gpu_mib is None for reading in readings)
        return f"{failed} of {len(readings)} readings failed ({self._gpu_error})" if failed else None


@dataclass(frozen=True)
class Bench:
    """What every case of a run has in common.

    Attributes:
        container: the program.
        card: whose memory is read.
        host: whose processor and memory are read.
        limit_s: seconds after which a container counts as hung.
    """

    container: Container
    card: Card
    host: Host
    limit_s: float = LIMIT_S

    def measure(self, source: Path, out: Path) -> Measurement:
        """Run the container on one case.

        Args:
            source: the CT. The container gets a copy.
            out: a folder that `prepare` has made; gets NAME.nii.gz, if the container wrote it, and efficiency/CASE.log.

        Raises:
            TimingError: if the CT cannot be copied or the folder cannot be written to.
        """
        case, target = case_of(source.name), f"{case_name(source)}.nii.gz"
        try:
            # Beside the outputs and not in /tmp, which not every Docker sees, and so that labels need only be renamed.
            with tempfile.TemporaryDirectory(prefix="container-", dir=out, ignore_cleanup_errors=True) as folder:
                inputs, outputs = Path(folder) / "inputs", Path(folder) / "outputs"
                inputs.mkdir()
                outputs.mkdir()
                if self.container.form == "flare23":
                    # As FLARE23 does, for programs that do not run as root.
                    outputs.chmod(0o777)
                shutil.copyfile(source, inputs / source.name)
                run = self._timed(case, inputs.resolve(), outputs.resolve(), out / FOLDER / f"{case}.log")
                problems = [*run.problems, *_leftovers(inputs, source), *_surplus(outputs, target)]
                if _is_file(outputs / target):
                    (outputs / target).replace(out / target)
                elif run.ran:
                    problems.append(f"no {target} in outputs")
            if Path(folder).exists():
                problems.append(f"{folder} cannot be removed, the container's files in it belong to another user")
        except OSError as error:
            raise TimingError(f"{error.filename or source}: {error.strerror}") from error
        return replace(run, problems=tuple(problems))

    def _timed(self, case: str, inputs: Path, outputs: Path, log: Path) -> Measurement:
        problems = []
        with log.open("wb") as stream, HostSampler(self.card, self.host) as sampler:
            began = time.perf_counter()
            code = self.container.run(inputs, outputs, stream, self.limit_s)
            seconds = time.perf_counter() - began
        printed = log.read_text(encoding="utf-8", errors="replace")
        if code is None:
            problems.append(f"stopped after {self.limit_s:g} s, counts as {efficiency.HUNG_TIME_S:g} s")
        elif code == efficiency.NOT_RUN:
            # Docker's own line is followed by a hint at its help.
            own = [line for line in printed.splitlines() if line.startswith("docker:")]
            problems.append(f"not run ({_last_words(own[0] if own else printed)})")
        elif code != 0:
            problems.append(f"exit code {code} ({_last_words(printed)})")
        command = shlex.join(self.container.command("inputs", "outputs"))
        return Measurement(case, command, seconds, sampler.readings, code, sampler.gpu_note, tuple(problems))


def prepare(bench: Bench, out: Path) -> None:
    """Make sure that everything is there before the first case takes its time, and make the folders for results.

    Args:
        bench: what is going to run.
        out: a new or empty folder, so that no label in it is an older run's.

    Raises:
        TimingError: if the folder is not empty, or the image or Docker is not there.
        EfficiencyError: if matplotlib is not installed.
    """
    efficiency.load_plotting()
    bench.container.check()
    if ":" in str(out.resolve()):
        raise TimingError(f"{out}: Docker mounts no path with a colon; choose another folder")
    try:
        if out.exists() and any(out.iterdir()):
            raise TimingError(f"{out}: not empty; choose a new folder")
        (out / FOLDER).mkdir(parents=True)
    except OSError as error:
        raise TimingError(f"{out}: cannot be used as a folder ({error.strerror})") from error


def time_cases(bench: Bench, sources: Sequence[Path], out: Path) -> Iterator[Measurement]:
    """Run the container on every case and yield its measurement; a case that fails does not stop the others.

    After each case there are, in out/efficiency, its readings as CASE.json, its plot as CASE.png, what the container
    printed as CASE.log, and the files TEAM_PROTOCOL_Efficiency.csv with all cases so far. A case whose container Docker
    could not run is in no CSV file; one that failed by itself is, as with the organisers.

    Args:
        bench: what to run and to watch.
        sources: the CTs.
        out: gets the labels; a folder that `prepare` has made.

    Raises:
        TimingError: if a CT cannot be copied or the folder cannot be written to.
        EfficiencyError: if a result cannot be written.
    """
    folder = out / FOLDER
    team = team_of(bench.container.image)
    runs: list[Measurement] = []
    for source in sources:
        run = bench.measure(source, out)
        efficiency.write_json(run, folder / f"{run.case}.json")
        efficiency.plot(run, folder / f"{run.case}.png")
        if run.ran:
            runs.append(run)
            for layout in efficiency.LAYOUTS:
                efficiency.write_csv(runs, layout, folder / f"{team}_{layout.name}_Efficiency.csv")
        yield run


def _leftovers(inputs: Path, source: Path) -> list[str]:
    """What a container did to its inputs that it should not have."""
    problems = []
    copy = inputs / source.name
    if not _is_file(copy):
        problems.append(f"took {source.name} out of inputs")
    elif not filecmp.cmp(copy, source, shallow=False):
        problems.append(f"changed {source.name} in inputs")
    others = sorted(path.name for path in inputs.iterdir() if path != copy)
    if others:
        problems.append(f"left {', '.join(others)} in inputs")
    return problems


def _surplus(outputs: Path, target: str) -> list[str]:
    others = sorted(path.name for path in outputs.iterdir() if path.name != target)
    return [f"left {', '.join(others)} in outputs"] if others else []


def _is_file(path: Path) -> bool:
    # A link would lead to a file of the host, not of the container.
    return path.is_file() and not path.is_symlink()


def _last_words(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing"


def _text(error: Exception) -> str:
    return str(error) or type(error).__name__
