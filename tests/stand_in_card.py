"""An NVIDIA card for tests, without one."""

from typing import Any

import pytest


class StandInCard:
    """What torch tells of its one card, while all that should go there stays on the CPU in single precision.

    Args:
        monkeypatch: takes it away after the test.

    Attributes:
        name: of the card.
        layouts: the memory format of each network that was moved to the card, in turn.
    """

    name = "Example GPU"

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import torch

        self.layouts: list[Any] = []
        module_to: Any = torch.nn.Module.to
        tensor_to: Any = torch.Tensor.to

        def move_module(module: Any, device: Any, kind: Any, **options: Any) -> Any:
            if torch.device(device).type == "cuda":
                assert kind is torch.float16
                self.layouts.append(options["memory_format"])
                self.take_network(module)
            return module_to(module, "cpu", torch.float32, **options)

        def move_tensor(tensor: Any, device: Any, *kind: Any, **options: Any) -> Any:
            if isinstance(device, torch.device) and device.type == "cuda":
                assert kind == (torch.float16,)
                return self.take_input(tensor)
            return tensor_to(tensor, device, *kind, **options)

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: self.name)
        monkeypatch.setattr(torch.nn.Module, "to", move_module)
        monkeypatch.setattr(torch.Tensor, "to", move_tensor)

    def take_network(self, network: Any) -> None:
        """Called with each network before it is moved to the card."""

    def take_input(self, values: Any) -> Any:
        """An input of the networks as the card holds it."""
        return values.float()
