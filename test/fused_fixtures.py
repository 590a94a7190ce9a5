"""How tests of the fused stages run Triton's kernels: on a GPU where there is one, else through its interpreter."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def interpreted(*kernels: str) -> Callable[[], Iterator[None]]:
    """A fixture for one test file: modules of `dsvt_ros.kernels` are imported anew, on the CPU as interpreted ones."""
    names = [f"dsvt_ros.kernels.{name}" for name in kernels]

    @pytest.fixture(scope="module", autouse=True)
    def fixture() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            if DEVICE.type == "cpu":
                patch.setenv("TRITON_INTERPRET", "1")
                for name in names:
                    sys.modules.pop(name, None)
            yield
        for name in names:
            sys.modules.pop(name, None)

    return fixture
