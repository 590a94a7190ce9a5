"""How tests of the fused stages run Triton's kernels: on a GPU where there is one, else through its interpreter."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import dsvt_ros.kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ALL_KERNELS = tuple(sorted(path.stem for path in Path(*dsvt_ros.kernels.__path__).glob("[!_]*.py")))

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def interpreted(*kernels: str) -> Callable[[], Iterator[None]]:
    """A fixture for one test file: modules of `dsvt_ros.kernels` are imported anew, on the CPU as interpreted ones."""

    @pytest.fixture(scope="module", autouse=True)
    def fixture() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            if DEVICE.type == "cpu":
                patch.setenv("TRITON_INTERPRET", "1")
                _spare_overflow_checks(patch)
                _forget(kernels)
            yield
        _forget(kernels)

    return fixture


def _spare_overflow_checks(patch: pytest.MonkeyPatch) -> None:
    """The interpreter works out for every sum whether it overflows, and drops the answer: 40 % of its time."""
    if importlib.util.find_spec("triton"):
        from triton.runtime.interpreter import interpreter_builder

        options = dataclasses.replace(interpreter_builder.options, sanitize_overflow=False)
        patch.setattr(interpreter_builder, "options", options)


def _forget(kernels: tuple[str, ...]) -> None:
    """`from dsvt_ros.kernels import ...` would find them in the package, too."""
    for name in kernels:
        sys.modules.pop(f"dsvt_ros.kernels.{name}", None)
        vars(dsvt_ros.kernels).pop(name, None)
