"""What a frame begins with, brought to where its stages expect it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsvt_ros.fused.decode import CloudDecoder
from dsvt_ros.fused.staging import PART_BYTES, Staging
from dsvt_ros.io.pointcloud2 import RawCloud

InputCloud: TypeAlias = NDArray[np.float32] | Tensor | RawCloud

POSE_NUMBERS = 12
HEADER = 16
"""Floats of a cloud before all points: its pose, the row after its last point, a flag, and nothing."""


class FrameInputs:
    """Tensors of B clouds that stay where they are.

    Attributes:
        clouds: B.
        points: (N, C) float32, those of all clouds, one cloud after the other.
        poses: (B, 3, 4) float32, model's frame from sensor's of each cloud.
        ends: (B,) int32, row after each cloud's last point.
        seeks_ground: (B,) int32, 1 for clouds whose pose gets its height from the ground.
    """

    def __init__(
        self, points: int, clouds: int, columns: int, device: torch.device, decoder: CloudDecoder | None = None
    ) -> None:
        """Make room.

        Args:
            points: N.
            clouds: B.
            columns: C.
            device: Where the tensors are.
            decoder: Reads clouds on the device; without one the host reads them.
        """
        self.clouds, self._columns = clouds, columns
        self._decoder = decoder
        size = clouds * HEADER + points * columns
        self._staging = Staging(size, torch.float32, device)
        self._values = torch.zeros(size, dtype=torch.float32, device=device)
        self.points, self.poses, self.ends, self.seeks_ground = self._parts(self._values)
        # Small copies take NumPy a fraction of the time.
        hosts = [self._parts(host) for host in self._staging.hosts]
        self._hosts = [_Host(parts[0], *(part.numpy() for part in parts[1:])) for parts in hosts]

    def upload(
        self,
        clouds: Sequence[InputCloud],
        poses: Sequence[NDArray[np.float64]],
        seeks_ground: Sequence[bool],
        *,
        overlaps: bool,
    ) -> None:
        """Begin to bring clouds to the device.

        When this returns, nothing needs clouds in host memory any more; the device must have done with all uploads
        before the last one.

        Args:
            clouds: Of each cloud the (N, C) points, on the host or on the device, or its bytes.
            poses: (4, 4) model's frame from sensor's of each cloud.
            seeks_ground: Of each cloud, whether its pose gets its height from the ground.
            overlaps: Whether the device still works on the frame before; copies then do not wait for that.
        """
        turn = self._staging.turn()
        host = self._hosts[turn]
        end = 0
        for number, (cloud, pose, seeks) in enumerate(zip(clouds, poses, seeks_ground, strict=True)):
            end += len(cloud)
            host.poses[number], host.ends[number], host.seeks_ground[number] = pose[:3], end, seeks
        raw: list[tuple[RawCloud, int]] = []
        here: list[tuple[Tensor, int]] = []
        there: list[tuple[Tensor, int]] = []
        end = 0
        for cloud in clouds:
            begin, end = end, end + len(cloud)
            if isinstance(cloud, RawCloud) and self._decoder is not None:
                raw.append((cloud, begin))
                continue
            values = torch.as_tensor(cloud.points() if isinstance(cloud, RawCloud) else cloud)
            (here if values.device.type == "cpu" else there).append((values, begin))
        own_stream = overlaps and bool(here)  # poses alone are not worth it
        target = self._staging.devices[turn] if own_stream else self._values
        with self._staging.sending(own_stream=own_stream):
            for values, begin in here:
                self._send_points(host.points, values, begin, target)
            self._staging.send(self.clouds * HEADER, target)
        if own_stream:
            sent = self._staging.sent
            self._values[:sent].copy_(target[:sent])
        for values, begin in there:
            self.points[begin : begin + len(values)].copy_(values)
        if self._decoder is not None and raw:
            self._decoder(raw, self.points, own_stream=overlaps)

    def _send_points(self, host: Tensor, values: Tensor, begin: int, target: Tensor) -> None:
        rows = PART_BYTES // (4 * self._columns)
        for start in range(0, len(values), rows):
            stop = min(start + rows, len(values))
            host[begin + start : begin + stop].copy_(values[start:stop])
            self._staging.send(self.clouds * HEADER + (begin + stop) * self._columns, target)

    def _parts(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Points, poses, ends and flags of memory in one piece."""
        count, whole = self.clouds, values.view(torch.int32)
        first = count * POSE_NUMBERS
        points = values[count * HEADER :].view(-1, self._columns)
        return points, values[:first].view(count, 3, 4), whole[first:][:count], whole[first + count :][:count]


class _Host(NamedTuple):
    """Memory of the host that goes to tensors of the same names."""

    points: Tensor
    poses: NDArray[np.float32]
    ends: NDArray[np.int32]
    seeks_ground: NDArray[np.int32]
