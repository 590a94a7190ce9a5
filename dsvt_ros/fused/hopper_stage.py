"""A first stage of the BEV backbone that leaves out what is far from all voxels; see `kernels.hopper_stage`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dsvt_ros.fused.convolution import BevRows
from dsvt_ros.fused.first_block import FirstBlock
from dsvt_ros.fused.launch import check_size, is_hopper
from dsvt_ros.fused.residual_block import FusedBlock
from dsvt_ros.fused.structures import Grid
from dsvt_ros.fused.tiles import every_tile, list_tiles, tiles_of

HOPPER_STAGE_CHANNELS = 128
"""Of maps that the kernel takes."""


class HopperStage:
    """A first stage of stride 1 whose convolutions leave out what is far from all voxels, on Hopper GPUs.

    Of an empty map, all cells far from its border have the same value after each convolution. So have those of other
    maps that are far from all voxels, too.
    """

    def __init__(self, first: FirstBlock, others: Sequence[FusedBlock]) -> None:
        """Take over the weights of all blocks of the stage, and find out what empty cells become.

        Args:
            first: Of stride 1, to 128 channels.
            others: From 128 channels to 128, without a shortcut convolution.
        """
        from dsvt_ros.kernels import hopper_stage as kernels

        self._first = first
        self._convolutions = [first.second]
        for block in others:
            self._convolutions += [block.first, block.second]
        self._weights = [kernels.weight_rows(conv.matrix) for conv in self._convolutions]
        # The first convolution before these has brought voxels to their neighbours.
        self._reach = 1 + len(self._convolutions)
        device = first.matrix.device
        self._programs = torch.cuda.get_device_properties(device).multi_processor_count
        self._constants = self._weights[0].new_zeros(len(self._convolutions), HOPPER_STAGE_CHANNELS)
        self._constants = self._find_constants(device)

    @staticmethod
    def take(first: FirstBlock, others: Sequence[FusedBlock]) -> bool:
        """Whether the kernel takes these blocks on their device."""
        sizes = (first.stride, first.channels) == (1, HOPPER_STAGE_CHANNELS)
        # Blocks without a shortcut keep channels and stride.
        return is_hopper(first.matrix.device) and sizes and all(block.shortcut is None for block in others)

    def __call__(self, features: Tensor, grid: Grid) -> BevRows:
        """(V, D) float16 features of the pillars in `grid` to (rows, 128).

        Raises:
            EngineError: There are more pillars or cells than the kernels can number.
        """
        x, products = self._first.gather(features, grid)
        check_size(x.rows)
        return self._convolve(x, products, self._list(x, products[1]))[-1]

    def _find_constants(self, device: torch.device) -> Tensor:
        """(convolutions, 128) float16: values far from everything, by the kernel that computes others."""
        size = 2 * self._reach + 1
        grid = Grid(
            (size, size, 1),
            torch.full((size * size,), -1, dtype=torch.int32, device=device),
            torch.zeros(1, dtype=torch.int32, device=device),
            torch.zeros(1, dtype=torch.int32, device=device),
        )
        features = self._first.matrix.new_zeros(1, self._first.matrix.shape[0])
        x, products = self._first.gather(features, grid)
        maps = self._convolve(x, products, every_tile(tiles_of(x), len(self._weights), device))
        return torch.stack([each.image()[0, :, self._reach, self._reach] for each in maps])

    def _list(self, x: BevRows, voxel_at: Tensor) -> Tensor:
        return list_tiles(x, voxel_at, first_radius=2, reach=self._reach)

    def _convolve(self, x: BevRows, products: tuple[Tensor, Tensor], lists: Tensor) -> list[BevRows]:
        """The map after each convolution, given for each a list of tiles; the rest as from `FirstBlock.gather`."""
        maps: list[BevRows] = []
        for number, tiles in enumerate(lists):
            # Each block ends with the sum of its input, or of the shortcut, and its second convolution.
            residual = maps[number - 2] if number >= 2 and number % 2 == 0 else None
            x = self._launch(number, x, tiles, residual, products if number == 0 else None)
            maps.append(x)
        return maps

    def _launch(
        self, number: int, x: BevRows, tiles: Tensor, residual: BevRows | None, products: tuple[Tensor, Tensor] | None
    ) -> BevRows:
        from dsvt_ros.kernels import hopper_stage as kernels
        from dsvt_ros.kernels.hopper_ring import MAX_REGISTERS, NUM_WARPS

        output = torch.empty_like(x.rows)
        features, voxel_at = products or (x.rows, tiles)
        kernels.convolve_tiles[(self._programs,)](
            kernels.map_descriptor(x.rows, x.width), kernels.weight_descriptor(self._weights[number]),
            self._convolutions[number].bias, kernels.map_descriptor((residual or x).rows, x.width), features, voxel_at,
            output, tiles, self._constants[number], x.height, x.width, math.prod(tiles_of(x)),
            PRODUCT_STRIDE=features.stride(0), RESIDUAL=2 if products else 1 if residual else 0,
            num_warps=NUM_WARPS, maxnreg=MAX_REGISTERS,
        )  # fmt: skip
        return BevRows(output, x.height, x.width)
