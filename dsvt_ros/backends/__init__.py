"""Who runs the two networks: the sparse one (set attention) and the dense one (BEV backbone and head)."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from dsvt_ros.model.center_head import HeadMaps
from dsvt_ros.structures import SetPartition


class Networks(Protocol):
    """The two networks of a model, ready for inference on one device."""

    name: str

    def sparse(self, features: Tensor, partition: SetPartition) -> Tensor:
        """(V, D) pillar features to (V, D)."""
        ...

    def dense(self, bev: Tensor) -> HeadMaps:
        """(B, D, H, W) BEV map to the head's maps."""
        ...
