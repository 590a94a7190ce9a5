"""TensorRT itself: finding it, its release, its messages, its names of types."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dsvt_ros.errors import EngineError

__all__ = [
    "LAYER_NORMALIZATION",
    "OLDEST",
    "GpuError",
    "logger",
    "release_of",
    "require_tensorrt",
    "trt",
    "type_name",
    "usable_gpu",
]

_LOG = logging.getLogger(__name__)

OLDEST = (8, 5)
"""Tensors are addressed by name since then."""

LAYER_NORMALIZATION = (8, 6)
"""The parser knows the operator LayerNormalization since then."""


class GpuError(EngineError):
    """The GPU is the matter, not the engine: another one would do no better."""


def require_tensorrt() -> Any:
    """The module tensorrt.

    Raises:
        EngineError: It is missing, broken or too old.
    """
    try:
        module = importlib.import_module("tensorrt")
    except (ImportError, OSError) as error:  # OSError: a library of it does not load
        raise EngineError(
            f"backend tensorrt needs TensorRT 8.5 or later ({error}): it comes with JetPack, with NVIDIA's containers, "
            f"or by pip install tensorrt"
        ) from None
    if release_of(module.__version__) < OLDEST:
        raise EngineError(f"backend tensorrt needs TensorRT 8.5 or later, this is {module.__version__}")
    return module


class _TensorRt:
    """Stands for the module tensorrt, which is imported when something of it is asked for."""

    def __getattr__(self, name: str) -> Any:
        return getattr(require_tensorrt(), name)


if TYPE_CHECKING:
    import tensorrt as trt
else:
    trt = _TensorRt()


def release_of(version: str) -> tuple[int, int]:
    """Major and minor number, (8, 5) of 8.5.3.1."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


@functools.cache
def logger() -> Any:
    """The one logger of this process; TensorRT takes no second one."""

    class Messages(trt.ILogger):  # type: ignore[misc]
        """Passes TensorRT's messages on and remembers the last errors for our own."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warning = ""

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.errors = [*self.errors[-4:], msg.strip()]
                _LOG.debug("TensorRT: %s", msg)
            elif severity == trt.ILogger.Severity.WARNING:
                self.warning = msg.strip()
                _LOG.debug("TensorRT: %s", msg)

        def last_words(self) -> str:
            """The errors since the last call, or else the last warning, for a message."""
            text = "; ".join(self.errors) or self.warning
            self.errors, self.warning = [], ""
            return text or "TensorRT gives no reason"

    return Messages()


@contextlib.contextmanager
def usable_gpu() -> Iterator[None]:
    """Surrounds TensorRT's constructors, which give nothing where they cannot use the GPU.

    Raises:
        GpuError: They did.
    """
    try:
        yield
    except TypeError:  # pybind11's, for nothing
        raise GpuError(f"TensorRT {trt.__version__} cannot use this GPU: {logger().last_words()}") from None


def type_name(dtype: trt.DataType) -> str:
    """NumPy's name of an element type, as in `TensorSpec`.

    Raises:
        EngineError: A type that none of our networks has.
    """
    names = {
        trt.DataType.FLOAT: "float32",
        trt.DataType.HALF: "float16",
        trt.DataType.INT32: "int32",
        trt.DataType.BOOL: "bool",
    }
    if hasattr(trt.DataType, "INT64"):
        names[trt.DataType.INT64] = "int64"
    if dtype not in names:
        raise EngineError(f"an engine with tensors of type {dtype} belongs to another model")
    return names[dtype]
