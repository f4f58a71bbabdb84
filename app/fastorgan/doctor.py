"""What `fastorgan predict` would run on here, and what is wrong with it, on one screen."""

import importlib.metadata
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np

from . import __version__
from .errors import DeviceError, FastorganError
from .memory import MIB, available_bytes
from .monitor import PyNvml, cpu_name
from .runtime import INPUT_SIZES, choose_runtime, usable_cores
from .weights import Weights

GIB = 1024 * MIB

NEEDED_BYTES, EASY_BYTES = 400 * MIB, 1536 * MIB
"""Free memory below which no case runs, and above which a scan of usual size does with room to spare."""

_NEEDED = ("numpy", "scipy", "nibabel", "openvino", "pillow", "jinja2", "nvidia-ml-py")
_EXTRAS = {"torch": "NVIDIA GPUs", "pydicom": "DICOM", "highdicom": "DICOM SEG", "ray": "clusters"}


class Verdict(StrEnum):
    """How a finding is meant."""

    OK = "ok"
    WARNING = "warn"
    WRONG = "WRONG"


@dataclass(frozen=True)
class Finding:
    """One line of the screen.

    Attributes:
        subject: what was looked at.
        verdict: whether it will do.
        text: what was found, and where it will not do, what helps.
    """

    subject: str
    verdict: Verdict
    text: str


@dataclass(frozen=True)
class Wish:
    """What `predict` would be asked for; all as its options take it."""

    device: str = "auto"
    engine: str = "auto"
    threads: int | None = None
    weights: Path | None = None
    output: Path = Path()


def examine(wish: Wish) -> list[Finding]:
    """Look at everything that a run needs, and run both networks once on air.

    Never raises for what is wrong here; that is a finding.
    """
    steps: Sequence[tuple[str, Callable[[], Iterator[Finding]]]] = (
        ("System", _system),
        ("Libraries", _libraries),
        ("Processor", _processor),
        ("GPU", _gpus),
        ("Weights", lambda: _weights(wish)),
        ("Engine", lambda: _engine(wish)),
        ("Memory", _memory),
        ("Disk", lambda: _disk(wish)),
    )
    findings: list[Finding] = []
    for subject, look in steps:
        try:
            findings += look()
        except FastorganError as error:
            findings.append(Finding(subject, Verdict.WRONG, str(error)))
        except Exception as error:  # whatever is broken here is what the doctor is for
            text = " ".join(str(error).split())
            findings.append(Finding(subject, Verdict.WRONG, f"cannot be examined ({type(error).__name__}: {text})"))
    return findings


def screen(findings: Sequence[Finding]) -> str:
    """The findings as a table for the terminal, and the sum of them."""
    width = max(len(finding.subject) for finding in findings)
    lines = [f"{finding.verdict:<5}  {finding.subject:<{width}}  {finding.text}" for finding in findings]
    wrong, warned = (sum(f.verdict is verdict for f in findings) for verdict in (Verdict.WRONG, Verdict.WARNING))
    if wrong:
        end = f"{wrong} thing{'s' * (wrong > 1)} must be mended before `fastorgan predict` can run."
    elif warned:
        end = "`fastorgan predict` can run; mind the warnings."
    else:
        end = "All is well: `fastorgan predict` can run."
    return "\n".join([*lines, "", end])


def to_dict(findings: Sequence[Finding]) -> dict[str, Any]:
    """The findings as JSON has them."""
    return {
        "fastorgan": __version__,
        "healthy": not any(finding.verdict is Verdict.WRONG for finding in findings),
        "findings": [asdict(finding) | {"verdict": finding.verdict.value.lower()} for finding in findings],
    }


def _system() -> Iterator[Finding]:
    yield Finding(
        "System", Verdict.OK, f"fastorgan {__version__}, Python {platform.python_version()}, {platform.platform()}"
    )


def _libraries() -> Iterator[Finding]:
    versions = {name: _version(name) for name in (*_NEEDED, *_EXTRAS)}
    missing = [name for name in _NEEDED if versions[name] is None]
    there = ", ".join(f"{name} {version}" for name, version in versions.items() if version is not None)
    absent = "; ".join(f"no {name} (for {use})" for name, use in _EXTRAS.items() if versions[name] is None)
    yield Finding("Libraries", Verdict.OK, there + (f"; {absent}" if absent else ""))
    if missing:
        # Which of them a run misses shows below.
        yield Finding("Libraries", Verdict.WARNING, f"not installed: {', '.join(missing)}; install fastorgan anew")


