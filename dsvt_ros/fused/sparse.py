"""The set-attention backbone in float16 kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsvt_ros.config import Backbone3dConfig
from dsvt_ros.errors import EngineError
from dsvt_ros.fused.extents import MIN_EXTENT, power_of_two
from dsvt_ros.fused.launch import MAX_COLUMNS, ROWS, descriptor, is_hopper, num_warps
from dsvt_ros.fused.pooling import FusedPooling
from dsvt_ros.fused.structures import FusedStage, ShiftSets
from dsvt_ros.fused.weights import half
from dsvt_ros.model.set_attention import AttentionPooling, SetAttentionBackbone, SetAttentionEncoder

MAX_CHUNK = 64
MAX_HIDDEN = 64
MAX_PARTS = 4
MAX_SLOTS = 128
MAX_HEAD_WIDTH = 64
WARP_SLOTS = 96
"""Slots of sets,"""
WARP_HEAD_WIDTH = 32
"""and channels of heads, that the registers of a warp have room for."""
HEADS_OF_PROGRAM = 4
SMALL_SLOTS = 48
"""Of sets for whose attention a thread needs few more than"""
SMALL_REGISTERS = 96
"""registers: with no more, as many programs run at once as are fastest (measured on an H100)."""
ROWS_OF_WARP = 16
HOPPER_LAYER_CHANNELS = (192, 384)
"""Of features and feed-forward network, for which there is a kernel of its own on Hopper GPUs."""
LARGE_SHARED_MEMORY = ((8, 0), (8, 7), (9, 0))
"""GPUs whose programs may use 160 KiB and more: room for three stages; others have 100 KiB."""


@dataclass(frozen=True)
class Layer:
    """Weights of a layer as the kernels want them; see `kernels.set_attention`.

    Attributes:
        shift: Window shift whose sets it attends in.
        order: Which of a block's two layers it is: sort order of its sets, and window shift of its positions.
        plain_weights: Output projection, first and second of the feed-forward network, as they are in the model.
    """

    shift: int
    order: int
    qkv_weights: Tensor
    table: Tensor
    out_weights: Tensor
    up_weights: Tensor
    down_weights: Tensor
    vectors: Tensor
    up_bias: Tensor
    plain_weights: tuple[Tensor, Tensor, Tensor]


class FusedBackbone3d:
    """`SetAttentionBackbone` on fused stages."""

    def __init__(self, backbone: SetAttentionBackbone, config: Backbone3dConfig, device: torch.device) -> None:
        """Take over the weights of a backbone whose position embeddings are tables.

        Raises:
            EngineError: The model has sizes that the kernels do not take.
        """
        self._config = config
        self._sizes = _Sizes.of(config, device)
        with torch.no_grad():
            self._layers = [
                _layers_of_stage(backbone, stage, shifts, self._sizes) for stage, shifts in enumerate(config.shifts)
            ]
            self._poolings = [_pooling(backbone, stage, self._sizes) for stage in range(len(config.stages) - 1)]
        self._hopper = HopperLayers(self._layers, device) if HopperLayers.take(config, device) else None

    def __call__(self, features: Tensor, stages: tuple[FusedStage, ...]) -> Tensor:
        """(V, D) float16 voxel features to (V', D) of the last stage."""
        for number, stage in enumerate(stages):
            features = self._run_stage(self._layers[number], features, stage, self._config.stages[number].set_size)
            if stage.pooled is not None:
                num_pooled = stages[number + 1].grid.num_voxels
                features = self._poolings[number](features, stage.grid.num_voxels, stage.pooled, num_pooled)
        return features

    def _run_stage(self, layers: list[Layer], features: Tensor, stage: FusedStage, set_size: int) -> Tensor:
        from dsvt_ros.kernels import set_attention as kernels

        sizes = self._sizes
        count, channels = features.shape
        num_voxels = stage.grid.num_voxels
        qkv = features.new_empty(count, 3 * channels)
        attended = torch.empty_like(features)
        self._project(layers[0], features, stage, qkv)
        block_input = features
        for number, layer in enumerate(layers):
            self._attend(layer, qkv, stage, set_size, attended)
            output = torch.empty_like(features)
            following = layers[number + 1] if number + 1 < len(layers) else None
            if self._hopper is not None:
                self._hopper(layer, following, attended, features, block_input, output, qkv, stage)
            else:
                kernels.finish_layer[(-(-count // sizes.rows),)](
                    attended, features, block_input, output,
                    layer.out_weights, layer.up_weights, layer.down_weights, layer.vectors, layer.up_bias, num_voxels,
                    ENDS_BLOCK=layer.order == 1, CHUNK=sizes.chunk, PARTS=channels // sizes.chunk, HIDDEN=sizes.hidden,
                    UP_PARTS=len(layer.up_bias) // sizes.hidden, ROWS=sizes.rows, STAGES=sizes.stages,
                    num_warps=sizes.rows // ROWS_OF_WARP,
                )  # fmt: skip
                if following is not None:
                    self._project(following, output, stage, qkv)
            features = output
            if layer.order == 1:
                block_input = features
        return features

    def _attend(self, layer: Layer, qkv: Tensor, stage: FusedStage, set_size: int, attended: Tensor) -> None:
        """Write what each voxel's heads see in its set."""
        sets, heads = _sets(layer, stage), self._sizes.num_heads
        num_sets, width = len(sets.set_start) - 1, attended.shape[1] // heads
        arguments = (qkv, sets.order[layer.order], sets.set_start, sets.num_sets, attended)
        described = {"HEADS": heads, "WIDTH": width, "PADDED_WIDTH": _padded(width)}
        if qkv.is_cuda and set_size <= WARP_SLOTS and width <= WARP_HEAD_WIDTH:
            from dsvt_ros.kernels import warp_attention

            warps = _largest_divisor(heads, HEADS_OF_PROGRAM)
            warp_attention.attend[heads // warps, num_sets](
                *arguments, **described, PIECES=-(-set_size // warp_attention.ROWS.value), num_warps=warps,
                maxnreg=SMALL_REGISTERS if set_size <= SMALL_SLOTS else None,
            )  # fmt: skip
        else:
            from dsvt_ros.kernels import set_attention

            set_attention.attend[heads, num_sets](*arguments, **described, SLOTS=_padded(set_size), num_warps=4)

    def _project(self, layer: Layer, features: Tensor, stage: FusedStage, qkv: Tensor) -> None:
        """Write queries, keys and values of a layer."""
        from dsvt_ros.kernels import set_attention as kernels

        count, channels = features.shape
        chunk, columns = self._sizes.chunk, min(MAX_COLUMNS, _padded(3 * channels))
        kernels.project[-(-3 * channels // columns), -(-count // ROWS)](
            descriptor(features, ROWS, chunk), descriptor(layer.qkv_weights, chunk, columns),
            layer.table, stage.cells[layer.order], _sets(layer, stage).position[layer.order], qkv,
            stage.grid.num_voxels,
            CHANNELS=channels, CHUNK=chunk, COLUMNS=columns, ROWS=ROWS, STAGES=3, num_warps=num_warps(features.device),
        )  # fmt: skip


class HopperLayers:
    """What follows attention in a layer, and the next layer's projections, in one kernel for Hopper GPUs."""

    def __init__(self, stages: list[list[Layer]], device: torch.device) -> None:
        """Pack the weights in the order in which the kernel reads them."""
        from dsvt_ros.kernels.hopper_layer import weight_blocks

        self._programs = torch.cuda.get_device_properties(device).multi_processor_count
        self._weights: dict[int, Tensor] = {}
        for layers in stages:
            for layer, following in zip(layers, [*layers[1:], None], strict=True):
                qkv = None if following is None else following.qkv_weights.T
                self._weights[id(layer)] = weight_blocks(*layer.plain_weights, qkv)

    @staticmethod
    def take(config: Backbone3dConfig, device: torch.device) -> bool:
        """Whether the kernel takes this model on this device."""
        return is_hopper(device) and (config.channels, config.ffn_channels) == HOPPER_LAYER_CHANNELS

    def __call__(
        self,
        layer: Layer,
        following: Layer | None,
        attended: Tensor,
        features: Tensor,
        block_input: Tensor,
        output: Tensor,
        qkv: Tensor,
        stage: FusedStage,
    ) -> None:
        """Write the layer's output and, unless it is the last one, `qkv` for the `following`."""
        from dsvt_ros.kernels import hopper_layer as kernels
        from dsvt_ros.kernels.hopper_ring import MAX_REGISTERS, NUM_WARPS

        described = [kernels.descriptor(rows) for rows in (attended, features, block_input)]
        next_layer = following or layer  # of the last layer nothing of it is read
        kernels.finish_and_project[(self._programs,)](
            *described, kernels.descriptor(self._weights[id(layer)]), output, qkv,
            layer.vectors, layer.up_bias, next_layer.table, stage.cells[next_layer.order],
            _sets(next_layer, stage).position[next_layer.order], stage.grid.num_voxels,
            ENDS_BLOCK=layer.order == 1, WITH_QKV=following is not None,
            num_warps=NUM_WARPS, maxnreg=MAX_REGISTERS,
        )  # fmt: skip


@dataclass(frozen=True)
class _Sizes:
    """Extents of the kernels' blocks.

    Attributes:
        chunk: Channels of a block.
        hidden: The same in the feed-forward network.
        rows: Voxels that one program finishes; the more, the less often weights are read.
        stages: Weight tiles on their way to shared memory.
        num_heads: Heads of the attention.
    """

    chunk: int
    hidden: int
    rows: int
    stages: int
    num_heads: int

    @staticmethod
    def of(config: Backbone3dConfig, device: torch.device) -> _Sizes:
        """Those for a model and a GPU; `EngineError` if there are none."""
        channels, width = config.channels, config.channels // config.num_heads
        chunk, hidden = _largest_divisor(channels, MAX_CHUNK), _largest_divisor(config.ffn_channels, MAX_HIDDEN)
        if min(chunk, hidden) < MIN_EXTENT or channels // chunk > MAX_PARTS:
            raise EngineError(
                f"backend triton takes 1 to {MAX_PARTS} times 16, 32 or 64 channels, and any multiple of 16 in the "
                f"feed-forward network; this model has {channels} and {config.ffn_channels}: use torch or tensorrt"
            )
        largest = max(stage.set_size for stage in config.stages)
        if largest > MAX_SLOTS or width > MAX_HEAD_WIDTH:
            raise EngineError(
                f"backend triton takes sets of up to {MAX_SLOTS} voxels and heads of up to {MAX_HEAD_WIDTH} channels; "
                f"this model has {largest} and {width}: use torch or tensorrt"
            )
        data_centre = device.type == "cuda" and torch.cuda.get_device_capability(device) in LARGE_SHARED_MEMORY
        return _Sizes(chunk, hidden, 128, 3 if data_centre else 2, config.num_heads)


def _sets(layer: Layer, stage: FusedStage) -> ShiftSets:
    """Those that a layer attends in."""
    sets = stage.sets[layer.shift]
    assert sets is not None
    return sets


def _padded(size: int) -> int:
    """An extent with room for so many slots or channels."""
    return max(MIN_EXTENT, power_of_two(size))


def _largest_divisor(size: int, limit: int) -> int:
    """The largest power of two that divides `size`, up to `limit`."""
    return min(size & -size, limit)


def _pooling(backbone: SetAttentionBackbone, stage: int, sizes: _Sizes) -> FusedPooling:
    pooling = backbone.get_submodule(f"stage_{stage}_reduction")
    assert isinstance(pooling, AttentionPooling)
    return FusedPooling(pooling, sizes.chunk)


def _layers_of_stage(backbone: SetAttentionBackbone, stage: int, shifts: tuple[int, ...], sizes: _Sizes) -> list[Layer]:
    layers = []
    for block, shift in enumerate(shifts):
        encoders = backbone.get_submodule(f"stage_{stage}.{block}.encoder_list")
        block_norm = backbone.get_submodule(f"residual_norm_stage_{stage}.{block}")
        embeddings = backbone.input_layer.posembed_layers[stage][block]  # type: ignore[index]
        assert isinstance(encoders, nn.ModuleList)
        for order, (encoder, embedding) in enumerate(zip(encoders, embeddings, strict=True)):
            assert isinstance(encoder, SetAttentionEncoder)
            layers.append(_layer(encoder, block_norm, embedding.table(), shift, order, sizes))
    return layers


def _layer(
    encoder: SetAttentionEncoder, block_norm: nn.Module, positions: Tensor, shift: int, order: int, sizes: _Sizes
) -> Layer:
    from dsvt_ros.kernels.set_attention import tiled

    layer, chunk = encoder.win_attn, sizes.chunk
    attention = layer.self_attn
    channels = attention.out_proj.in_features
    weight, bias = attention.in_proj_weight.clone(), attention.in_proj_bias.clone()
    # The softmax's scale, and what makes its exponentials powers of two.
    scale = math.log2(math.e) * (channels // attention.num_heads) ** -0.5
    weight[:channels] *= scale
    bias[:channels] *= scale
    # (x + position) W = x W + position W, and the position has only as many values as a window has cells.
    table = bias.expand(len(positions), -1).clone()
    table[:, : 2 * channels] += positions @ weight[: 2 * channels].T
    norms = (layer.norm1, layer.norm2, encoder.norm, block_norm)
    vectors: list[Tensor] = [attention.out_proj.bias, layer.linear2.bias]
    for norm in norms:
        assert isinstance(norm, nn.LayerNorm)
        vectors += [norm.weight, norm.bias]
    return Layer(
        shift,
        order,
        qkv_weights=half(weight.T),
        table=half(table),
        out_weights=half(tiled(attention.out_proj.weight, chunk, chunk)),
        up_weights=half(tiled(layer.linear1.weight, chunk, sizes.hidden)),
        # The other way round: tiles of one chunk of hidden channels lie together.
        down_weights=half(tiled(layer.linear2.weight, sizes.hidden, chunk).transpose(0, 1)),
        vectors=torch.stack(vectors),
        up_bias=layer.linear1.bias.detach().clone(),
        plain_weights=(attention.out_proj.weight, layer.linear1.weight, layer.linear2.weight),
    )
