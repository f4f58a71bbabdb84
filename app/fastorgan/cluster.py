"""Cases over many machines by Ray: workers that keep the networks loaded, and one process that hands out the cases.

A worker reads a case, segments it and writes its labels itself, so that input and output folders must be there under
the same path on every machine; nothing but the case's record comes back. Whoever hands out the cases knows where each
is: those of a worker that died go to another. Needs Ray, which the extra `cluster` brings, on every machine.
"""

import logging
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from .cascade import Cascade
from .errors import FastorganError
from .files import remove_abandoned
from .monitor import MemoryPeak, MemorySampler
from .predict import Job, Settings, note_cases, run_case
from .report import CaseRecord, Engine, RunReport, Status
from .runtime import resolve_device
from .volume import make_folder

ATTEMPTS = 3
"""How many workers may die over a case until it counts as failed."""

CORES = 2
"""Of a worker without a GPU, where `--threads` says nothing else."""

STARTS = 6
"""How many workers in a row may die before they are ready until the run gives up."""

WAIT_S = 2.0
"""How often machines that came or went are looked for."""

PATIENCE_S = 300.0
"""How long there may be no worker at all before the run gives up."""


class ClusterError(FastorganError):
    """No cluster is there, or no worker came up on it."""


def run_on_cluster(jobs: Sequence[Job], settings: Settings, address: str) -> RunReport:
    """As `predict.run_batch`, on a cluster: one worker for each GPU, or for every `settings.threads` cores.

    Args:
        jobs: cases, under paths that all machines have.
        settings: of the run; `jobs` is the number of cases that a worker has at a time.
        address: as `Cluster` takes it.

    Returns:
        The report of all cases; its engine is the first worker's, its peaks of memory are a worker's highest.

    Raises:
        FastorganError: if no case can run.
    """
    begun = time.perf_counter()
    folders = sorted({job.target.parent for job in jobs})
    for folder in folders:
        make_folder(folder)
        remove_abandoned(folder)
    settings.outputs.begin(folders)
    with Cluster(address, settings) as cluster:
        facts = cluster.facts()
        report = RunReport(facts.engine, facts.weights, settings.options, planned=len(jobs))
        report.warnings += facts.faults
        report.load_seconds = time.perf_counter() - begun
        if settings.report is not None:
            report.write(settings.report)
        note_cases(report, jobs, cluster.records(jobs), settings)
    for folder in folders:
        # Of workers that died.
        remove_abandoned(folder)
    report.memory = _highest([case.memory for case in report.cases])
    report.total_seconds = time.perf_counter() - begun
    if settings.report is not None:
        report.write(settings.report)
    settings.outputs.end(report)
    return report


@dataclass(frozen=True)
class Facts:
    """What a worker says of itself once its networks are loaded."""

    engine: Engine
    weights: dict[str, str]
    faults: tuple[str, ...]


