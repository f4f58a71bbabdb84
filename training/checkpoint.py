"""Checkpoints of `fit`: read with a clear word where there is none, written whole or not at all."""

from pathlib import Path
from typing import Any

import torch

from fastorgan.files import whole_file

from .cases import DataError

CHECKPOINT = "checkpoint.pt"


def read_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    """Read a checkpoint with its tensors on `device`; nothing in the file is executed.

    Raises:
        DataError: if the file is missing, damaged, or something else.
    """
    problem = f"{path}: damaged, or not a checkpoint of `python -m training fit`"
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:
        # On bytes that are no checkpoint torch's reader fails in whatever way it comes to.
        raise DataError(problem) from error
    if not isinstance(state, dict) or not {"kind", "variant", "export"} <= state.keys():
        raise DataError(problem)
    return state


def write_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint; what was at `path` stays until the new one is whole."""
    with whole_file(path, ".pt") as partial:
        torch.save(state, partial)
