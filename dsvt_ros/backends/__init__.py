"""Who runs the two networks: the sparse one (set attention) and the dense one (BEV backbone and head)."""

from __future__ import annotations

import typing
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from dsvt_ros.model.center_head import HeadMaps
    from dsvt_ros.structures import SetPartition

# The one list of what a user may ask for; `auto` leaves the choice to `backends.choice`.
Backend = Literal["auto", "torch", "onnxruntime"]
BACKENDS: tuple[str, ...] = typing.get_args(Backend)


class Networks(Protocol):
    """The two networks of a model, ready for inference on one device.

    Attributes:
        name: The backend.
        precision: ``fp32`` or ``fp16``: type of weights and features. Arguments and results are float32 in any case.
        max_voxels: Room for voxels of one cloud; None if there is no limit.
        channels_last: Memory order in which the dense network takes the BEV map without a copy.
    """

    name: str
    precision: str
    max_voxels: int | None
    channels_last: bool

    def sparse(self, features: Tensor, partition: SetPartition) -> Tensor:
        """(V, D) pillar features to (V, D)."""
        ...

    def dense(self, bev: Tensor) -> HeadMaps:
        """(B, D, H, W) BEV map to the head's maps."""
        ...
