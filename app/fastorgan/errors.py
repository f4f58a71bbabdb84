"""What can go wrong for a reason that the user can mend."""

from .console import printable


class FastorganError(Exception):
    """Base of every error that fastorgan raises on purpose; its text is one line, fit to be shown as it is."""

    def __str__(self) -> str:
        # It names files, and a file's name may hold line breaks and a terminal's commands.
        return printable(super().__str__())


class VolumeError(FastorganError):
    """A file is missing, damaged, or not a three-dimensional CT volume."""


class DeviceError(FastorganError):
    """The device asked for is not there, or its engine is not installed."""


class WeightsError(FastorganError):
    """A weights file is missing or does not have the recorded SHA-256."""
