"""A device that torch cannot use is named before anything is loaded for it."""

from __future__ import annotations

import pytest
import torch

from llava_compete.errors import UserError
from llava_compete.model.devices import usable_device


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "xpu"])
def test_a_device_that_is_not_here_is_named(name: str) -> None:
    with pytest.raises(UserError, match=f"^eval.device: found '{name}', expected a device that torch can use here: ."):
        usable_device(name, "eval.device")


def test_the_default_is_the_best_there_is() -> None:
    assert usable_device("cpu") == torch.device("cpu")
    assert usable_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
