"""The two networks as functions of tensors alone, made of the modules that the torch backend runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsvt_ros.capacity import Capacity
from dsvt_ros.config import ModelConfig
from dsvt_ros.errors import EngineError
from dsvt_ros.model.bev_backbone import BevBackbone
from dsvt_ros.model.center_head import HeadMaps, MergedHead
from dsvt_ros.model.fold import InferenceModules
from dsvt_ros.model.set_attention import InputLayer, SetAttentionBackbone
from dsvt_ros.structures import SetPartition, WindowShift

PARTITION_TENSORS = tuple(
    f"{field.name}_shift_{shift}" for shift in (0, 1) for field in dataclasses.fields(WindowShift)
)
MAPS = tuple(field.name for field in dataclasses.fields(HeadMaps))


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of an exported network.

    Attributes:
        name: Its name in the file.
        type: NumPy's name of its element type.
        shape: Extents; a text names one that is only known at run time.
    """

    name: str
    type: str
    shape: tuple[int | str, ...]


# Inputs and outputs.
Specs = tuple[list[TensorSpec], list[TensorSpec]]


class SparseNetwork(nn.Module):
    """Set attention over voxels."""

    def __init__(self, backbone_3d: SetAttentionBackbone) -> None:
        super().__init__()
        self.backbone_3d = backbone_3d

    def forward(self, voxel_features: Tensor, *partition: Tensor) -> Tensor:
        """(V, D) features and the tensors of a partition, as `sparse_inputs` orders them, to (V, D)."""
        output: Tensor = self.backbone_3d(voxel_features, partition_from_tensors(partition))
        return output


class DenseNetwork(nn.Module):
    """BEV backbone and head."""

    def __init__(self, backbone_2d: BevBackbone, head: MergedHead) -> None:
        super().__init__()
        self.backbone_2d = backbone_2d
        self.head = head

    def forward(self, bev: Tensor) -> tuple[Tensor, ...]:
        """(B, D, H, W) map to the head's maps, in the order of `HeadMaps`."""
        maps: HeadMaps = self.head(self.backbone_2d(bev))
        return tuple(values for name in MAPS if isinstance(values := getattr(maps, name), Tensor))


class ReleaseNetwork(nn.Module):
    """Set attention with the inputs of the published deployment (DSVT ``tools/deploy.py``)."""

    def __init__(self, backbone_3d: SetAttentionBackbone) -> None:
        super().__init__()
        self.backbone_3d = backbone_3d

    def forward(
        self, src: Tensor, indices_0: Tensor, indices_1: Tensor, masks_0: Tensor, masks_1: Tensor, positions: Tensor
    ) -> Tensor:
        """Attend.

        Args:
            src: (V, D) voxel features.
            indices_0: (2, S0, L) int64 voxels of the first shift's sets.
            indices_1: (2, S1, L) int64.
            masks_0: (2, S0, L) bool, True for repeated slots.
            masks_1: (2, S1, L) bool.
            positions: (blocks, 2, V, D) position embeddings.

        Returns:
            (V, D) features.
        """
        num_voxels = src.shape[0]  # len() would be a constant to the tracer
        partition = SetPartition(
            (_shift_from_release(indices_0, masks_0, num_voxels), _shift_from_release(indices_1, masks_1, num_voxels))
        )
        for block in range(len(self.backbone_3d.stage_0)):
            of_block = [positions[block, 0], positions[block, 1]]
            src = self.backbone_3d.run_block(block, src, of_block, partition)
        return src


def _shift_from_release(indices: Tensor, mask: Tensor, num_voxels: int) -> WindowShift:
    """The published interface lacks the inverse of `indices`, so the graph scatters slot numbers to find it."""
    slots = torch.arange(indices.shape[1] * indices.shape[2], device=indices.device)
    rows = []
    for order in (0, 1):
        # Repeated slots go to a row of their own: ONNX leaves open which of several writes wins.
        target = indices[order].masked_fill(mask[order], num_voxels).reshape(-1)
        rows.append(slots.new_zeros(num_voxels + 1).index_put((target,), slots)[:num_voxels])
    return WindowShift(indices, mask, torch.stack(rows), cell_of_voxel=slots)  # positions are given: no cells needed


class DecomposedLayerNorm(nn.Module):
    """Layer norm in elementary operators, for parsers without ``LayerNormalization`` (TensorRT 8.5)."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension."""
        centered = x - x.mean(-1, keepdim=True)
        variance = (centered * centered).mean(-1, keepdim=True)
        return centered / torch.sqrt(variance + self.eps) * self.weight + self.bias


