"""A mutation fuzzer of volume files: spoilt headers and streams, run as `fastorgan predict` runs them.

    python tests/fuzz_volumes.py --count 20000 --seed 1 --keep found/

Each case is a good file with something changed. It runs in a process whose address space is bounded; another process
watches it. Whatever the file, the case must end in time, with labels of its own geometry or with one line that names
it, and with no file half-written. A finding is anything else: a crash, a hang, a traceback, an unforeseen error,
a word on standard error that is not fastorgan's, labels of another grid.
"""

import argparse
import contextlib
import gzip
import io
import json
import os
import random
import resource
import select
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import nibabel as nib
import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "app"), str(ROOT)]

from fastorgan import cascade, roi  # noqa: E402
from fastorgan.cascade import Cascade  # noqa: E402
from fastorgan.predict import Job, Settings, run_batch  # noqa: E402
from fastorgan.report import Status  # noqa: E402
from fastorgan.volume import load_image, save_image  # noqa: E402
from fastorgan.weights import Weights  # noqa: E402
from tests.conftest import FakeRuntime, find_by_hu, label_by_hu  # noqa: E402

HANG_SECONDS = 10.0
MEMORY_BYTES = 2 << 30

Random = random.Random
Mutator = Callable[[bytes, Random], bytes]


# Good files


def base_image(rng: Random) -> nib.Nifti1Image:
    """A small CT: a block of each organ in air, upright or oblique, of any type."""
    codes = np.zeros((24, 20, 16), np.uint8)
    codes[14:22, 4:14, 5:13] = 1
    codes[2:6, 3:6, 3:8] = 2
    codes[2:8, 12:17, 7:13] = 3
    codes[9:13, 8:11, 6:9] = 4
    hu = np.array([-1000, 50, 120, 190, 260], np.int16)[codes]
    affine = np.diag([12.0, 12.0, 12.0, 1.0])
    if rng.random() < 0.3:
        affine[:3, :3] = affine[:3, :3] @ _turn(rng)
    dtype = rng.choice(["i2", ">i2", "f4", "f8", "u2", "i4"])
    values = (hu + 1024 if dtype == "u2" else hu).astype(dtype)
    kind: Any = rng.choice([nib.Nifti1Image, nib.Nifti1Image, nib.Nifti2Image])
    header = kind.header_class(endianness=">" if dtype.startswith(">") else "<")
    header.set_data_dtype(values.dtype)
    image: nib.Nifti1Image = kind(values, affine, header)
    if dtype == "u2":
        image.header.set_slope_inter(1.0, -1024.0)
    if rng.random() < 0.2:
        image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"x" * rng.randrange(200)))
    return image


def _turn(rng: Random) -> Any:
    a, b = rng.uniform(0, 6.3), rng.uniform(0, 6.3)
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_z = np.array([[np.cos(b), -np.sin(b), 0], [np.sin(b), np.cos(b), 0], [0, 0, 1]])
    return about_x @ about_z


def good_file(suffix: str, rng: Random, folder: Path) -> bytes:
    """The bytes of a good file of a kind; for .hdr, of its header, the voxels lying beside it."""
    image = base_image(rng)
    if suffix == ".hdr":
        pair: Any = nib.Nifti2Pair if isinstance(image, nib.Nifti2Image) else nib.Nifti1Pair
        nib.save(pair(np.asarray(image.dataobj), image.affine), folder / "case.hdr")
        return (folder / "case.hdr").read_bytes()
    if suffix in (".mha", ".nrrd"):
        save_image(nib.Nifti1Image(np.asarray(image.dataobj).astype("i2"), image.affine), folder / f"case{suffix}")
        content = (folder / f"case{suffix}").read_bytes()
        return _unpacked_text_header(content, suffix) if rng.random() < 0.5 else content
    return image.to_bytes()


def _unpacked_text_header(content: bytes, suffix: str) -> bytes:
    mark = b"LOCAL\n" if suffix == ".mha" else b"\n\n"
    end = content.index(mark) + len(mark)
    head = content[:end].replace(b"CompressedData = True", b"CompressedData = False")
    return head.replace(b"encoding: gzip", b"encoding: raw") + zlib.decompress(content[end:], 47)


