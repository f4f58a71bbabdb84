"""The cluster is Ray's own, of two nodes on this machine; all but the last test has workers without networks."""

import csv
import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from fastorgan import cluster
from fastorgan.cluster import Cluster, ClusterError, run_on_cluster
from fastorgan.errors import FastorganError, WeightsError
from fastorgan.predict import Job, Settings
from fastorgan.report import CaseRecord, Status
from tests.child_process import ended
from tests.cluster_workers import Stub, Unfit, Unstartable

ROOT = Path(__file__).parents[1]

SETTINGS = Settings(device="cpu", threads=1, jobs=2)


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Any]:
    """A Ray cluster of two nodes with one core each."""
    pytest.importorskip("ray", reason="--cluster needs the extra cluster")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # The workers' processes get it from the nodes that start them.
    os.environ["PYTHONPATH"] = os.pathsep.join((str(ROOT / "app"), str(ROOT)))
    from ray.cluster_utils import Cluster as Nodes

    nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes.add_node(num_cpus=1)
    yield nodes
    nodes.shutdown()  # type: ignore[no-untyped-call]
    del os.environ["PYTHONPATH"]


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "Worker", Stub)


def cases(folder: Path, *names: str) -> list[Job]:
    return [Job(folder / name, folder / f"{name}.labels") for name in names]


def begun(folder: Path, name: str) -> list[str]:
    """The processes that began a case."""
    return (folder / f"{name}.begun").read_text().split()


def run(nodes: Any, jobs: list[Job], **settings: Any) -> list[CaseRecord]:
    from dataclasses import replace

    with Cluster(nodes.address, replace(SETTINGS, **settings)) as found:
        found.facts()
        return list(found.records(jobs))


@pytest.mark.slow
@pytest.mark.usefixtures("stubs")
def test_cases_are_shared_out_and_their_records_come_in_order(two_nodes: Any, tmp_path: Path) -> None:
    # The first worker waits with its two until the other one is there.
    names = ["meeting2_0", "meeting2_1", "slow0", *(f"c{i}" for i in range(9)), "broken", "slow1"]
    records = run(two_nodes, cases(tmp_path, *names))
    assert [Path(record.input).name for record in records] == names
    assert [record.status for record in records] == [
        Status.FAILED if name == "broken" else Status.DONE for name in names
    ]
    # Two workers, and every case begun once.
    assert len({process for name in names for process in begun(tmp_path, name)}) == 2
    assert all(len(begun(tmp_path, name)) == 1 for name in names)


@pytest.mark.slow
@pytest.mark.usefixtures("stubs")
def test_cases_of_a_worker_that_died_are_done_by_another(two_nodes: Any, tmp_path: Path) -> None:
    names = [*(f"c{i}" for i in range(6)), "unlucky", *(f"d{i}" for i in range(6))]
    records = run(two_nodes, cases(tmp_path, *names))
    assert [Path(record.input).name for record in records] == names
    assert {record.status for record in records} == {Status.DONE}
    first, second = begun(tmp_path, "unlucky")
    assert first != second


@pytest.mark.slow
@pytest.mark.usefixtures("stubs")
def test_a_case_that_kills_every_worker_fails_alone(two_nodes: Any, tmp_path: Path) -> None:
    names = ["c0", "deadly", *(f"c{i}" for i in range(1, 8))]
    records = run(two_nodes, cases(tmp_path, *names))
    (failed,) = [record for record in records if record.status is Status.FAILED]
    assert failed.error is not None
    assert f"{tmp_path / 'deadly'}: its worker died 3 times" in failed.error
    assert "\n" not in failed.error
    assert len(begun(tmp_path, "deadly")) == 3
    assert sum(record.status is Status.DONE for record in records) == len(names) - 1


@pytest.mark.slow
@pytest.mark.usefixtures("stubs")
def test_a_node_that_goes_is_done_without_and_one_that_comes_is_used(two_nodes: Any, tmp_path: Path) -> None:
    extra = two_nodes.add_node(num_cpus=1)
    names = [*(f"meeting3_{i}" for i in range(4)), *(f"slow{i}" for i in range(36))]
    with Cluster(two_nodes.address, SETTINGS) as found:
        found.facts()
        records = []
        for record in found.records(cases(tmp_path, *names)):
            records.append(record)
            if len(records) == 8:
                two_nodes.remove_node(extra)
                two_nodes.add_node(num_cpus=1)
    assert [Path(record.input).name for record in records] == names
    assert {record.status for record in records} == {Status.DONE}
    assert len({process for name in names for process in begun(tmp_path, name)}) >= 3


@pytest.mark.slow
def test_why_no_worker_can_load_its_networks_is_said(
    two_nodes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "Worker", Unfit)
    with pytest.raises(WeightsError, match="weights: no such folder"):
        run(two_nodes, cases(tmp_path, "c0"))


