"""How much memory this process may still take: what the machine, its control groups and its limits leave."""

import os
from collections.abc import Iterator
from pathlib import Path

from .errors import VolumeError

MIB = 1 << 20


def check_memory(needed: int, what: str) -> None:
    """Refuse work that does not fit, before it is begun: Linux grants memory that is not there and kills later.

    Args:
        needed: bytes.
        what: begins the message, such as a file's name and a colon.

    Raises:
        VolumeError: if more is needed than `available_bytes`; never where that is not known.
    """
    free = available_bytes()
    if free is not None and needed > free:
        raise VolumeError(f"{what} need {needed / MIB:.0f} MiB of memory, but only {free / MIB:.0f} MiB are free")


def available_bytes(root: Path = Path("/")) -> int | None:
    """Bytes that the process may still take, page cache that would make room included; None where nothing tells.

    The least of the machine's available memory, what each control group above the process (version 1 or 2) has left,
    and what `ulimit -v` leaves of the address space.

    Args:
        root: folder that holds `proc` and `sys`.
    """
    known = [free for free in (_machine(root), *_control_groups(root), _address_space(root)) if free is not None]
    return max(0, min(known)) if known else None


def _machine(root: Path) -> int | None:
    values = _table(root / "proc/meminfo")
    return values["MemAvailable:"] * 1024 if "MemAvailable:" in values else None


def _control_groups(root: Path) -> Iterator[int | None]:
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers == "":
            top, limit, used, cache = root / "sys/fs/cgroup", "memory.max", "memory.current", "file"
        elif "memory" in controllers.split(","):
            top, limit = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
            used, cache = "memory.usage_in_bytes", "total_cache"
        else:
            continue
        # Within a container the path may be the host's; the folder above all is then the container's own group.
        folder = top / place.strip("/")
        for group in (folder, *folder.parents):
            if not group.is_relative_to(top):
                break
            most, now = _number(group / limit), _number(group / used)
            if most is not None and now is not None:
                yield most - now + _table(group / "memory.stat").get(cache, 0)


def _address_space(root: Path) -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return None
    try:
        pages = int((root / "proc/self/statm").read_text(encoding="ascii").split()[0])
    except (OSError, ValueError, IndexError):
        return limit
    return limit - pages * os.sysconf("SC_PAGE_SIZE")


def _number(path: Path) -> int | None:
    """The number that a file holds; None if there is none, as `max` says."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _table(path: Path) -> dict[str, int]:
    """First word to second, of each line whose second word is a number."""
    try:
        rows = [line.split() for line in path.read_text(encoding="ascii", errors="replace").splitlines()]
    except OSError:
        return {}
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdecimal()}
