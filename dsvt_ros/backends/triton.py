"""The networks in float16: set attention in Triton kernels of our own, the dense network in PyTorch."""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsvt_ros.config import Backbone3dConfig
from dsvt_ros.errors import EngineError
from dsvt_ros.export.networks import maps_from_tensors, named_maps, to_half
from dsvt_ros.model.dsvt import DSVT
from dsvt_ros.model.fold import inference_modules
from dsvt_ros.model.set_attention import SetAttentionBackbone, SetAttentionEncoder
from dsvt_ros.set_partition import partition_sets
from dsvt_ros.structures import HeadMaps, SetPartition, StagePartition

MIN_CAPABILITY = (8, 0)
"""Of the GPU: what Triton itself supports."""
MIN_EXTENT = 16
"""Of a block: what tensor cores take."""
MAX_CHUNK = 64
MAX_HIDDEN = 64
MAX_PARTS = 4
MAX_SLOTS = 128
MAX_HEAD_WIDTH = 64
ROWS_OF_WARP = 16
LARGE_SHARED_MEMORY = ((8, 0), (8, 7), (9, 0))
"""GPUs whose programs may use 160 KiB and more: room for three stages; others have 100 KiB."""
MAX_ELEMENTS = 2**31 - 1
"""Of a tensor: kernels count in 32 bits."""


