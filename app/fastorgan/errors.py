"""What can go wrong for a reason that the user can mend."""


class FastorganError(Exception):
    """Base of every error that fastorgan raises on purpose; its text is one line, fit to be shown as it is."""


class VolumeError(FastorganError):
    """A file is missing, damaged, or not a three-dimensional CT volume."""


class DeviceError(FastorganError):
    """The device asked for is not there, or its engine is not installed."""


class WeightsError(FastorganError):
    """A weights file is missing or does not have the recorded SHA-256."""