@pytest.mark.slow
def test_workers_that_never_start_end_the_run_with_the_reason(
    two_nodes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "Worker", Unstartable)
    with pytest.raises(ClusterError, match=r"workers do not come up \(ModuleNotFoundError: No module named 'absent'\)"):
        run(two_nodes, cases(tmp_path, "c0"))


@pytest.mark.slow
@pytest.mark.usefixtures("stubs")
def test_a_run_that_no_machine_has_room_for_gives_up(
    two_nodes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "PATIENCE_S", 1.0)
    with pytest.raises(ClusterError, match=r"no worker came up in 1 s; each needs .*CPU.* 64.*free"):
        run(two_nodes, cases(tmp_path, "c0"), threads=64)


@pytest.mark.slow
@pytest.mark.usefixtures("stubs")
def test_one_report_has_every_case_once(two_nodes: Any, tmp_path: Path) -> None:
    from dataclasses import replace

    jobs = cases(tmp_path / "out", "c0", "broken", "c1")
    report = run_on_cluster(jobs, replace(SETTINGS, report=tmp_path / "run.json"), two_nodes.address)
    assert [case.status for case in report.cases] == [Status.DONE, Status.FAILED, Status.DONE]
    stored = json.loads((tmp_path / "run.json").read_text())
    assert stored["counts"] == {"done": 2, "failed": 1, "skipped": 0}
    assert [case["input"] for case in stored["cases"]] == [str(job.source) for job in jobs]
    assert stored["engine"]["name"] == "fake"


class Halt(BaseException):
    """What a signal's handler raises."""


@pytest.mark.slow
@pytest.mark.usefixtures("stubs")
def test_a_sigterm_ends_the_run_by_the_commands_handler_and_not_rays(two_nodes: Any, tmp_path: Path) -> None:
    def halt(*_: object) -> None:
        raise Halt

    before = signal.signal(signal.SIGTERM, halt)
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM))
    try:
        with Cluster(two_nodes.address, SETTINGS) as found:
            found.facts()
            timer.start()
            with pytest.raises(Halt):
                # Waits for more workers than there are.
                list(found.records(cases(tmp_path, "meeting9_0")))
    finally:
        timer.join()
        signal.signal(signal.SIGTERM, before)


def test_no_cluster_at_an_address_is_said_in_one_line(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="--cluster needs the extra cluster")
    with (
        pytest.raises(ClusterError, match=r"nonsense://x: no Ray cluster answers") as caught,
        Cluster("nonsense://x", SETTINGS),
    ):
        pass
    assert "\n" not in str(caught.value)


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(FastorganError, match=r"pip install 'fastorgan\[cluster\]'"):
        Cluster("local", SETTINGS)


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "weights" / "organs.xml").is_file(), reason="no released weights")
def test_the_command_survives_a_killed_worker(
    two_nodes: Any, tmp_path: Path, blocks: tuple[nib.Nifti1Image, NDArray[np.uint8]]
) -> None:
    import psutil

    (tmp_path / "in").mkdir()
    names = [f"case{i:02d}" for i in range(16)]
    for name in names:
        nib.save(blocks[0], tmp_path / "in" / f"{name}_0000.nii.gz")
    command = [sys.executable, "-m", "fastorgan", "predict", "in", "out", "--cluster", two_nodes.address]
    command += ["--threads", "1", "--report", "run.json", "--page", "report.html", "--statistics", "organs.csv"]
    environment = {**os.environ, "PYTHONFAULTHANDLER": "1"}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 180
        while len(list((tmp_path / "out").glob("case*"))) < 3:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        workers = [
            worker
            for worker in psutil.process_iter(["cmdline"])
            if "ray::Worker" in " ".join(worker.info["cmdline"] or ())
        ]
        assert len(workers) >= 2
        os.kill(workers[0].pid, signal.SIGKILL)
        output, errors = ended(process, 300)
    assert process.returncode == 0, errors
    # No half-written file of the killed worker either.
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"{name}.nii.gz" for name in names]
    stored = json.loads((tmp_path / "run.json").read_text())
    assert [Path(case["input"]).name for case in stored["cases"]] == [f"{name}_0000.nii.gz" for name in names]
    assert stored["counts"]["done"] == len(names)
    assert output.count("out/case") == len(names)
    first, *others = (gzip.decompress((tmp_path / "out" / f"{name}.nii.gz").read_bytes()) for name in names)
    assert all(first == other for other in others)
    # What is gathered on the workers' side reaches the page and the table.
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(f"{name}.nii.gz" in page for name in names)
    with (tmp_path / "organs.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["case"] for row in rows[::4]] == names
    assert len(rows) == 4 * len(names)
