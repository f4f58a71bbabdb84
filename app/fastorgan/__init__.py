"""fastorgan: liver, kidneys, spleen and pancreas in an abdominal CT, in seconds.

`Cascade` is the whole of the method; importing this package loads neither torch nor OpenVINO.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cascade import Cascade as Cascade

__version__ = "0.1.0"

__all__ = ["Cascade", "__version__"]


def __getattr__(name: str) -> Any:
    # Lazy, so that `fastorgan --help` need not import numpy and nibabel.
    if name == "Cascade":
        from .cascade import Cascade

        return Cascade
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
