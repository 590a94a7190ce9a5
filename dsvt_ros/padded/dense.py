"""The dense network from pillar features to what the head says, in convolutions of cuDNN."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsvt_ros.config import ModelConfig
from dsvt_ros.export.networks import maps_from_tensors, named_maps, to_half
from dsvt_ros.fused.peak_head import PeakHead
from dsvt_ros.fused.structures import Grid, Maps, PeakMaps
from dsvt_ros.model.bev_backbone import BevBackbone, ResidualBlock
from dsvt_ros.model.transfusion_head import TransFusionHead
from dsvt_ros.structures import ProposalMaps


class LibraryConvolutions:
    """The convolutions in PyTorch, which takes them from cuDNN."""

    def __init__(self, backbone: BevBackbone, head: PeakHead | TransFusionHead, model: ModelConfig) -> None:
        """Take over both networks, whose batch norms are folded; they become float16.

        Raises:
            EngineError: Weights beyond the range of float16.
        """
        for network in (backbone, head):
            to_half(network)
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._head, self._model = head, model
        self._calls = convolution_calls(next(backbone.parameters()).device)
        self._backbone = _Backbone(backbone, self._calls)

    def __call__(self, features: Tensor, grid: Grid) -> Maps:
        """(V, D) features of the pillars in `grid` to what the head says."""
        bev, head = self._backbone(place(features, grid)), self._head
        if isinstance(head, TransFusionHead):
            return proposals_from(head(bev), self._model)
        shared_conv = head.shared_conv[0]
        assert isinstance(shared_conv, nn.Conv2d)
        shared = self._calls.with_relu(shared_conv, bev)
        logits = head.heatmap(self._calls.with_relu(head.heatmap_hidden, shared))
        return PeakMaps(logits[:, : len(self._model.class_names)], shared)


def place(features: Tensor, grid: Grid) -> Tensor:
    """(V, D) features of pillars to a (B, D, H, W) map, channels last; empty cells are zero."""
    nx, ny, _ = grid.size
    pillar = grid.voxel_of_cell.view(-1, nx, ny).transpose(1, 2).reshape(-1)
    rows = F.pad(features, (0, 0, 0, 1))  # the last one for empty cells
    rows = rows.index_select(0, torch.where(pillar < 0, len(features), pillar))
    return rows.view(-1, ny, nx, features.shape[1]).permute(0, 3, 1, 2)


def proposals_from(maps: object, model: ModelConfig) -> ProposalMaps:
    """What TransFusionHead says, in float32."""
    assert isinstance(maps, ProposalMaps)
    single = maps_from_tensors(dict(named_maps(maps)), model)
    assert isinstance(single, ProposalMaps)
    return single


class ConvolutionCalls(Protocol):
    """Convolutions with what follows them."""

    def with_relu(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """relu(conv(x) + bias)."""
        ...

    def with_sum_and_relu(self, conv: nn.Conv2d, x: Tensor, bias: Tensor, y: Tensor) -> Tensor:
        """relu(conv(x) + bias + y), with `bias` in place of the convolution's own."""
        ...


class PlainCalls:
    """In one operation after the other."""

    def with_relu(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """See `ConvolutionCalls`."""
        return F.relu_(F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding))

    def with_sum_and_relu(self, conv: nn.Conv2d, x: Tensor, bias: Tensor, y: Tensor) -> Tensor:
        """See `ConvolutionCalls`."""
        return F.relu_(F.conv2d(x, conv.weight, bias, conv.stride, conv.padding).add_(y))


