import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch

from fastorgan.errors import DeviceError
from tests.child_process import ended
from tests.synthetic_cache import write_cache
from training.checkpoint import CHECKPOINT, read_checkpoint
from training.log import LOG
from training.world import ALONE, joined

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")

NOTED = """
import json, os, sys
from pathlib import Path
import torch
from training import fit
from training.__main__ import main

class Noted(fit.Run):
    def fit(self):
        draw, seen = self.sampler.draw, []
        def note(scan):
            seen.append(scan.source.name)
            return draw(scan)
        self.sampler.draw = note
        result = super().fit()
        sums = {k: float(v.double().sum()) for k, v in self.exported().items()}
        text = json.dumps({"seen": seen, "weights": sums, "seconds": self.seconds, "draw": self.random.random()})
        Path(self.plan.out, f"rank{self.world.rank}.json").write_text(text)
        return result

fit.Run = Noted
sys.exit(main(sys.argv[1:]))
"""
"""`python -m training`, with a note of each process' samples and final weights."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("cache"), ("p0", "p1", "p2", "p3", "p4"))


def environment() -> dict[str, str]:
    paths = os.pathsep.join((str(ROOT / "app"), str(ROOT)))
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}


def arguments(cache: Path, out: Path, *more: str) -> list[str]:
    return ["fit", "organs", "--data", str(cache), "--out", str(out), "--size", "24", "24", "32", *more]


@contextlib.contextmanager
def two_processes(tmp_path: Path, *command: str) -> Iterator["subprocess.Popen[str]"]:
    script = tmp_path / "noted.py"
    script.write_text(NOTED)
    with subprocess.Popen(
        [*TORCHRUN, "--nproc-per-node", "2", str(script), *command],
        env=environment(),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        yield process


def run_two(tmp_path: Path, *command: str) -> None:
    with two_processes(tmp_path, *command) as process:
        _, errors = ended(process, 300)
    assert process.returncode == 0, errors


def read_log(out: Path) -> list[dict[str, str]]:
    with (out / LOG).open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_alone_every_meeting_is_with_oneself() -> None:
    network = torch.nn.BatchNorm3d(1)
    assert ALONE.gather("a") == ["a"]
    assert ALONE.share("a") == "a"
    assert ALONE.greatest(1.0, 2.0) == (1.0, 2.0)
    assert ALONE.mean({"a": 3.0}) == {"a": 3.0}
    assert ALONE.parallel(network) is network
    ALONE.level_statistics(network)


def test_without_a_launcher_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    # As SLURM's and MPI's own environments may say.
    monkeypatch.setenv("WORLD_SIZE", "4")
    with joined("cuda:3") as world:
        assert world is ALONE


def test_one_card_for_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(DeviceError, match="cuda:1: several processes cannot share it"), joined("cuda:1"):
        pass
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(DeviceError, match="1 GPUs for 2 processes on this machine"), joined("cuda"):
        pass


MEETINGS = """
import torch
from training.world import joined

def meet(world):
    assert world.size == 2 and world.first is (world.rank == 0)
    assert world.gather(f"of {world.rank}") == ["of 0", "of 1"]
    assert world.share(f"of {world.rank}") == "of 0"
    assert world.greatest(world.rank, -world.rank) == (1.0, 0.0)
    assert world.mean({"a": 1.0 + world.rank} | ({"b": 7.0} if world.rank else {})) == {"a": 1.5, "b": 7.0}
    norm = torch.nn.BatchNorm3d(2)
    norm.running_mean.fill_(4.0 * world.rank)
    world.level_statistics(norm)
    assert norm.running_mean.tolist() == [2.0, 2.0] and norm.running_var.tolist() == [1.0, 1.0]
    linear = torch.nn.Linear(1, 1, bias=False)
    linear.weight.data.fill_(3.0 + world.rank)
    parallel = world.parallel(linear)
    parallel(torch.full((1, 1), 1.0 + 2.0 * world.rank)).sum().backward()
    # Rank 0's weight, and the mean of the inputs 1 and 3 as its gradient.
    assert linear.weight.item() == 3.0 and linear.weight.grad.item() == 2.0

with joined("cpu") as world:
    meet(world)
"""


@pytest.mark.slow
def test_two_processes_meet(tmp_path: Path) -> None:
    (tmp_path / "meet.py").write_text(MEETINGS)
    done = subprocess.run(
        [*TORCHRUN, "--nproc-per-node", "2", str(tmp_path / "meet.py")],
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_two_processes_share_a_run_and_a_resumed_one_is_the_same(cache: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_two(tmp_path, *arguments(cache, whole, "--steps", "6", "--fold", "0", "5"))
    notes = [json.loads((whole / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    # Four patients are left: after two steps each has been seen once, by one of the two, and again after two more.
    seen = [pair for step in zip(notes[0]["seen"], notes[1]["seen"], strict=True) for pair in step]
    assert len(seen) == 12
    for first in (0, 4, 8):
        assert sorted(seen[first : first + 4]) == ["case1", "case2", "case3", "case4"]
    # One network, one clock, but chance of their own.
    assert notes[0]["weights"] == notes[1]["weights"]
    assert notes[0]["seconds"] == notes[1]["seconds"]
    assert notes[0]["draw"] != notes[1]["draw"]
    # One log and one checkpoint.
    rows = read_log(whole)
    assert [row["step"] for row in rows if row["dice_liver"]] == ["1", "2", "3", "4", "5", "6"]
    assert [row["step"] for row in rows if row["loss"]] == ["6"]
    assert sorted(path.name for path in whole.iterdir()) == [CHECKPOINT, LOG, "rank0.json", "rank1.json"]

    # A slice of no length is one step.
    run_two(tmp_path, *arguments(cache, parts, "--steps", "6", "--fold", "0", "5", "--slice", "1e-9"))
    run_two(tmp_path, *arguments(cache, parts, "--steps", "6", "--fold", "0", "5"))
    states = [read_checkpoint(folder / CHECKPOINT, CPU) for folder in (whole, parts)]
    assert states[0]["step"] == states[1]["step"] == 6
    for key, value in states[0]["network"].items():
        assert torch.equal(value, states[1]["network"][key]), key
    assert states[0]["random"] == states[1]["random"]
    assert states[0]["other_ranks"][0]["random"] == states[1]["other_ranks"][0]["random"]


@pytest.mark.slow
def test_a_terminated_run_goes_on_with_fewer_processes_and_with_more(cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with two_processes(tmp_path, *arguments(cache, out, "--minutes", "5")) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("organs: step 1"):
                break
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        _, errors = ended(process, 120)
    assert process.returncode != 0
    lines = [line for line in errors.splitlines() if line.startswith("training:")]
    step = read_checkpoint(out / CHECKPOINT, CPU)["step"]
    assert step >= 1
    assert lines == [f"training: stopped by SIGTERM, saved at step {step}; the same command goes on from there"]
    # With one process, and with two again.
    alone = [sys.executable, "-m", "training", *arguments(cache, out, "--steps", str(step + 1), "--threads", "1")]
    subprocess.run(alone, env=environment(), cwd=tmp_path, check=True, capture_output=True)
    assert read_checkpoint(out / CHECKPOINT, CPU)["other_ranks"] == []
    run_two(tmp_path, *arguments(cache, out, "--steps", str(step + 2)))
    assert read_checkpoint(out / CHECKPOINT, CPU)["step"] == step + 2
