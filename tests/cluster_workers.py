"""Workers without networks, which a cluster's processes import."""

import os
import time
from pathlib import Path

from fastorgan.cluster import Facts
from fastorgan.errors import WeightsError
from fastorgan.predict import Job, Settings
from fastorgan.report import CaseRecord, Engine, Status


class Stub:
    """A worker that notes each case that it begins, and does with it what its name says."""

    def __init__(self, settings: Settings) -> None:
        pass

    def load(self) -> Facts:
        return Facts(Engine("fake", "1", "cpu", "test processor", "f32", 1), {"roi.xml": "ab"}, ())

    def run(self, job: Job) -> CaseRecord:
        name = job.source.name
        with job.target.with_name(f"{name}.begun").open("a") as notes:
            notes.write(f"{os.getpid()} ")
        times = len(job.target.with_name(f"{name}.begun").read_text().split())
        time.sleep(0.3 if "slow" in name else 0.05)
        if "meeting" in name:
            # meeting3_0 waits until three workers are at work.
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and len(_begun_by(job.target.parent)) < int(name[7]):
                time.sleep(0.05)
        if "deadly" in name or ("unlucky" in name and times == 1):
            os._exit(9)
        if "broken" in name:
            return CaseRecord(str(job.source), Status.FAILED, error=f"{job.source}: broken")
        job.target.write_text("labels")
        return CaseRecord(str(job.source), Status.DONE, str(job.target))


def _begun_by(folder: Path) -> set[str]:
    """The processes that have begun any case."""
    return {process for notes in folder.glob("*.begun") for process in notes.read_text().split()}


class Unfit(Stub):
    """A worker without weights."""

    def load(self) -> Facts:
        raise WeightsError("weights: no such folder")


class Unstartable(Stub):
    """A worker on a machine that lacks a package."""

    def __init__(self, settings: Settings) -> None:
        raise ModuleNotFoundError("No module named 'absent'")
