"""What flows between the stages. Shapes are documented here and only here.

Letters: N points, C point columns, V voxels, D channels of a voxel's feature, S sets, L slots of a set (`set_size`),
P slots of a pooled voxel, M boxes. Coordinates are metres in the model's frame (`ModelConfig.axes`, z up); yaw is
counter-clockwise from +x, radians; velocities are metres a second.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

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
class VoxelSets:
    """Sets of one window shift, in both orders: 0 sorts a window's voxels by y first, 1 by x first.

    Attributes:
        indices: (2, S, L) int64, voxel in each slot; a voxel that fills several slots does so consecutively.
        mask: (2, S, L) bool, True for the repeated slots, which no one attends to. Slot 0 is never masked.
        slot_of_voxel: (2, V) int64, flat position ``set * L + slot`` of each voxel's unmasked slot: the inverse of
            `indices`, so that results are gathered, never scattered.
    """

    indices: Tensor
    mask: Tensor
    slot_of_voxel: Tensor


@dataclass(frozen=True)
class Pooling:
    """How the voxels of a stage become those of the next one; P voxels along z make one.

    Attributes:
        indices: (V', P) int64, voxel in each slot; 0 where the slot is empty.
        mask: (V', P) bool, True for empty slots.
    """

    indices: Tensor
    mask: Tensor


@dataclass(frozen=True)
class StagePartition:
    """What a stage has to know of its voxels.

    Attributes:
        cells: For each window shift (V,) int64, position of each voxel inside its window, ``(z * wy + y) * wx + x``.
        sets: For each window shift its sets; None where no block of the stage uses them.
        pooling: To the next stage; None for the last one.
    """

    cells: tuple[Tensor, Tensor]
    sets: tuple[VoxelSets | None, VoxelSets | None]
    pooling: Pooling | None


@dataclass(frozen=True)
class SetPartition:
    """Voxels to windows to sets, for every stage of the set-attention backbone.

    Attributes:
        stages: One for each resolution.
        coords: (V', 4) int32 ``(batch, z, y, x)`` of the last stage's voxels, the pillars, all with z = 0.
    """

    stages: tuple[StagePartition, ...]
    coords: Tensor


@dataclass(frozen=True)
class CenterMaps:
    """Raw outputs of CenterHead, each (B, n, H, W); H along y, W along x.

    Classes come in the order of the head's groups; of G groups, all but the heatmap hold one after the other.

    Attributes:
        heatmap: Logits, a channel a class.
        center: Offset of the box centre from the cell's corner in cells, x and y; 2 G channels.
        center_z: Height of the box centre, m; G channels.
        dim: Logarithm of length, width, height; 3 G channels.
        rot: Cosine and sine of the yaw; 2 G channels.
        vel: Velocity along x and y; 2 G channels; None where the head has no such branch.
        iou: Predicted 3D IoU of the box, scaled to [-1, 1]; G channels; None where the head has no such branch.
    """

    heatmap: Tensor
    center: Tensor
    center_z: Tensor
    dim: Tensor
    rot: Tensor
    vel: Tensor | None
    iou: Tensor | None


@dataclass(frozen=True)
class ProposalMaps:
    """Raw outputs of TransFusionHead for Q proposals.

    Attributes:
        label: (B, Q) integer class of each proposal.
        cell: (B, Q) integer cell that it comes from, ``column * rows + row``: the head runs along y first.
        peak: (B, Q) heatmap score of its class in that cell.
        heatmap: (B, classes, Q) logits of the decoded proposal.
        center: (B, 2, Q) offset of the box centre from the cell's centre in cells, x and y.
        height: (B, 1, Q) height of the box's top, m.
        dim: (B, 3, Q) logarithm of length, width, height.
        rot: (B, 2, Q) sine and cosine of the yaw.
        vel: (B, 2, Q) velocity along x and y; None where the head has no such branch.
        iou: (B, 1, Q) predicted IoU of the box, scaled to [-1, 1]; None where the head has no such branch.
    """

    label: Tensor
    cell: Tensor
    peak: Tensor
    heatmap: Tensor
    center: Tensor
    height: Tensor
    dim: Tensor
    rot: Tensor
    vel: Tensor | None
    iou: Tensor | None


HeadMaps: TypeAlias = CenterMaps | ProposalMaps


@dataclass(frozen=True)
class DeviceBoxes:
    """The detector's answer before download: rows of fixed capacity on the device, valid where `keep` is set.

    Attributes:
        boxes: (M, 7) or (M, 9) float32 ``[x, y, z, length, width, height, yaw(, vx, vy)]``, z at the box's centre.
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