def decompose_layer_norms(module: nn.Module) -> None:
    """Replace, in place, every layer norm below `module` by its decomposition."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.LayerNorm):
            setattr(module, name, DecomposedLayerNorm(child))
        else:
            decompose_layer_norms(child)


def to_half(module: nn.Module) -> None:
    """Make, in place, all parameters and tables of `module` float16, except those of layer norms.

    Raises:
        EngineError: A value exceeds the range of float16.
    """
    for path, part in module.named_modules():
        if isinstance(part, (nn.LayerNorm, DecomposedLayerNorm)):
            continue
        for name, parameter in part.named_parameters(recurse=False):
            parameter.data = _half(parameter.data, f"{path}.{name}")
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.is_floating_point():
                setattr(part, name, _half(buffer, f"{path}.{name}"))


def _half(values: Tensor, name: str) -> Tensor:
    half = values.half()
    if not torch.isfinite(half).all():
        raise EngineError(
            f"{name} holds values up to {values.abs().max():.3g}, beyond the range of float16 (65504); "
            f"use --precision fp32"
        )
    return half


def partition_from_tensors(tensors: Iterable[Tensor]) -> SetPartition:
    """The partition that `PARTITION_TENSORS` name, in that order."""
    values = list(tensors)
    half = len(values) // 2
    return SetPartition((WindowShift(*values[:half]), WindowShift(*values[half:])))


def tensors_for(specs: Iterable[TensorSpec], device: torch.device) -> dict[str, Tensor]:
    """Zeros of the types and shapes that `specs` describe, by name; all extents must be numbers."""
    return {
        spec.name: torch.zeros([int(size) for size in spec.shape], dtype=getattr(torch, spec.type), device=device)
        for spec in specs
    }


def sparse_inputs(features: Tensor, partition: SetPartition) -> dict[str, Tensor]:
    """Inputs of the exported sparse network by name, with int32 indices."""
    inputs = {"voxel_features": features}
    for number, shift in enumerate(partition.shifts):
        for field in dataclasses.fields(WindowShift):
            values: Tensor = getattr(shift, field.name)
            inputs[f"{field.name}_shift_{number}"] = values if values.dtype == torch.bool else values.int()
    return inputs


def maps_from_tensors(tensors: Mapping[str, Tensor]) -> HeadMaps:
    """The head's maps in float32 from the outputs of the exported dense network by name."""
    return HeadMaps(**{name: tensors[name].float() if name in tensors else None for name in MAPS})  # type: ignore[arg-type]


def sparse_specs(model: ModelConfig, capacity: Capacity | None, float_type: str) -> Specs:
    """Inputs and outputs of the sparse network; without a capacity, counts are only known at run time."""
    backbone = model.backbone_3d
    voxels: int | str = capacity.voxels if capacity else "num_voxels"
    inputs = [TensorSpec("voxel_features", float_type, (voxels, backbone.channels))]
    for number in (0, 1):
        sets: int | str = capacity.sets[number] if capacity else f"num_sets_shift_{number}"
        inputs += [
            TensorSpec(f"set_indices_shift_{number}", "int32", (2, sets, backbone.set_size)),
            TensorSpec(f"set_mask_shift_{number}", "bool", (2, sets, backbone.set_size)),
            TensorSpec(f"slot_of_voxel_shift_{number}", "int32", (2, voxels)),
            TensorSpec(f"cell_of_voxel_shift_{number}", "int32", (voxels,)),
        ]
    return inputs, [TensorSpec("features", float_type, (voxels, backbone.channels))]


def dense_specs(model: ModelConfig, modules: InferenceModules, float_type: str) -> Specs:
    """Inputs and outputs of the dense network for one cloud."""
    nx, ny, _ = model.grid_size
    stage = model.backbone_2d
    rows, columns = (((cells - 1) // stage.strides[0] + 1) * stage.upsample_strides[0] for cells in (ny, nx))
    channels = {"heatmap" if name == "hm" else name: count for name, count in modules.head.channels.items()}
    outputs = [TensorSpec(name, float_type, (1, channels[name], rows, columns)) for name in MAPS if name in channels]
    return [TensorSpec("bev", float_type, (1, model.backbone_3d.channels, ny, nx))], outputs


def release_inputs(input_layer: InputLayer, features: Tensor, partition: SetPartition) -> dict[str, Tensor]:
    """Inputs of the published deployment by name; `input_layer` gives the position embeddings."""
    blocks = len(input_layer.posembed_layers[0])  # type: ignore[arg-type]
    inputs = {
        "src": features,
        "pos_embed_tensor": torch.stack([torch.stack(input_layer(block, partition)) for block in range(blocks)]),
    }
    for number, shift in enumerate(partition.shifts):
        inputs[f"set_voxel_inds_tensor_shift_{number}"] = shift.set_indices
        inputs[f"set_voxel_masks_tensor_shift_{number}"] = shift.set_mask
    return inputs


def release_specs(model: ModelConfig) -> Specs:
    """Inputs and outputs of the published deployment; names and dynamic axes as in DSVT ``tools/deploy.py``."""
    backbone = model.backbone_3d
    voxels = "voxel_number"
    inputs = [TensorSpec("src", "float32", (voxels, backbone.channels))]
    for kind, of_type in (("inds", "int64"), ("masks", "bool")):
        inputs += [
            TensorSpec(
                f"set_voxel_{kind}_tensor_shift_{number}",
                of_type,
                (2, f"set_number_shift_{number}", backbone.set_size),
            )
            for number in (0, 1)
        ]
    inputs.append(TensorSpec("pos_embed_tensor", "float32", (backbone.num_blocks, 2, voxels, backbone.channels)))
    return inputs, [TensorSpec("output", "float32", (voxels, backbone.channels))]