def _processor() -> Iterator[Finding]:
    cores, all_cores = usable_cores(), os.cpu_count() or 1
    some = "" if cores == all_cores else f" of {all_cores}"
    yield Finding("Processor", Verdict.OK, f"{cpu_name()}, {cores}{some} cores for this process")


def _gpus() -> Iterator[Finding]:
    try:
        nvml = PyNvml()
    except DeviceError as error:
        yield Finding("GPU", Verdict.OK, f"none ({error})")
        return
    try:
        import pynvml

        driver = pynvml.nvmlSystemGetDriverVersion()
        uuids = nvml.uuids()
        if not uuids:
            yield Finding("GPU", Verdict.WARNING, f"driver {driver} lists no card")
        for uuid in uuids:
            total, free = nvml.memory(uuid)
            yield Finding(
                "GPU", Verdict.OK, f"{nvml.name(uuid)}, driver {driver}, {free / MIB:.0f} of {total / MIB:.0f} MiB free"
            )
        if uuids and _version("torch") is None:
            yield Finding("GPU", Verdict.WARNING, "not used: it needs torch (pip install 'fastorgan[gpu]')")
    finally:
        nvml.close()


def _weights(wish: Wish) -> Iterator[Finding]:
    weights = Weights.find(wish.weights)
    files = 0
    for network, facts in weights.manifest["networks"].items():
        for name in facts["sha256"]:
            weights.read(network, name.removeprefix(network))
            files += 1
    text = f"version {weights.version} in {weights.folder}, {files} files with the SHA-256 of their manifest"
    yield Finding("Weights", Verdict.OK, text)


def _engine(wish: Wish) -> Iterator[Finding]:
    begun = time.perf_counter()
    weights = Weights.find(wish.weights)
    runtime = choose_runtime(wish.device, wish.engine, wish.threads)
    networks = {network: runtime.load(weights, network) for network in INPUT_SIZES}
    loaded = time.perf_counter()
    for name, network in networks.items():
        logits = network(np.full(INPUT_SIZES[name], -1, np.float32))
        if not np.isfinite(logits).all():
            raise DeviceError(f"the {name} network gives numbers that are not finite; try --device cpu")
    ended = time.perf_counter()
    # Asked last: a card that fails is left for the CPU.
    engine = runtime.engine
    threads = f", {engine.threads} threads" if engine.threads else ""
    yield Finding(
        "Engine",
        Verdict.OK,
        f"{engine.name} {engine.version} on {engine.device} ({engine.device_name}), {engine.precision}{threads}; "
        f"networks loaded in {loaded - begun:.1f} s, run once in {ended - loaded:.1f} s",
    )
    for fault in runtime.faults:
        yield Finding("Engine", Verdict.WARNING, fault)


def _memory() -> Iterator[Finding]:
    free = available_bytes()
    if free is None:
        yield Finding("Memory", Verdict.OK, "this system does not tell what is free")
        return
    text = f"{free / GIB:.1f} GiB free for this process, limits of containers included"
    if free < NEEDED_BYTES:
        yield Finding("Memory", Verdict.WRONG, f"{text}; no case fits, {EASY_BYTES / GIB:.1f} GiB do for most")
    elif free < EASY_BYTES:
        yield Finding("Memory", Verdict.WARNING, f"{text}; large scans may be refused, --jobs 1 takes least")
    else:
        yield Finding("Memory", Verdict.OK, text)


def _disk(wish: Wish) -> Iterator[Finding]:
    folder = wish.output
    # Folders that are not there yet are made by `predict`.
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    shown = folder.absolute()
    if not folder.is_dir():
        yield Finding("Disk", Verdict.WRONG, f"{shown}: not a folder, so no labels can be written there")
        return
    try:
        with tempfile.TemporaryFile(dir=folder, prefix=".fastorgan-"):
            pass
    except OSError as error:
        yield Finding("Disk", Verdict.WRONG, f"{shown}: cannot be written to ({error.strerror or error})")
        return
    free = shutil.disk_usage(folder).free
    verdict = Verdict.OK if free >= GIB else Verdict.WARNING
    yield Finding("Disk", verdict, f"{shown}: can be written to, {free / GIB:.1f} GiB free")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
