"""DSVT lidar detection for ROS 2: `Detector` finds boxes in point clouds, the node serves it over DDS."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsvt_ros.detector import Detector as Detector
    from dsvt_ros.structures import Boxes3D as Boxes3D

__version__ = "0.1.0"
__all__ = ["Boxes3D", "Detector", "__version__"]


def __getattr__(name: str) -> Any:
    # Importing torch takes seconds; commands that need none of it should not wait for it.
    if name == "Detector":
        from dsvt_ros.detector import Detector

        return Detector
    if name == "Boxes3D":
        from dsvt_ros.structures import Boxes3D

        return Boxes3D
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
