"""Who runs the two networks: the sparse one (set attention) and the dense one (BEV backbone and head)."""

from __future__ import annotations

import typing
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from dsvt_ros.structures import HeadMaps, SetPartition

# The one list of what a user may ask for; `auto` leaves the choice to `backends.choice`.
Backend = Literal["auto", "torch", "triton", "onnxruntime", "tensorrt"]
BACKENDS: tuple[str, ...] = typing.get_args(Backend)

# Told what is being done that takes time and, where it is known, which share of it is done; may raise to stop it.
Progress = Callable[[str, "float | None"], None]


def no_progress(text: str, fraction: float | None) -> None:
    """For those who do not watch."""


class Networks(Protocol):
    """The two networks of a model, ready for inference on one device.

    Attributes:
        name: The backend.
        precision: ``fp32`` or ``fp16``: type of weights and features.
        max_voxels: Room for voxels of one cloud; None if there is no limit.
        channels_last: Memory order in which the dense network takes the BEV map without a copy.
    """

    name: str
    precision: str
    max_voxels: int | None
    channels_last: bool

    def sparse(self, features: Tensor, partition: SetPartition) -> Tensor:
        """(V, D) float32 voxel features to (V', D) of the last stage, of float32 or of the networks' own type."""
        ...

    def dense(self, bev: Tensor) -> HeadMaps:
        """(B, D, H, W) BEV map, of the type that `sparse` gives, to what the head says, in float32."""
        ...
