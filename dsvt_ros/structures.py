"""What flows between the stages. Shapes are documented here and only here.

Letters: N points, C point columns, V voxels, D channels of a voxel's feature, S sets, L slots of a set (`set_size`),
M boxes. Coordinates are metres in the model's frame (REP 103: x forward, y left, z up); yaw is counter-clockwise
from +x, radians.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Voxels:
    """The occupied voxels of one or several clouds and the points in them.

    Attributes:
        points: (N, C) float32; only points inside the model's range.
        voxel_of_point: (N,) int64, row of each point's voxel.
        coords: (V, 4) int32 ``(batch, z, y, x)``, ordered by batch, then x, y, z, as the published code orders them.
        batch_size: Number of clouds.
    """

    points: Tensor
    voxel_of_point: Tensor
    coords: Tensor
    batch_size: int

    def __len__(self) -> int:
        return self.coords.shape[0]


@dataclass(frozen=True)
class WindowShift:
    """Sets of one window shift, in both orders: 0 sorts a window's voxels by y first, 1 by x first.

    Attributes:
        set_indices: (2, S, L) int64, voxel in each slot; a voxel that fills several slots does so consecutively.
        set_mask: (2, S, L) bool, True for the repeated slots, which no one attends to. Slot 0 is never masked.
        slot_of_voxel: (2, V) int64, flat position ``set * L + slot`` of each voxel's unmasked slot: the inverse of
            `set_indices`, so that results are gathered, never scattered.
        cell_of_voxel: (V,) int64, position of the voxel inside its window, ``(z * wy + y) * wx + x``.
    """

    set_indices: Tensor
    set_mask: Tensor
    slot_of_voxel: Tensor
    cell_of_voxel: Tensor


@dataclass(frozen=True)
class SetPartition:
    """Sets for both window shifts; blocks alternate between them."""

    shifts: tuple[WindowShift, WindowShift]


@dataclass(frozen=True)
class DeviceBoxes:
    """The detector's answer before download: rows of fixed capacity on the device, valid where `keep` is set.

    Attributes:
        boxes: (M, 7) float32 ``[x, y, z, length, width, height, yaw]``, z at the box's centre.
        scores: (M,) float32 in [0, 1].
        labels: (M,) int64, index into the model's class names.
        keep: (M,) bool.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    keep: Tensor


@dataclass(frozen=True)
class Boxes3D:
    """Detected or true boxes of one cloud, in host memory.

    Attributes:
        boxes: (M, 7) or (M, 9) float32 ``[x, y, z, length, width, height, yaw(, vx, vy)]``, z at the box's centre.
        scores: (M,) float32 in [0, 1].
        labels: (M,) int64, index into `class_names`.
        class_names: Names of all classes of the model.
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.boxes)

    def class_name(self, index: int) -> str:
        """Name of the class of box `index`."""
        return self.class_names[int(self.labels[index])]
