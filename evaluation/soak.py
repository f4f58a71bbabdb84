"""Many cases through one process, to see whether its memory grows."""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

from fastorgan.errors import FastorganError
from fastorgan.monitor import ResidentMemory
from fastorgan.volume import make_folder

SETTLED = 5
"""After so many cases the memory counts as settled: engines keep what they once took."""

MOST_GROWTH = 0.10
"""By which the memory may have grown at the end, as a share of the settled memory."""


class SoakError(FastorganError):
    """The cases cannot be run, or not all of them were done."""


@dataclass(frozen=True)
class Growth:
    """Resident memory after each case.

    Attributes:
        rss_mib: in MiB, in the order of the cases.
    """

    rss_mib: tuple[float, ...]

    @property
    def share(self) -> float:
        """How much more there is after the last case than after the first `SETTLED`, as a share of that."""
        return self.rss_mib[-1] / self.rss_mib[SETTLED - 1] - 1.0

    def text(self) -> str:
        """One line for people."""
        settled, last, most = self.rss_mib[SETTLED - 1], self.rss_mib[-1], max(self.rss_mib)
        return (
            f"RSS after case {SETTLED}: {settled:.0f} MiB; after case {len(self.rss_mib)}: {last:.0f} MiB "
            f"({self.share:+.1%}); highest: {most:.0f} MiB"
        )

    def course(self) -> str:
        """The memory at ten moments, which tells whether it still grows at the end."""
        cases = [max(1, round(len(self.rss_mib) * tenth / 10)) for tenth in range(1, 11)]
        return ", ".join(f"{case}: {self.rss_mib[case - 1]:.0f}" for case in cases)


def soak(sources: Sequence[Path], cases: int, options: Sequence[str] = ()) -> Growth:
    """Run `fastorgan predict` once on many cases and read its memory after each.

    Args:
        sources: CT files, taken in turns.
        cases: how many, more than `SETTLED`.
        options: further ones of `fastorgan predict`.

    Raises:
        SoakError: if a case is not done.
    """
    if cases <= SETTLED:
        raise SoakError(f"{cases} cases tell nothing; give more than {SETTLED}")
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "in"
        make_folder(inputs)
        for number, source in enumerate(islice(cycle(sources), cases)):
            suffix = ".nii.gz" if source.name.endswith(".nii.gz") else ".nii"
            (inputs / f"case{number:04}{suffix}").symlink_to(source.resolve())
        command = [sys.executable, "-m", "fastorgan", "predict", str(inputs), str(Path(folder) / "out"), *options]
        # What it says of a case goes to standard output; warnings go elsewhere, lest a full pipe stop it.
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            rss = tuple(_after_each_case(process))
        if process.returncode != 0 or len(rss) != cases:
            raise SoakError(f"{len(rss)} of {cases} cases were done (exit code {process.returncode})")
    return Growth(rss)


def _after_each_case(process: "subprocess.Popen[str]") -> Iterator[float]:
    memory = ResidentMemory(Path(f"/proc/{process.pid}"))
    last = 0.0
    for line in process.stdout or ():
        if re.match(r"\[\d+/\d+\] ", line):
            # The last line may be read after the process' end, when it has no memory any more.
            last = memory.read()[0] or last
            yield last
