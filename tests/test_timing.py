import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from evaluation import timing
from evaluation.__main__ import main
from evaluation.efficiency import Measurement
from evaluation.timing import (
    Bench,
    Card,
    Container,
    HostSampler,
    PsutilHost,
    TimingError,
    find_cases,
    open_card,
    prepare,
    team_of,
    time_cases,
    with_tag,
)
from fastorgan.errors import DeviceError
from fastorgan.monitor import MIB

ROOT = Path(__file__).parents[1]

NO_GPU = Card(None, None, None, "no NVIDIA driver answers here")

DOCKER = """\
# A Docker of one image, team:latest, whose program does to a case what the case's name says.
import json, os, pathlib, signal, sys, time

state, words = pathlib.Path(sys.argv[1]), sys.argv[2:]
with (state / "calls").open("a") as calls:
    calls.write(json.dumps(words) + "\\n")


def fail(code, text):
    print(text, file=sys.stderr)
    sys.exit(code)


if words[:2] == ["image", "inspect"]:
    if words[-1] not in ("team:latest", "registry:5000/lab/team:1"):
        fail(1, "Error: No such image: " + words[-1])
    sys.exit(0)
if words[:2] == ["container", "inspect"]:
    sys.exit(0 if (state / words[-1]).exists() else 1)
if words[:2] == ["container", "rm"]:
    if (state / "stubborn").exists():
        time.sleep(60)
    os.kill(int((state / words[-1]).read_text()), signal.SIGKILL)
    (state / words[-1]).unlink()
    sys.exit(0)
assert words[:2] == ["container", "run"], words
assert words[-3:] == ["/bin/bash", "-c", "sh predict.sh"], words
mounts = [words[i + 1].split(":") for i, word in enumerate(words) if word == "-v"]
folders = {inside: pathlib.Path(outside) for outside, inside in mounts}
inputs, outputs = folders["/workspace/inputs/"], folders["/workspace/outputs/"]
(case,) = inputs.iterdir()
label = outputs / case.name.replace("_0000.nii.gz", ".nii.gz")
what = case.name.split("_")[0]
print("segmenting", case.name, flush=True)
(state / "modes").write_text(oct(outputs.stat().st_mode & 0o777))
assert not any(outputs.iterdir())
if what == "unstarted":
    fail(125, "docker: could not select device driver.\\n\\nRun 'docker run --help' for more information")
if what == "crash":
    fail(3, "Traceback\\nMemoryError")
if what == "hang":
    container = state / words[words.index("--name") + 1]
    container.with_suffix(".new").write_text(str(os.getpid()))
    container.with_suffix(".new").rename(container)
    time.sleep(60)
if what == "link":
    label.symlink_to(case)
elif what != "silent":
    label.write_bytes(b"labels of " + case.read_bytes())
if what == "litter":
    (inputs / "nnUNet_raw").mkdir()
    (outputs / "plans.json").write_text("{}")
    (outputs / "extra.nii.gz").write_text("")
if what == "change":
    case.write_bytes(b"other")
if what == "take":
    case.unlink()
if what == "slow":
    time.sleep(0.4)
"""


@pytest.fixture
def docker(tmp_path: Path) -> tuple[str, ...]:
    """The command of a Docker that keeps its state in tmp_path/state."""
    (tmp_path / "state").mkdir()
    (tmp_path / "docker.py").write_text(DOCKER)
    return sys.executable, "-I", "-S", str(tmp_path / "docker.py"), str(tmp_path / "state")


def calls(folder: Path) -> list[list[str]]:
    return [json.loads(line) for line in (folder / "state" / "calls").read_text().splitlines()]


def cases(folder: Path, *names: str) -> Path:
    inputs = folder / "cases"
    inputs.mkdir()
    for name in names:
        (inputs / f"{name}.nii.gz").write_bytes(name.encode())
    return inputs