@dataclass(frozen=True)
class _Layer:
    """Weights of a layer as the kernels want them; see `kernels.set_attention`.

    Attributes:
        shift: Window shift whose sets it attends in.
        order: Which of a block's two layers it is: sort order of its sets, and window shift of its positions.
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


class TritonNetworks:
    """Both networks of `model`, for voxels of any number; `model` is left as it is."""

    name = "triton"
    precision = "fp16"
    max_voxels: int | None = None
    channels_last = True

    def __init__(self, model: DSVT) -> None:
        """Make ready and compile.

        Raises:
            EngineError: Triton is missing or cannot compile here, or the model has sizes that the kernels do not take.
        """
        self._device = next(model.parameters()).device
        require_triton(self._device)
        self._model = model.config
        self._sizes = _Sizes.of(model.config.backbone_3d, self._device)
        modules = inference_modules(model)
        with torch.no_grad():
            self._stages = [
                _layers_of_stage(modules.backbone_3d, stage, shifts, self._sizes)
                for stage, shifts in enumerate(model.config.backbone_3d.shifts)
            ]
        for network in (modules.backbone_3d, modules.backbone_2d, modules.head):
            to_half(network)
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._poolings = [
            modules.backbone_3d.get_submodule(f"stage_{stage}_reduction") for stage in range(len(self._stages) - 1)
        ]
        self._backbone_2d, self._head = modules.backbone_2d, modules.head
        self._compile()

    def sparse(self, features: Tensor, partition: SetPartition) -> Tensor:
        """(V, D) voxel features to (V', D) float16 of the last stage."""
        largest = max(features.shape[0] * 3, *(slots_of(stage) for stage in partition.stages)) * features.shape[1]
        if largest > MAX_ELEMENTS:
            raise EngineError(f"{features.shape[0]} voxels are more than backend triton can number; use torch")
        # Triton launches on the current device, whatever its arguments are on.
        with torch.cuda.device(self._device if self._device.type == "cuda" else -1):
            for number, (layers, stage) in enumerate(zip(self._stages, partition.stages, strict=True)):
                features = self._run_stage(layers, features, stage, self._model.backbone_3d.stages[number].set_size)
                if stage.pooling is not None:
                    features = self._poolings[number](features, stage.pooling)
        return features

    def dense(self, bev: Tensor) -> HeadMaps:
        """(B, D, H, W) BEV map to what the head says, in float32."""
        maps = self._head(self._backbone_2d(bev.half()))
        return maps_from_tensors(dict(named_maps(maps)), self._model)

    def _run_stage(self, layers: list[_Layer], features: Tensor, stage: StagePartition, set_size: int) -> Tensor:
        from dsvt_ros.kernels import set_attention as kernels

        sizes = self._sizes
        num_voxels, channels = features.shape
        by_rows = {
            "CHUNK": sizes.chunk,
            "PARTS": channels // sizes.chunk,
            "ROWS": sizes.rows,
            "STAGES": sizes.stages,
            "num_warps": sizes.rows // ROWS_OF_WARP,
        }
        programs = (-(-num_voxels // sizes.rows),)
        x = features.new_empty(num_voxels, channels, dtype=torch.float16)
        qkv = x.new_empty(num_voxels, 3 * channels)
        first = layers[0]
        kernels.project[programs](
            features.contiguous(), x, qkv, first.qkv_weights, first.table, stage.cells[first.order], num_voxels,
            **by_rows,
        )  # fmt: skip
        block_input = x
        for number, layer in enumerate(layers):
            sets = stage.sets[layer.shift]
            assert sets is not None
            num_sets = sets.indices.shape[1]
            attended = x.new_empty(num_sets * set_size, channels)
            kernels.attend[num_sets, sizes.num_heads](
                qkv, sets.indices[layer.order], sets.mask[layer.order], attended,
                SET_SIZE=set_size,
                SLOTS=_padded(set_size),
                HEADS=sizes.num_heads,
                WIDTH=channels // sizes.num_heads,
                PADDED_WIDTH=_padded(channels // sizes.num_heads),
                num_warps=4,
            )  # fmt: skip
            ends_stage = number == len(layers) - 1
            following = first if ends_stage else layers[number + 1]
            output = torch.empty_like(x)
            kernels.finish_layer[programs](
                attended, sets.slot_of_voxel[layer.order], x, block_input, output, qkv,
                layer.out_weights, layer.up_weights, layer.down_weights, layer.vectors, layer.up_bias,
                following.qkv_weights, following.table, stage.cells[following.order], num_voxels,
                ENDS_BLOCK=layer.order == 1,
                ENDS_STAGE=ends_stage,
                HIDDEN=sizes.hidden,
                UP_PARTS=len(layer.up_bias) // sizes.hidden,
                **by_rows,
            )  # fmt: skip
            x = output
            if layer.order == 1:
                block_input = x
        return x

    def _compile(self) -> None:
        """Run once, so that what keeps Triton from compiling (no C compiler, for one) is known at the start."""
        config = self._model.backbone_3d
        coords = torch.zeros(1, 4, dtype=torch.int32, device=self._device)
        try:
            with torch.inference_mode():
                self.sparse(torch.zeros(1, config.channels, device=self._device), partition_sets(coords, self._model))
        except EngineError:
            raise
        except Exception as error:
            raise EngineError(
                f"Triton cannot compile or run its kernels here; use torch or tensorrt: {error}"
            ) from error


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


def require_triton(device: torch.device) -> None:
    """Check that Triton is here and can use the device; `EngineError` if not."""
    if importlib.util.find_spec("triton") is None:
        raise EngineError("backend triton: install triton; a Jetson without it uses torch or tensorrt")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    if device.type != "cuda":
        raise EngineError(f"backend triton needs a CUDA device, not {device}; use torch or onnxruntime")
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        raise EngineError(
            f"backend triton needs a GPU of compute capability {'.'.join(map(str, MIN_CAPABILITY))} or higher; "
            f"{torch.cuda.get_device_name(device)} has {'.'.join(map(str, capability))}: use torch or tensorrt"
        )


def slots_of(stage: StagePartition) -> int:
    """Slots of the window shift with the most sets."""
    return max(sets.indices.shape[1] * sets.indices.shape[2] for sets in stage.sets if sets is not None)


def _padded(size: int) -> int:
    """Blocks have powers of two as extents."""
    return max(MIN_EXTENT, 1 << (size - 1).bit_length())


def _largest_divisor(size: int, limit: int) -> int:
    """The largest power of two that divides `size`, up to `limit`."""
    return min(size & -size, limit)


def _layers_of_stage(
    backbone: SetAttentionBackbone, stage: int, shifts: tuple[int, ...], sizes: _Sizes
) -> list[_Layer]:
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
) -> _Layer:
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
    return _Layer(
        shift,
        order,
        qkv_weights=_half(tiled(weight, chunk, chunk)),
        table=_half(table),
        out_weights=_half(tiled(attention.out_proj.weight, chunk, chunk)),
        up_weights=_half(tiled(layer.linear1.weight, chunk, sizes.hidden)),
        # The other way round: tiles of one chunk of hidden channels lie together.
        down_weights=_half(tiled(layer.linear2.weight, sizes.hidden, chunk).transpose(0, 1)),
        vectors=torch.stack(vectors),
        up_bias=layer.linear1.bias.detach().clone(),
    )


def _half(values: Tensor) -> Tensor:
    half = values.half().contiguous()
    if not torch.isfinite(half).all():
        raise EngineError(
            f"set attention holds values up to {values.abs().max():.3g}, beyond the range of float16 (65504); use torch"
        )
    return half