# Mutations

NIFTI1_FIELDS = {
    **{f"dim{n}": (40 + 2 * n, "h") for n in range(8)},
    **{f"pixdim{n}": (76 + 4 * n, "f") for n in range(8)},
    "sizeof_hdr": (0, "i"),
    "intent": (68, "h"),
    "datatype": (70, "h"),
    "bitpix": (72, "h"),
    "vox_offset": (108, "f"),
    "slope": (112, "f"),
    "inter": (116, "f"),
    "units": (123, "b"),
    "qform_code": (252, "h"),
    "sform_code": (254, "h"),
    **{f"quatern{n}": (256 + 4 * n, "f") for n in range(6)},
    **{f"srow{n}": (280 + 4 * n, "f") for n in range(12)},
    "magic": (344, "i"),
    "extension": (348, "i"),
    "extension size": (352, "i"),
    "extension code": (356, "i"),
}

NIFTI2_FIELDS = {
    "sizeof_hdr": (0, "i"),
    "magic": (4, "q"),
    "datatype": (12, "h"),
    "bitpix": (14, "h"),
    **{f"dim{n}": (16 + 8 * n, "q") for n in range(8)},
    **{f"pixdim{n}": (104 + 8 * n, "d") for n in range(8)},
    "vox_offset": (168, "q"),
    "slope": (176, "d"),
    "inter": (184, "d"),
    "qform_code": (344, "i"),
    "sform_code": (348, "i"),
    **{f"quatern{n}": (352 + 8 * n, "d") for n in range(6)},
    **{f"srow{n}": (400 + 8 * n, "d") for n in range(12)},
    "intent": (504, "i"),
    "extension": (540, "i"),
    "extension size": (544, "i"),
}

DATATYPES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 768, 1024, 1280, 1536, 1792, 2048, 2304, 255, -1)


def _value(form: str, rng: Random) -> float | int:
    if form in "fd":
        most = 3e38 if form == "f" else 1e308
        plain = [0.0, -0.0, 1.0, -1.0, 0.5, 352.0, 353.0, 2.0**31, 1e-45, 1e-38, 1e-6, 1e-3, 1e3, 1e6, 1e18]
        odd = [most, -most, float("nan"), float("nan"), float("inf"), -float("inf")]
        return rng.choice([*plain, *odd, rng.uniform(-2, 2), rng.gauss(0, 1000)])
    bits = 8 * struct.calcsize(form)
    edge = rng.choice([0, 1, 2, 3, 4, 5, 7, 8, -1, -2, 2**15 - 1, 2**15, 2**16, 2**31 - 1, 2**31, 2**62, *DATATYPES])
    number = rng.choice([edge, edge, rng.getrandbits(bits), rng.randrange(40)]) & ((1 << bits) - 1)
    return number - (1 << bits) if number >> (bits - 1) else number


def change_fields(content: bytes, rng: Random) -> bytes:
    """Put odd values into header fields."""
    spoilt = bytearray(content)
    fields, order = _layout(content)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 6])):
        offset, form = rng.choice(list(fields.values()))
        with contextlib.suppress(struct.error):
            struct.pack_into(order + form, spoilt, offset, _value(form, rng))
    return bytes(spoilt)


def _layout(content: bytes) -> tuple[dict[str, tuple[int, str]], str]:
    order = "<" if int.from_bytes(content[:4], "little") in (348, 540) else ">"
    return (NIFTI2_FIELDS if 540 in (_int(content, "<"), _int(content, ">")) else NIFTI1_FIELDS), order


def _int(content: bytes, order: str) -> int:
    return int.from_bytes(content[:4], "little" if order == "<" else "big")


