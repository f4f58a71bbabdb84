"""Where the wall time of a whole `docker run` goes: python3 docker/split.py IMAGE CT [--runs N]

Each run is a fresh container with one case, as the organisers have it. The container's own part is that of a run of
`true` beside it; the stages come from the run report; what remains is Python's start with its imports, and its end.
Needs only Python and Docker.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CLOSED = ("--network", "none", "--read-only", "--cap-drop", "ALL", "--tmpfs", "/tmp")


def main() -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", help="such as fastorgan:cpu")
    parser.add_argument("ct", type=Path, help="a CT (.nii.gz)")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="after one that is not counted (default: 3)")
    options = parser.parse_args()
    try:
        runs = measure(options.image, options.ct, options.runs)
    except subprocess.CalledProcessError as error:
        print(f"split.py: {error.stderr.strip()}", file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:
        print(f"split.py: {error}", file=sys.stderr)
        return 2
    print(f"{options.ct.name} by {options.image}, seconds, median of {len(runs)} runs (least to most):")
    for stage in runs[0]:
        times = [run[stage] for run in runs]
        print(f"  {stage:<28}{statistics.median(times):7.2f}  ({min(times):.2f} to {max(times):.2f})")
    return 0


def measure(image: str, ct: Path, runs: int) -> list[dict[str, float]]:
    """Run a case in `runs` containers, after one that warms the caches.

    Returns:
        Per run seconds by stage in the order of the work; they add up to the last, the wall time of `docker run`.

    Raises:
        ValueError: if `runs` is not positive.
        OSError: if the CT cannot be read, or there is no Docker.
        subprocess.CalledProcessError: if a container fails.
    """
    if runs < 1:
        raise ValueError(f"{runs} runs: at least one is needed")
    with tempfile.TemporaryDirectory() as folder:
        inputs, outputs = Path(folder, "inputs"), Path(folder, "outputs")
        inputs.mkdir()
        outputs.mkdir()
        shutil.copyfile(ct, inputs / ct.name)
        owner = f"{os.getuid()}:{os.getgid()}"
        start = ["docker", "run", "--rm", *CLOSED, "--user", owner]
        case = [*start, "-v", f"{inputs}:/inputs:ro", "-v", f"{outputs}:/outputs", image]
        _seconds(case)
        return [_split(_seconds([*start, image, "true"]), _seconds(case), outputs / "run.json") for _ in range(runs)]


def _split(container: float, wall: float, report: Path) -> dict[str, float]:
    content = json.loads(report.read_text(encoding="utf-8"))
    stages: dict[str, float] = dict(content["cases"][0]["seconds"])
    load, total = float(content["load_seconds"]), float(content["total_seconds"])
    return {
        "container's start and end": container,
        "Python's start and imports": wall - container - total,
        "engine and networks": load,
        **stages,
        "between the stages": total - load - sum(stages.values()),
        "docker run": wall,
    }


def _seconds(command: list[str]) -> float:
    begun = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, text=True)
    return time.perf_counter() - begun


if __name__ == "__main__":
    sys.exit(main())
