"""Clouds as they were received: their bytes go to the device, where a kernel reads the columns."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsvt_ros.fused.extents import power_of_two
from dsvt_ros.fused.staging import PART_BYTES, Staging
from dsvt_ros.io.pointcloud2 import DATATYPES, CloudField, RawCloud

POINT_ROWS = 256
"""Points of a program."""
ALIGNMENT = 256
"""Clouds and their points begin at multiples of so many bytes."""


class CloudDecoder:
    """What `RawCloud.points` does, for all clouds of a frame; the memory for their bytes grows with them.

    Kernels launch on the current CUDA device, which must be that of the tensors.
    """

    def __init__(self, device: torch.device, columns: int) -> None:
        """Make ready.

        Args:
            device: Where the clouds go.
            columns: Of each cloud.
        """
        from dsvt_ros.kernels import decode_points as kernels

        self._device, self._columns = device, columns
        self._num_words = kernels.CLOUD_WORDS.value + columns * kernels.COLUMN_WORDS.value
        self._header = _aligned(4 * self._num_words)
        self._staging = Staging(self._header, torch.uint8, device)

    def __call__(self, clouds: Sequence[tuple[RawCloud, int]], points: Tensor, *, own_stream: bool) -> None:
        """Begin to bring clouds to the device and to read them there.

        The points are bit by bit those of `RawCloud.points`, but for a NaN that was a double. When this returns,
        nothing needs the clouds any more; the device must have done with all calls before the last one.

        Args:
            clouds: Each with its first row in `points`.
            points: (N, C) float32 on the device, contiguous.
            own_stream: See `Staging.sending`.
        """
        from dsvt_ros.kernels import decode_points as kernels

        assert points.shape[1] == self._columns
        assert points.is_contiguous()
        *begins, size = accumulate((self._header + _aligned(len(cloud.data)) for cloud, _ in clouds), initial=0)
        if size > len(self._staging.hosts[0]):
            self._staging = Staging(power_of_two(size), torch.uint8, self._device)
        turn = self._staging.turn()
        with self._staging.sending(own_stream=own_stream):
            for (cloud, first_row), begin in zip(clouds, begins, strict=True):
                self._send(turn, cloud, first_row, begin)
        for (cloud, _), begin in zip(clouds, begins, strict=True):
            if len(cloud):
                kernels.decode_points[(-(-len(cloud) // POINT_ROWS),)](
                    self._staging.devices[turn], begin + self._header, points,
                    HEADER=self._header, COLUMNS=self._columns, ROWS=POINT_ROWS,
                )  # fmt: skip

    def _send(self, turn: int, cloud: RawCloud, first_row: int, begin: int) -> None:
        """Send a cloud and what `decode_points` has to know of it."""
        host, device = self._staging.hosts[turn], self._staging.devices[turn]
        host[begin:][: 4 * self._num_words].view(torch.int32).numpy()[:] = self._words(cloud, first_row)
        begin += self._header
        for start in range(0, len(cloud.data), PART_BYTES):
            part = cloud.data[start : start + PART_BYTES]
            _copy(host[begin + start :][: len(part)], part)
            self._staging.send(begin + start + len(part), device)

    def _words(self, cloud: RawCloud, first_row: int) -> list[int]:
        """What `decode_points` has to know of a cloud."""
        layout = cloud.layout
        words = [len(cloud), first_row, layout.width, layout.row_step, layout.point_step, int(layout.is_bigendian)]
        for column in cloud.columns:
            words += _words_of_field(column) if isinstance(column, CloudField) else _words_of_value(column)
        return words


def _words_of_field(field: CloudField) -> tuple[int, int, int, int]:
    from dsvt_ros.kernels import decode_points as kernels

    dtype = np.dtype(DATATYPES[field.datatype])
    kinds = {"i": kernels.SIGNED, "u": kernels.UNSIGNED, "f": kernels.DOUBLE if dtype.itemsize == 8 else kernels.FLOAT}
    return kinds[dtype.kind].value, field.offset, dtype.itemsize, 0


def _words_of_value(value: float) -> tuple[int, int, int, int]:
    """A number without bytes, whose bits are given."""
    from dsvt_ros.kernels import decode_points as kernels

    return kernels.FLOAT.value, 0, 0, int(np.float32(value).view(np.int32))


def _copy(target: Tensor, source: NDArray[np.uint8]) -> None:
    """In several threads, except from memory that is read-only, such as that of bags, which torch does not take."""
    if source.flags.writeable:
        target.copy_(torch.from_numpy(source))
    else:
        np.copyto(target.numpy(), source)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