def change_axes(content: bytes, rng: Random) -> bytes:
    """Put another affine into the sform: a random one, sheared, flat, huge."""
    fields, order = _layout(content)
    spoilt = bytearray(content)
    kind = rng.randrange(4)
    matrix = np.array([[rng.gauss(0, 1) for _ in range(4)] for _ in range(3)])
    if kind == 1:
        matrix = matrix * np.array([10.0 ** rng.uniform(-3, 3) for _ in range(4)])
    elif kind == 2:
        matrix = np.eye(3, 4) * 12 + matrix * 10.0 ** rng.uniform(-2, 2)
    elif kind == 3:
        matrix[2] = matrix[0] * 2 + matrix[1] * 10.0 ** rng.uniform(-9, 0)
    with contextlib.suppress(struct.error):
        struct.pack_into(order + fields["sform_code"][1], spoilt, fields["sform_code"][0], 1)
        for n, number in enumerate(matrix.ravel()):
            offset, form = fields[f"srow{n}"]
            struct.pack_into(order + form, spoilt, offset, float(number))
    return bytes(spoilt)


def flip_bits(content: bytes, rng: Random) -> bytes:
    """Turn bits over, mostly in the header."""
    spoilt = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 4, 16, 64])):
        reach = min(len(spoilt), 400) if rng.random() < 0.7 else len(spoilt)
        if reach:
            spoilt[rng.randrange(reach)] ^= 1 << rng.randrange(8)
    return bytes(spoilt)


def cut(content: bytes, rng: Random) -> bytes:
    """End too soon."""
    return content[: rng.choice([rng.randrange(len(content) + 1), rng.randrange(min(600, len(content)) + 1)])]


def move_blocks(content: bytes, rng: Random) -> bytes:
    """Leave out, repeat, or put in a run of bytes."""
    start = rng.randrange(len(content) + 1)
    length = rng.choice([1, 2, 4, 16, 100, 4096])
    part = rng.choice([content[start : start + length], bytes(length), b"\xff" * length, rng.randbytes(length)])
    if rng.random() < 0.5:
        return content[:start] + part + content[start:]
    return content[:start] + rng.choice([b"", part]) + content[start + length :]


def change_text(content: bytes, rng: Random) -> bytes:
    """Change a text header's words and lines."""
    end = max(content.find(b"LOCAL\n") + 6, content.find(b"\n\n") + 2)
    lines = content[:end].splitlines(keepends=True)
    for _ in range(rng.choice([1, 1, 2, 3])):
        if not lines:
            break
        n = rng.randrange(len(lines))
        words = lines[n].split(b" ")
        action = rng.randrange(5)
        if action == 0:
            del lines[n]
        elif action == 1:
            lines.insert(rng.randrange(len(lines) + 1), lines[n])
        elif action == 2:
            words[rng.randrange(len(words))] = rng.choice(ODD_WORDS)
            lines[n] = b" ".join(words) + b"\n" * rng.randrange(2)
        elif action == 3:
            lines[n] = lines[n].swapcase()
        else:
            lines[n] = lines[n].replace(b"\n", b" " + rng.choice(ODD_WORDS) + b"\n")
    return b"".join(lines) + content[end:]


ODD_NUMBERS = b"0 -1 1 2 3 7 256 65536 2147483648 4294967296 9223372036854775807 9999999999999999999 1e400 -1e-400"
ODD_WORDS = (
    *ODD_NUMBERS.split(),
    *b"nan inf -inf none True False LOCAL LIST raw gzip ascii MET_FLOAT MET_DOUBLE MET_OTHER uint8 double".split(),
    *b"(1,0,0) (nan,0,0) (1e-9,0,0) (1,1,1) 1;2 ../../etc/passwd %s%n %d \xff\xfe \0 : := = #".split(b" "),
    "½٣".encode(),
    b"1" * 5000,
)

BINARY: tuple[Mutator, ...] = (change_fields, change_fields, change_fields, change_axes, flip_bits, cut, move_blocks)
TEXT: tuple[Mutator, ...] = (change_text, change_text, change_text, flip_bits, cut, move_blocks)
STREAM: tuple[Mutator, ...] = (flip_bits, cut, move_blocks)


def make_case(seed: int, number: int, folder: Path) -> Path:
    """Write the case of a seed and a number; the same ones give the same bytes."""
    rng = Random(f"{seed}:{number}")
    suffix = rng.choice([".nii", ".nii", ".nii.gz", ".nii.gz", ".hdr", ".mha", ".nrrd"])
    content = good_file(suffix, rng, folder)
    mutators = TEXT if suffix in (".mha", ".nrrd") else BINARY
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        content = rng.choice(mutators)(content, rng)
    if suffix == ".nii.gz":
        content = _packed(content, rng)
    path = folder / f"case{suffix}"
    path.write_bytes(content)
    return path