class RecordedHost:
    """Plays CPU seconds (user, system, idle, since the host's start) back, the last for ever; RAM grows by 1 MiB."""

    def __init__(self, *cpu: tuple[float, float, float]) -> None:
        self.cpu = list(cpu) or [(0.0, 0.0, 0.0)]
        self.asked = 0
        self.ram = 1000.0

    def cpu_seconds(self) -> tuple[float, float, float]:
        self.asked += 1
        return self.cpu[min(self.asked, len(self.cpu)) - 1]

    def ram_mib(self) -> float:
        self.ram += 1.0
        return self.ram


def bench(docker: tuple[str, ...], limit_s: float = 30.0, **container: Any) -> Bench:
    return Bench(Container("team:latest", "team", docker=docker, **container), NO_GPU, RecordedHost(), limit_s)


def measure(tests: Bench, folder: Path, name: str) -> Measurement:
    prepare(tests, folder / "out")
    (run,) = time_cases(tests, find_cases(cases(folder, name)), folder / "out")
    return run


class RecordedNvml:
    """Two cards of 12 GiB; the second has 1500.5 MiB in use."""

    def uuids(self) -> Sequence[str]:
        return "GPU-0", "GPU-1"

    def name(self, uuid: str) -> str:
        return f"card {uuid[-1]}"

    def memory(self, uuid: str) -> tuple[int, int]:
        total = 12 * 1024 * MIB
        return total, total - (1500 * MIB + MIB // 2 if uuid == "GPU-1" else 0)

    def process_memory(self, uuid: str, pid: int) -> int | None:
        raise AssertionError("the whole card counts")

    def close(self) -> None: ...


class Empty(RecordedNvml):
    def uuids(self) -> Sequence[str]:
        return ()


def no_driver() -> RecordedNvml:
    raise DeviceError("no NVIDIA driver answers here (NVML: Driver Not Loaded)")


@pytest.mark.parametrize(
    ("form", "written"),
    [
        (
            "flare21",
            'docker container run --gpus="device=1" --name team --rm -v $PWD/inputs/:/workspace/inputs/ '
            '-v $PWD/outputs/:/workspace/outputs/ team:latest /bin/bash -c "sh predict.sh" ',
        ),
        (
            "flare23",
            'docker container run --shm-size=28gb -m 28G --gpus="device=1" --name team --rm '
            "-v $PWD/inputs/:/workspace/inputs/ -v $PWD/outputs/:/workspace/outputs/ team:latest "
            '/bin/bash -c "sh predict.sh" ',
        ),
    ],
)
def test_command_is_the_organisers(form: timing.Form, written: str) -> None:
    container = Container("team:latest", "team", 1, form)
    assert container.command("$PWD/inputs", "$PWD/outputs") == shlex.split(written)


def test_command_without_a_gpu() -> None:
    words = Container("a:b", "team", None, docker=("sudo", "docker")).command(Path("/i"), Path("/o"))
    assert words == shlex.split(
        "sudo docker container run --name team --rm -v /i/:/workspace/inputs/ -v /o/:/workspace/outputs/ a:b "
        '/bin/bash -c "sh predict.sh"'
    )


@pytest.mark.parametrize(
    ("image", "tagged", "team"),
    [
        ("team", "team:latest", "team"),
        ("team:cpu", "team:cpu", "team"),
        ("registry:5000/lab/team", "registry:5000/lab/team:latest", "team"),
        ("lab/team@sha256:ab", "lab/team@sha256:ab", "team"),
        ("lab/team:1@sha256:ab", "lab/team:1@sha256:ab", "team"),
    ],
)
def test_names_of_images(image: str, tagged: str, team: str) -> None:
    assert with_tag(image) == tagged
    assert team_of(image) == team


def test_cases_in_the_order_of_their_names(tmp_path: Path) -> None:
    inputs = cases(tmp_path, "b_0000", "a_0000", "._a_0000")
    (inputs / "notes.txt").touch()
    assert find_cases(inputs) == [inputs / "a_0000.nii.gz", inputs / "b_0000.nii.gz"]
    assert find_cases(inputs / "b_0000.nii.gz") == [inputs / "b_0000.nii.gz"]


def test_cases_that_cannot_be(tmp_path: Path) -> None:
    inputs = cases(tmp_path, "a_0000", "a")
    with pytest.raises(TimingError, match=r"both would become a\.nii\.gz"):
        find_cases(inputs)
    with pytest.raises(TimingError, match="gone: no such file or folder"):
        find_cases(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    (tmp_path / "ct.nii").touch()
    for path in (tmp_path / "empty", tmp_path / "ct.nii"):
        with pytest.raises(TimingError, match=r"no \*\.nii\.gz file"):
            find_cases(path)


def test_the_card_is_counted_along_the_bus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    card = open_card(1, RecordedNvml)
    assert (card.gpu, card.name, card.reason) == (1, "card 1", None)
    assert card.used_mib is not None
    assert card.used_mib() == 1500.5
    first = open_card("auto", RecordedNvml)
    assert (first.gpu, first.name) == (0, "card 0")


def test_no_card_and_why() -> None:
    assert open_card("none", RecordedNvml).reason == "the containers get no GPU (--gpu none)"
    for gpu, passed_on in (("auto", None), (1, 1)):
        card = open_card(gpu, no_driver)  # type: ignore[arg-type]
        assert (card.gpu, card.used_mib) == (passed_on, None)
        assert card.reason == "no NVIDIA driver answers here (NVML: Driver Not Loaded)"
    empty = open_card("auto", Empty)
    assert (empty.gpu, empty.reason) == (None, "the NVIDIA driver lists no device")
    with pytest.raises(TimingError, match=r"--gpu 2: the NVIDIA driver lists 2 device\(s\), counted from 0"):
        open_card(2, RecordedNvml)


class Pace:
    """A clock that pauses move on; after `pauses` of them the sampler waits until the test lets it go."""

    def __init__(self, pauses: int) -> None:
        self.now = 100.0
        self.asked_for: list[float] = []
        self.left = pauses
        self.used_up, self.go = threading.Event(), threading.Event()

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.asked_for.append(seconds)
        if not self.left:
            self.used_up.set()
            assert self.go.wait(10)
            return
        self.left -= 1
        self.now += seconds


def test_sampler_reads_all_three_every_tenth_of_a_second() -> None:
    pace = Pace(3)
    host = RecordedHost((10.0, 5.0, 100.0), (10.0, 5.0, 100.2), (10.1, 5.1, 100.2), (10.15, 5.15, 100.3))
    memory = iter([500.0, 500.0, 2500.0, 0.0])
    with HostSampler(Card(0, "card", lambda: next(memory), None), host, clock=pace.clock, sleep=pace.sleep) as sampler:
        assert pace.used_up.wait(10)
        readings, note = sampler.readings, sampler.gpu_note
        pace.go.set()
    assert set(pace.asked_for) == {0.1}
    assert [reading.seconds for reading in readings] == pytest.approx([0.1, 0.2, 0.3])
    assert [reading.gpu_mib for reading in readings] == [500.0, 500.0, 2500.0]
    assert [reading.ram_mib for reading in readings] == [1001.0, 1002.0, 1003.0]
    # The first looks back on the pause before it: idle. 100 - 100 * 0.2 / 0.3, 100, 100 - 100 * 0.1 / 0.3.
    assert [reading.cpu_percent for reading in readings] == pytest.approx([100 / 3, 100.0, 200 / 3])
    assert note is None


def test_sampler_says_why_readings_are_missing() -> None:
    pace = Pace(4)
    answers: Iterator[float | Exception] = iter([500.0, RuntimeError("Unknown Error"), RuntimeError(), 700.0, 0.0])

    def used_mib() -> float:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with HostSampler(Card(0, "card", used_mib, None), RecordedHost(), clock=pace.clock, sleep=pace.sleep) as sampler:
        assert pace.used_up.wait(10)
        readings, note = sampler.readings, sampler.gpu_note
        pace.go.set()
    assert [reading.gpu_mib for reading in readings] == [500.0, None, None, 700.0]
    assert note == "2 of 4 readings failed (RuntimeError)"


def test_the_real_host() -> None:
    host = PsutilHost()
    before = host.cpu_seconds()
    until = time.perf_counter() + 0.2
    while time.perf_counter() < until:
        pass
    after = host.cpu_seconds()
    assert all(later >= earlier for earlier, later in zip(before, after, strict=True))
    total_mib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / MIB
    assert 10 < host.ram_mib() < total_mib


def test_psutil_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(TimingError, match=r"psutil is not installed; pip install 'fastorgan\[evaluation\]'"):
        PsutilHost()


def test_one_container_a_case(docker: tuple[str, ...], tmp_path: Path) -> None:
    inputs = cases(tmp_path, "slow_2_0000", "good_1")
    out = tmp_path / "out"
    tests = bench(docker)
    prepare(tests, out)
    good, slow = time_cases(tests, find_cases(inputs), out)
    assert (good.case, slow.case) == ("good_1", "slow_2_0000")
    assert good.problems == slow.problems == ()
    assert good.exit_code == slow.exit_code == 0
    assert slow.seconds >= 0.4
    # One reading before the container, then one every 0.1 s and a bit.
    assert 2 <= len(slow.readings) <= 2 + slow.seconds / 0.1
    assert slow.gpu_note == NO_GPU.reason
    # The _0000 is off the labels' names, and nothing else is in their folder.
    assert sorted(path.name for path in out.iterdir()) == ["efficiency", "good_1.nii.gz", "slow_2.nii.gz"]
    assert (out / "slow_2.nii.gz").read_bytes() == b"labels of slow_2_0000"
    assert sorted(path.name for path in (out / "efficiency").iterdir()) == [
        *(f"good_1.{suffix}" for suffix in ("json", "log", "png")),
        *(f"slow_2_0000.{suffix}" for suffix in ("json", "log", "png")),
        *(f"team_flare{year}_Efficiency.csv" for year in (21, 22, 23)),
    ]
    with (out / "efficiency" / "team_flare21_Efficiency.csv").open() as stream:
        rows = list(csv.reader(stream))
    assert rows[1:] == [["good_1", repr(good.seconds), "0.0", "0.0"], ["slow_2_0000", repr(slow.seconds), "0.0", "0.0"]]
    assert (out / "efficiency" / "good_1.log").read_text() == "segmenting good_1.nii.gz\n"
    # The originals stay.
    assert sorted(path.name for path in inputs.iterdir()) == ["good_1.nii.gz", "slow_2_0000.nii.gz"]
    run = calls(tmp_path)[2]
    assert run[:6] == ["container", "run", "--name", "team", "--rm", "-v"]
    assert run[6].startswith(str(out))
    assert run[6].endswith("/inputs/:/workspace/inputs/")


@pytest.mark.parametrize(("form", "mode"), [("flare21", 0o777 & ~0o022), ("flare23", 0o777)])
def test_flare23_lets_every_user_write(form: str, mode: int, docker: tuple[str, ...], tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        measure(bench(docker, form=form), tmp_path, "good")
    finally:
        os.umask(before)
    assert (tmp_path / "state" / "modes").read_text() == oct(mode)


@pytest.mark.parametrize(
    ("name", "problems"),
    [
        ("crash_1_0000", ("exit code 3 (MemoryError)", "no crash_1.nii.gz in outputs")),
        ("silent_1_0000", ("no silent_1.nii.gz in outputs",)),
        ("litter_1_0000", ("left nnUNet_raw in inputs", "left extra.nii.gz, plans.json in outputs")),
        ("change_1_0000", ("changed change_1_0000.nii.gz in inputs",)),
        ("take_1_0000", ("took take_1_0000.nii.gz out of inputs",)),
        ("link_1_0000", ("no link_1.nii.gz in outputs",)),
        ("unstarted_1_0000", ("not run (docker: could not select device driver.)",)),
    ],
)
def test_problems(name: str, problems: tuple[str, ...], docker: tuple[str, ...], tmp_path: Path) -> None:
    run = measure(bench(docker), tmp_path, name)
    assert run.problems == problems
    assert json.loads((tmp_path / "out" / "efficiency" / f"{name}.json").read_text())["problems"] == list(problems)
    # Labels that are there are kept; other files are not.
    labels = [f"{name[:-5]}.nii.gz"] if not any(problem.startswith(("no ", "not ")) for problem in problems) else []
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"efficiency", *labels}
    # As with the organisers, a case that failed by itself is in the files.
    assert (tmp_path / "out" / "efficiency" / "team_flare22_Efficiency.csv").exists() == (run.exit_code != 125)


def test_a_container_that_hangs_is_removed(docker: tuple[str, ...], tmp_path: Path) -> None:
    run = measure(bench(docker, limit_s=0.5), tmp_path, "hang_0000")
    assert run.hung
    assert 0.5 <= run.seconds < 10
    assert run.problems == ("stopped after 0.5 s, counts as 3600 s", "no hang.nii.gz in outputs")
    assert calls(tmp_path)[-1] == ["container", "rm", "--force", "team"]
    row = (tmp_path / "out" / "efficiency" / "team_flare22_Efficiency.csv").read_text().splitlines()[1]
    assert row.split(",")[:4] == ["hang_0000.nii.gz", "3600.0", "0.0", "29491200.0"]
    assert row.split(",")[5] == "360000.0"


def test_a_docker_that_hangs_itself_is_killed(
    docker: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tests = bench(docker, limit_s=0.3)
    prepare(tests, tmp_path / "out")
    (tmp_path / "state" / "stubborn").touch()
    monkeypatch.setattr(timing, "STOPPING_S", 0.3)
    (run,) = time_cases(tests, find_cases(cases(tmp_path, "hang_0000")), tmp_path / "out")
    assert run.hung
    assert run.seconds < 10


def test_output_folder_must_be_new(docker: tuple[str, ...], tmp_path: Path) -> None:
    tests = bench(docker)
    (tmp_path / "old").mkdir()
    prepare(tests, tmp_path / "old")  # empty
    with pytest.raises(TimingError, match="old: not empty; choose a new folder"):
        prepare(tests, tmp_path / "old")
    (tmp_path / "file").touch()
    with pytest.raises(TimingError, match="file: cannot be used as a folder"):
        prepare(tests, tmp_path / "file")
    with pytest.raises(TimingError, match="Docker mounts no path with a colon"):
        prepare(tests, tmp_path / "a:b")


def test_name_that_is_taken(docker: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "state" / "team").touch()
    with pytest.raises(TimingError, match="a container is already called team"):
        prepare(bench(docker), tmp_path / "out")


def test_ct_that_cannot_be_read(docker: tuple[str, ...], tmp_path: Path) -> None:
    tests = bench(docker)
    prepare(tests, tmp_path / "out")
    with pytest.raises(TimingError, match=r"gone_0000\.nii\.gz: No such file"):
        list(time_cases(tests, [tmp_path / "gone_0000.nii.gz"], tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["efficiency"]


def arguments(docker: tuple[str, ...], image: str, inputs: Path, *more: str) -> list[str]:
    out = str(inputs.parent / "out")
    return ["time", image, str(inputs), out, "--gpu", "none", "--docker", shlex.join(docker), *more]


def test_command_line(docker: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = cases(tmp_path, "crash_a_0000", "good_b_0000", "unstarted_c_0000")
    assert main(arguments(docker, "team", inputs, "--form", "flare23", "--name", "try")) == 2
    out, err = capsys.readouterr()
    command, gpu, header, crash, good, mean, files = out.splitlines()
    assert command == (
        f"{shlex.join(docker)} container run --shm-size=28gb -m 28G --name try --rm -v inputs/:/workspace/inputs/ "
        "-v outputs/:/workspace/outputs/ team:latest /bin/bash -c 'sh predict.sh'"
    )
    assert gpu == "GPU columns are 0: the containers get no GPU (--gpu none)"
    assert "GPU max MiB" in header
    # The other cases are run, and the one that Docker could not run is no measurement.
    assert [line.split()[0] for line in (crash, good, mean)] == ["crash_a_0000", "good_b_0000", "mean"]
    assert files.endswith(str(tmp_path / "out" / "efficiency"))
    assert err.splitlines() == [
        "error: crash_a_0000: exit code 3 (MemoryError); no crash_a.nii.gz in outputs",
        "error: unstarted_c_0000: not run (docker: could not select device driver.)",
    ]
    assert (tmp_path / "out" / "good_b.nii.gz").exists()
    with (tmp_path / "out" / "efficiency" / "team_flare23_Efficiency.csv").open() as stream:
        assert [row[0] for row in csv.reader(stream)] == ["Name", "crash_a_0000.nii.gz", "good_b_0000.nii.gz"]


def test_command_line_without_a_problem(docker: tuple[str, ...], tmp_path: Path) -> None:
    assert main(arguments(docker, "registry:5000/lab/team:1", cases(tmp_path, "good_0000"))) == 0
    assert "team" in calls(tmp_path)[-1]
    assert (tmp_path / "out" / "efficiency" / "team_flare21_Efficiency.csv").exists()


@pytest.mark.parametrize(
    ("image", "docker_command", "reason"),
    [
        (
            "gone",
            None,
            "gone:latest: Docker does not find the image; build it or `docker image load` it first "
            "(Error: No such image: gone:latest)",
        ),
        ("team", "no-such-docker", "no-such-docker: cannot be run (No such file or directory); is Docker installed?"),
    ],
)
def test_mistakes_are_one_line(
    image: str,
    docker_command: str | None,
    reason: str,
    docker: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = arguments(docker, image, cases(tmp_path, "good"))
    assert main(words if docker_command is None else [*words, "--docker", docker_command]) == 2
    assert capsys.readouterr() == ("", f"error: {reason}\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--gpu", "first"], "'first' is neither a card's number nor auto or none"),
        (["--gpu=-1"], "'-1' is neither"),
        (["--limit", "0"], "'0' is not a positive number of seconds"),
        (["--limit", "nan"], "'nan' is not"),
        (["--limit", "soon"], "'soon' is not"),
        (["--form", "flare99"], "invalid choice"),
    ],
)
def test_words_that_are_not_understood(options: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["time", "team", "inputs", "outputs", *options])
    assert reason in capsys.readouterr().err


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["time", "--help"])
    assert "  python -m evaluation time " in capsys.readouterr().out


def test_no_container_is_left_running_on_sigterm(docker: tuple[str, ...], tmp_path: Path) -> None:
    container = tmp_path / "state" / "team"
    process = subprocess.Popen(
        [sys.executable, "-m", "evaluation", *arguments(docker, "team", cases(tmp_path, "hang_0000"))],
        cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'app'}"},
        stdout=subprocess.DEVNULL,
    )
    try:
        until = time.monotonic() + 30
        while not container.exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        pid = int(container.read_text())
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 143
    finally:
        process.kill()
        process.wait()
    assert calls(tmp_path)[-1] == ["container", "rm", "--force", "team"]
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    # Nor is its private folder.
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["efficiency"]
