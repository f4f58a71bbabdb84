"""Ask whether a known weakness is in the locked packages: python3 docker/audit.py [LOCK ...]

Runs pip-audit (pip install pip-audit) on each lock file, by default those of the image for CPUs and of its build. Exit
code 1: one is known. 0: none is, or nobody could be asked, which is said: a build must not hang on a server's health.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

LOCKS = ("requirements-cpu.txt", "requirements-build.txt", "requirements-sbom.txt")
LIMIT_S = 120


def verdict(name: str, report: dict[str, Any]) -> tuple[list[str], bool]:
    """Sum up pip-audit's JSON for one lock file.

    Returns:
        Lines to print, and whether a weakness is known.
    """
    packages = report["dependencies"]
    asked = [package for package in packages if "skip_reason" not in package]
    lines = [
        f"{name}: {package['name']} {package['version']}: {weakness['id']}"
        + (f", mended in {', '.join(weakness['fix_versions'])}" if weakness.get("fix_versions") else "")
        for package in asked
        for weakness in package["vulns"]
    ]
    if lines:
        return lines, True
    if len(asked) < len(packages):
        return [f"{name}: {len(packages) - len(asked)} of {len(packages)} packages could not be asked about"], False
    return [f"{name}: no weakness is known in {len(packages)} packages"], False


def audit(lock: Path) -> tuple[list[str], bool]:
    """Run pip-audit on a lock file; where it does not answer, that is the one line."""
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(lock), "--require-hashes", "--disable-pip"]
    try:
        run = subprocess.run(
            [*command, "--format", "json", "--progress-spinner", "off"],
            check=False,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
        return verdict(lock.name, json.loads(run.stdout))
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return [f"{lock.name}: pip-audit did not answer, so nothing is known"], False


def main() -> int:
    """Audit each lock file."""
    locks = [Path(name) for name in sys.argv[1:]] or [Path(__file__).parent / name for name in LOCKS]
    known = False
    for lock in locks:
        lines, found = audit(lock)
        print(*lines, sep="\n", flush=True)
        known |= found
    return int(known)


if __name__ == "__main__":
    sys.exit(main())