def _packed(content: bytes, rng: Random) -> bytes:
    packed = gzip.compress(content, 1, mtime=0)
    kind = rng.randrange(6)
    if kind < 2:
        return rng.choice(STREAM)(packed, rng)
    if kind == 2:
        return packed + rng.choice([bytes(99), rng.randbytes(99), gzip.compress(rng.randbytes(9), mtime=0), packed])
    if kind == 3:
        half = rng.randrange(len(content) + 1)
        return gzip.compress(content[:half], 1, mtime=0) + gzip.compress(content[half:], 1, mtime=0)
    return packed


# One case


def run_case(path: Path, target: Path, cascade_: Cascade) -> list[str]:
    """Segment one file as the command does; returns what is wrong with how that went."""
    said, told = io.StringIO(), io.StringIO()
    wrong = []
    before = set(target.parent.iterdir())
    try:
        with (
            warnings.catch_warnings(record=True) as warned,
            contextlib.redirect_stderr(said),
            contextlib.redirect_stdout(told),
            patch.object(Cascade, "load", lambda *_, **__: cascade_),
        ):
            warnings.simplefilter("always")
            record = run_batch([Job(path, target)], Settings(device="cpu", jobs=1)).cases[0]
    except BaseException:
        return [f"traceback: {traceback.format_exc()}"]
    lines = said.getvalue().splitlines()
    # They would be printed on standard error, with our source's names.
    wrong += [f"warned: {w.message}" for w in warned if issubclass(w.category, RuntimeWarning | UserWarning)]
    wrong += [f"said: {line}" for line in lines if not line.startswith("fastorgan: ")]
    left = set(target.parent.iterdir()) - before
    if record.status is Status.FAILED:
        error = record.error or ""
        if "unexpectedly" in error:
            wrong.append(f"unforeseen: {error}")
        if not error.startswith(str(path)) or lines != [f"fastorgan: {error}"]:
            wrong.append(f"not one line that names the file: {lines}")
        if left:
            wrong.append(f"left behind: {left}")
        return wrong
    if left != {target}:
        return [*wrong, f"left behind: {left}"]
    scan, labels = load_image(path), load_image(target)
    if scan.shape != labels.shape or not np.allclose(scan.affine, labels.affine, rtol=1e-4, atol=1e-3):
        wrong.append(f"labels of another grid: {scan.shape} {labels.shape} {scan.affine} {labels.affine}")
    if labels.get_data_dtype() != np.uint8 or int(np.asarray(labels.dataobj).max()) > 4:
        wrong.append("labels that are none")
    if record.organs is None:
        wrong.append("no measures")
    return wrong


@contextlib.contextmanager
def fake_cascade() -> Iterator[Cascade]:
    """The tests' cascade that knows organs by their HU, with small networks."""
    networks = {"roi": {"variant": "slim", "sha256": {"roi.xml": "ab"}}}
    with patch.object(roi, "ROI_SIZE", (24, 24, 24)), patch.object(cascade, "CROP_SIZE", (24, 32, 48)):
        yield Cascade(
            FakeRuntime(find_by_hu, label_by_hu), Weights(Path("nowhere"), {"version": "0", "networks": networks})
        )