class Worker:
    """One process on one machine of the cluster, its networks loaded, working on `settings.jobs` cases at a time."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        device = resolve_device(settings.device, settings.engine)
        self._sampler = MemorySampler(int(device.removeprefix("cuda:")) if device != "cpu" else None)
        self._sampler.__enter__()
        self._loaded: Future[Cascade] = Future()

    def load(self) -> Facts:
        """Load the networks."""
        settings = self._settings
        cascade = Cascade.load(
            settings.device, engine=settings.engine, threads=settings.threads, weights=settings.weights
        )
        self._loaded.set_result(cascade)
        return Facts(cascade.engine, dict(cascade.weights.sha256), tuple(cascade.faults))

    def run(self, job: Job) -> CaseRecord:
        """Segment one case and write its labels."""
        return run_case(self._loaded, job, self._sampler, self._settings)


@dataclass
class _Hand:
    """A worker as the one who hands out the cases sees it: its cases by the reference of their record to come."""

    actor: Any
    loading: Any
    ready: bool = False
    cases: dict[Any, int] = field(default_factory=dict)


class Cluster:
    """Hands out cases over a Ray cluster, within a `with` block.

    Args:
        address: "local" starts a cluster of this machine alone; "auto" takes the one that this machine belongs to;
            "ray://HOST:10001" one elsewhere.
        settings: of the run.

    Raises:
        ClusterError: if Ray is not installed, or no cluster answers.
    """

    def __init__(self, address: str, settings: Settings) -> None:
        self._ray = _ray()
        self._address = address
        self._settings = settings
        self._hands: list[_Hand] = []
        self._stillborn = 0

    def __enter__(self) -> "Cluster":
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if self._address == "local":
            options["include_dashboard"] = False
        elif self._address.startswith("ray://"):
            options = {}
        on_term = signal.getsignal(signal.SIGTERM)
        try:
            self._ray.init(self._address, **options)
        except Exception as error:
            # Ray and gRPC have many ways to say that nobody answers.
            raise ClusterError(f"{self._address}: no Ray cluster answers ({_one_line(error)})") from error
        finally:
            # Ray's own handler ends the process without a chance to put anything in order.
            if threading.current_thread() is threading.main_thread() and on_term is not None:
                signal.signal(signal.SIGTERM, on_term)
        on_gpus = self._settings.device.startswith("cuda") or (
            self._settings.device == "auto" and self._ray.cluster_resources().get("GPU", 0) >= 1
        )
        # Ray shows each worker its own card alone, as the first.
        threads = self._settings.threads or (None if on_gpus else CORES)
        self._settings = replace(self._settings, device="cuda" if on_gpus else "cpu", threads=threads)
        self._needs = {"GPU": 1.0} if on_gpus else {"CPU": float(threads or CORES)}
        return self

    def __exit__(self, *_: object) -> None:
        for hand in self._hands:
            with suppress(Exception):
                self._ray.kill(hand.actor)
        self._ray.shutdown()

    def facts(self) -> Facts:
        """Wait for the first worker and return what it says of itself.

        Raises:
            FastorganError: why workers cannot load their networks, if none can, or that there are none.
        """
        since = time.monotonic()
        while True:
            self._enlist()
            loading = [hand.loading for hand in self._hands if not hand.ready]
            done = self._wait(loading)
            for hand in [hand for hand in self._hands if hand.loading in done]:
                facts = self._greet(hand)
                if facts is not None:
                    return facts
            if time.monotonic() - since > PATIENCE_S:
                raise ClusterError(
                    f"{self._address}: no worker came up in {PATIENCE_S:.0f} s; each needs {self._needs} free, and "
                    "fastorgan installed there"
                )

    def records(self, jobs: Sequence[Job]) -> Iterator[CaseRecord]:
        """Work on all cases and yield their records in the order of `jobs`, each once.

        Raises:
            ClusterError: if all workers are gone and none comes back.
        """
        shared = [job.absolute() for job in jobs]
        waiting = deque(range(len(jobs)))
        deaths = [0] * len(jobs)
        finished: dict[int, CaseRecord] = {}
        following = 0
        alone = looked = time.monotonic()
        while following < len(jobs):
            if time.monotonic() - looked > WAIT_S:
                looked = time.monotonic()
                self._enlist()
            for hand in self._hands:
                while hand.ready and waiting and self._has_room(hand, deaths, waiting[0]):
                    index = waiting.popleft()
                    hand.cases[hand.actor.run.remote(shared[index])] = index
            watched = [ref for hand in self._hands for ref in ([*hand.cases] if hand.ready else [hand.loading])]
            if any(hand.ready for hand in self._hands):
                alone = time.monotonic()
            elif time.monotonic() - alone > PATIENCE_S:
                raise ClusterError(f"{self._address}: all workers are gone, and none came back in {PATIENCE_S:.0f} s")
            for ref in self._wait(watched):
                hand = next(hand for hand in self._hands if ref == hand.loading or ref in hand.cases)
                if ref == hand.loading:
                    self._greet(hand)
                    continue
                index = hand.cases[ref]
                try:
                    finished[index] = _as_given(self._ray.get(ref), jobs[index])
                    del hand.cases[ref]
                except self._ray.exceptions.RayActorError as error:
                    waiting.extend(self._bury(hand, deaths, finished, jobs, error))
            while following in finished:
                yield finished.pop(following)
                following += 1

    def _wait(self, refs: list[Any]) -> list[Any]:
        """Those that are there, as soon as one is, or none after `WAIT_S`."""
        if not refs:
            time.sleep(WAIT_S)
            return []
        try:
            done: list[Any] = self._ray.wait(refs, timeout=WAIT_S)[0]
        except SystemError as error:
            # Ray's compiled code wraps what a signal's handler raises.
            if isinstance(error.__cause__, BaseException) and not isinstance(error.__cause__, Exception):
                raise error.__cause__ from None
            raise
        return done

    def _has_room(self, hand: _Hand, deaths: list[int], index: int) -> bool:
        """Whether a worker may take a case; one over which a worker died is worked on alone, lest it take others."""
        if deaths[index] or any(deaths[other] for other in hand.cases.values()):
            return not hand.cases
        return len(hand.cases) < self._settings.jobs

    def _bury(
        self,
        hand: _Hand,
        deaths: list[int],
        finished: dict[int, CaseRecord],
        jobs: Sequence[Job],
        error: Exception,
    ) -> list[int]:
        """Strike a dead worker off; returns its cases that are to be tried again."""
        self._hands.remove(hand)
        again = []
        for ref, index in hand.cases.items():
            # What was done before it died has been sent.
            with suppress(Exception):
                if self._ray.wait([ref], timeout=0)[0]:
                    finished[index] = _as_given(self._ray.get(ref), jobs[index])
                    continue
            deaths[index] += 1
            if deaths[index] < ATTEMPTS:
                again.append(index)
                continue
            text = f"{jobs[index].source}: its worker died {ATTEMPTS} times ({_one_line(error)[:200]})"
            finished[index] = CaseRecord(str(jobs[index].source), Status.FAILED, error=text)
        return again

    def _enlist(self) -> None:
        """Ask for as many workers as the cluster's machines have room for."""
        room = sum(
            int(node["Resources"].get(name, 0) // count)
            for node in self._ray.nodes()
            if node["Alive"]
            for name, count in self._needs.items()
        )
        for _ in range(room - len(self._hands)):
            # The one who hands out the cases sees to what is to be done when a worker dies, and not Ray.
            worker = self._ray.remote(
                num_cpus=self._needs.get("CPU", 1),
                num_gpus=self._needs.get("GPU", 0),
                max_concurrency=self._settings.jobs,
            )(Worker)
            actor = worker.remote(self._settings)
            self._hands.append(_Hand(actor, actor.load.remote()))

    def _greet(self, hand: _Hand) -> Facts | None:
        """Take a worker on, if it could load its networks; else strike it off.

        Raises:
            FastorganError: why it cannot load them, or that one worker after another dies before it is ready.
        """
        try:
            facts: Facts = self._ray.get(hand.loading)
        except self._ray.exceptions.RayActorError as error:
            self._hands.remove(hand)
            self._stillborn += 1
            if self._stillborn >= STARTS:
                raise ClusterError(f"{self._address}: workers do not come up ({_reason(error)})") from error
            return None
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause
            # No other worker on the same machine would do better, nor would this one later: the run ends.
            if isinstance(cause, FastorganError):
                raise cause from error
            raise ClusterError(f"a worker cannot load its networks ({_one_line(error)})") from error
        hand.ready = True
        self._stillborn = 0
        return facts


def _as_given(record: CaseRecord, job: Job) -> CaseRecord:
    """The record with the names that the user gave, not those that the workers were given."""
    return replace(record, input=str(job.source), output=None if record.output is None else str(job.target))


def _highest(peaks: Sequence[MemoryPeak]) -> MemoryPeak:
    def of(name: str) -> float | None:
        known = [value for peak in peaks if (value := getattr(peak, name)) is not None]
        return max(known, default=None)

    notes = dict.fromkeys(peak.gpu_note for peak in peaks if peak.gpu_note is not None)
    return MemoryPeak(of("device_mib"), of("process_mib"), of("rss_mib"), next(iter(notes), None))


def _ray() -> Any:
    # Nothing about a hospital's runs is anybody's business.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise ClusterError("--cluster needs Ray: pip install 'fastorgan[cluster]'") from error
    logging.getLogger("ray").setLevel(logging.ERROR)
    return ray


def _reason(error: BaseException) -> str:
    """The line of a worker's last words that says why it died."""
    lines = [line.strip() for line in str(error).splitlines() if "Error: " in line]
    return lines[-1][:300] if lines else _one_line(error)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