class CudnnCalls:
    """In one kernel of cuDNN each, which spares whole maps two ways to memory and back."""

    def with_relu(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """See `ConvolutionCalls`."""
        shape = (conv.stride, conv.padding, conv.dilation)
        return torch.cudnn_convolution_relu(x, conv.weight, conv.bias, *shape, 1)  # type: ignore[arg-type]

    def with_sum_and_relu(self, conv: nn.Conv2d, x: Tensor, bias: Tensor, y: Tensor) -> Tensor:
        """See `ConvolutionCalls`."""
        shape = (conv.stride, conv.padding, conv.dilation)
        return torch.cudnn_convolution_add_relu(x, conv.weight, y, 1.0, bias, *shape, 1)  # type: ignore[arg-type]


@torch.inference_mode()
def convolution_calls(device: torch.device) -> ConvolutionCalls:
    """The quickest that work on a device."""
    if device.type != "cuda":
        return PlainCalls()
    conv = nn.Conv2d(16, 16, 3, padding=1).to(device, torch.float16, memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(1, 16, 8, 8, device=device).half().contiguous(memory_format=torch.channels_last)
    assert conv.bias is not None
    plain, fused = PlainCalls(), CudnnCalls()
    expected = plain.with_sum_and_relu(conv, plain.with_relu(conv, x), conv.bias, x)
    try:
        found = fused.with_sum_and_relu(conv, fused.with_relu(conv, x), conv.bias, x)
        works = torch.allclose(found, expected, rtol=1e-2, atol=1e-2)
    except (AttributeError, RuntimeError):  # a cuDNN, or a build of PyTorch, that lacks them
        works = False
    return fused if works else plain


class _Backbone:
    """`BevBackbone`, channels last."""

    def __init__(self, backbone: BevBackbone, calls: ConvolutionCalls) -> None:
        self._calls = calls
        self._stages: list[list[_Block]] = []
        self._resamplings: list[_Enlarging | _Reducing] = []
        for stage, deblock in zip(backbone.blocks, backbone.deblocks, strict=True):
            self._stages.append([_Block(block, calls) for block in stage.children()])
            conv = next(deblock.children())
            if isinstance(conv, nn.ConvTranspose2d):
                self._resamplings.append(_Enlarging(conv))
            else:
                self._resamplings.append(_Reducing(conv, calls))

    def __call__(self, bev: Tensor) -> Tensor:
        """See `BevBackbone.forward`."""
        maps = []
        for stage in self._stages:
            for block in stage:
                bev = block(bev)
            maps.append(bev)
        channels = [resampling.channels for resampling in self._resamplings]
        rows = bev.new_empty(len(bev), *self._resamplings[-1].size(bev), sum(channels))
        for resampling, own, part in zip(self._resamplings, maps, torch.split(rows, channels, dim=3), strict=True):
            resampling(own, part)
        return rows.permute(0, 3, 1, 2)


class _Block:
    """`ResidualBlock`; the bias of a convolution in the shortcut is added with that of the second one."""

    def __init__(self, block: nn.Module, calls: ConvolutionCalls) -> None:
        assert isinstance(block, ResidualBlock)
        self._calls, self._first, self._second = calls, block.conv1, block.conv2
        self._shortcut: nn.Conv2d | None = None
        assert block.conv2.bias is not None
        self._bias: Tensor = block.conv2.bias
        if isinstance(block.downsample_layer, nn.Sequential):
            shortcut = block.downsample_layer[0]
            assert isinstance(shortcut, nn.Conv2d)
            assert shortcut.bias is not None
            self._shortcut, self._bias = shortcut, self._bias + shortcut.bias

    def __call__(self, x: Tensor) -> Tensor:
        shortcut = x
        if self._shortcut is not None:
            shortcut = F.conv2d(x, self._shortcut.weight, None, self._shortcut.stride)
        return self._calls.with_sum_and_relu(self._second, self._calls.with_relu(self._first, x), self._bias, shortcut)


class _Enlarging:
    """A transposed convolution whose outputs do not overlap: a matrix product, which cuBLAS ends with the ReLU."""

    def __init__(self, conv: nn.ConvTranspose2d) -> None:
        assert conv.bias is not None
        self.channels, self._stride = conv.out_channels, conv.stride[0]
        self._weight = conv.weight.permute(0, 2, 3, 1).reshape(conv.in_channels, -1).contiguous()
        self._bias = conv.bias.repeat(self._stride**2)

    def size(self, x: Tensor) -> tuple[int, int]:
        """Rows and columns of what it makes of a map."""
        return x.shape[2] * self._stride, x.shape[3] * self._stride

    def __call__(self, x: Tensor, out: Tensor) -> None:
        """(B, C, H, W) map to (B, H s, W s, channels)."""
        clouds, width, rows, columns = x.shape
        stride = self._stride
        cells = x.permute(0, 2, 3, 1).reshape(-1, width)
        values = torch._addmm_activation(self._bias, cells, self._weight)
        values = values.view(clouds, rows, columns, stride, stride, -1).transpose(2, 3)
        out.view(values.shape).copy_(values)


class _Reducing:
    """A convolution with as large a stride as kernel."""

    def __init__(self, conv: nn.Module, calls: ConvolutionCalls) -> None:
        assert isinstance(conv, nn.Conv2d)
        self.channels = conv.out_channels
        self._conv, self._calls = conv, calls

    def size(self, x: Tensor) -> tuple[int, int]:
        """Rows and columns of what it makes of a map."""
        return x.shape[2] // self._conv.stride[0], x.shape[3] // self._conv.stride[1]

    def __call__(self, x: Tensor, out: Tensor) -> None:
        """(B, C, H, W) map to (B, H / s, W / s, channels)."""
        out.copy_(self._calls.with_relu(self._conv, x).permute(0, 2, 3, 1))