def work(seed: int, first: int, stop: int) -> None:
    """Run cases in this process; one line to standard output before each and one after."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    out = sys.stdout
    with fake_cascade() as known:
        for number in range(first, stop):
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                (folder / "out").mkdir()
                path = make_case(seed, number, folder)
                print(json.dumps({"begun": number}), file=out, flush=True)
                begun = time.process_time()
                wrong = run_case(path, folder / "out" / "case.nii.gz", known)
                seconds = time.process_time() - begun
                done = (folder / "out" / "case.nii.gz").exists()
            line = {"ended": number, "kind": path.name[4:], "done": done, "wrong": wrong, "seconds": seconds}
            print(json.dumps(line), file=out, flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(json.dumps({"peak_mib": peak}), file=out, flush=True)


# All cases


@dataclass
class Outcome:
    """What came of the cases.

    Attributes:
        cases, labelled: by kind of file; how many there were, and how many ended with labels.
        findings: number of the case and what was wrong.
        slowest: processor seconds of the slowest case.
        peak_mib: highest resident memory of a worker.
    """

    cases: Counter[str] = field(default_factory=Counter)
    labelled: Counter[str] = field(default_factory=Counter)
    findings: list[tuple[int, str]] = field(default_factory=list)
    slowest: float = 0.0
    peak_mib: int = 0


class Clock:
    """How long a process has been at something, in its processor's time: others may keep it waiting."""

    def __init__(self, process: int, limit: float) -> None:
        self.process = process
        self.limit = limit
        self.begun = self._processor_seconds()
        self.at = time.monotonic()

    def overdue(self) -> bool:
        """Whether it took longer than the limit; or, waiting for nothing, many times as long."""
        busy = self._processor_seconds() - self.begun
        return busy > self.limit or time.monotonic() - self.at > 12 * self.limit

    def _processor_seconds(self) -> float:
        try:
            fields = Path(f"/proc/{self.process}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def fuzz(seed: int, count: int, first: int = 0) -> Outcome:
    """Run cases in bounded processes; a crash or a hang is a finding, and the next process goes on behind it."""
    outcome = Outcome()
    number, stop = first, first + count
    while number < stop:
        command = [sys.executable, __file__, "--worker", str(seed), str(number), str(stop)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0) as worker:
            try:
                number = _watch(worker, number, stop, outcome)
            finally:
                worker.kill()
    return outcome


def _watch(worker: "subprocess.Popen[bytes]", number: int, stop: int, outcome: Outcome) -> int:
    """Read a worker's lines until it ends or is overdue; returns the number of the case to go on with."""
    assert worker.stdout is not None
    assert worker.stderr is not None
    pending, clock = b"", Clock(worker.pid, 60.0)  # for Python and its packages to start
    while True:
        ready, _, _ = select.select([worker.stdout], [], [], 0.5)
        if not ready:
            if clock.overdue():
                outcome.findings.append((number, "hang"))
                return number + 1
            continue
        part = worker.stdout.read(1 << 16)
        if not part:
            if number < stop:
                worker.wait()
                said = worker.stderr.read().decode(errors="replace")[-500:]
                outcome.findings.append((number, f"crash: exit code {worker.returncode}: {said}"))
            return number + 1
        clock = Clock(worker.pid, HANG_SECONDS)
        *lines, pending = (pending + part).split(b"\n")
        for line in map(json.loads, lines):
            if "peak_mib" in line:
                outcome.peak_mib = max(outcome.peak_mib, line["peak_mib"])
            if "ended" in line:
                number = line["ended"] + 1
                outcome.cases[line["kind"]] += 1
                outcome.labelled[line["kind"]] += line["done"]
                outcome.slowest = max(outcome.slowest, line["seconds"])
                outcome.findings += [(line["ended"], wrong) for wrong in line["wrong"]]
                if line["seconds"] > HANG_SECONDS:
                    outcome.findings.append((line["ended"], f"hang: {line['seconds']:.1f} s of the processor"))


def main() -> int:
    """Run from the command line; 1 if there are findings."""
    parser = argparse.ArgumentParser(description="Fuzz the reading of volumes.")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the files of findings")
    parser.add_argument("--worker", nargs=3, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(*options.worker)
        return 0
    begun = time.perf_counter()
    outcome = fuzz(options.seed, options.count, options.first)
    for number, wrong in outcome.findings:
        print(f"case {number} of seed {options.seed}: {wrong}")
        if options.keep is not None:
            (options.keep / str(number)).mkdir(parents=True, exist_ok=True)
            make_case(options.seed, number, options.keep / str(number))
    for kind in sorted(outcome.cases):
        print(f"{kind}: {outcome.cases[kind]} cases, {outcome.labelled[kind]} labelled, the others refused")
    print(
        f"{sum(outcome.cases.values())} cases, {len(outcome.findings)} findings, slowest {outcome.slowest:.2f} s, "
        f"peak {outcome.peak_mib} MiB, {time.perf_counter() - begun:.0f} s in all"
    )
    return 1 if outcome.findings else 0


if __name__ == "__main__":
    sys.exit(main())
