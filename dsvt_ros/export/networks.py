"""The two networks as functions of tensors alone, made of the modules that the torch backend runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsvt_ros.capacity import Capacity
from dsvt_ros.config import (
    PROPOSAL_BRANCHES,
    Backbone3dConfig,
    CenterHeadConfig,
    ModelConfig,
)
from dsvt_ros.errors import EngineError
from dsvt_ros.model.bev_backbone import BevBackbone
from dsvt_ros.model.center_head import MergedHead
from dsvt_ros.model.fold import InferenceModules
from dsvt_ros.model.set_attention import InputLayer, SetAttentionBackbone
from dsvt_ros.model.transfusion_head import ProposalDecoder, TransFusionHead
from dsvt_ros.structures import (
    CenterMaps,
    HeadMaps,
    Pooling,
    ProposalMaps,
    SetPartition,
    StagePartition,
    VoxelSets,
)


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

    def __init__(self, backbone_3d: SetAttentionBackbone, config: Backbone3dConfig) -> None:
        super().__init__()
        self.backbone_3d = backbone_3d
        self.config = config

    def forward(self, voxel_features: Tensor, *partition: Tensor) -> Tensor:
        """(V, D) features and the tensors of a partition, as `partition_names` orders them, to (V', D)."""
        tensors = dict(zip(partition_names(self.config), partition, strict=True))
        output: Tensor = self.backbone_3d(voxel_features, partition_from_tensors(tensors, self.config))
        return output


class DenseNetwork(nn.Module):
    """BEV backbone and head."""

    def __init__(self, backbone_2d: BevBackbone, head: MergedHead | TransFusionHead) -> None:
        super().__init__()
        self.backbone_2d = backbone_2d
        self.head = head

    def forward(self, bev: Tensor) -> tuple[Tensor, ...]:
        """(B, D, H, W) map to what the head says, in the order of `HeadMaps`, integers as int32."""
        maps = named_maps(self.head(self.backbone_2d(bev)))
        return tuple(values if values.is_floating_point() else values.int() for _, values in maps)


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
        sets = tuple(
            _sets_from_release(indices, mask, num_voxels)
            for indices, mask in ((indices_0, masks_0), (indices_1, masks_1))
        )
        stage = StagePartition(cells=(src, src), sets=(sets[0], sets[1]), pooling=None)  # positions are given
        for block in range(len(self.backbone_3d.shifts[0])):
            of_block = [positions[block, 0], positions[block, 1]]
            src = self.backbone_3d.run_block(0, block, src, of_block, stage)
        return src


def _sets_from_release(indices: Tensor, mask: Tensor, num_voxels: int) -> VoxelSets:
    """The published interface lacks the inverse of `indices`, so the graph scatters slot numbers to find it."""
    slots = torch.arange(indices.shape[1] * indices.shape[2], device=indices.device)
    rows = []
    for order in (0, 1):
        # Repeated slots go to a row of their own: ONNX leaves open which of several writes wins.
        target = indices[order].masked_fill(mask[order], num_voxels).reshape(-1)
        rows.append(slots.new_zeros(num_voxels + 1).index_put((target,), slots)[:num_voxels])
    return VoxelSets(indices, mask, torch.stack(rows))


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
    """Make, in place, all parameters and tables of `module` float16, except those that belong in single precision.

    Raises:
        EngineError: A value exceeds the range of float16.
    """
    single = (nn.LayerNorm, DecomposedLayerNorm, ProposalDecoder)
    kept = {inner for part in module.modules() if isinstance(part, single) for inner in part.modules()}
    for path, part in module.named_modules():
        if part in kept:
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


def partition_names(config: Backbone3dConfig) -> list[str]:
    """Names of a partition's tensors as inputs of the sparse network."""
    names = []
    for stage, shifts in enumerate(config.shifts):
        for shift in (0, 1):
            names.append(f"cell_of_voxel_stage_{stage}_shift_{shift}")
            if shift in shifts:
                names += [
                    f"{field}_stage_{stage}_shift_{shift}" for field in ("set_indices", "set_mask", "slot_of_voxel")
                ]
        if stage < len(config.shifts) - 1:
            names += [f"pool_indices_stage_{stage}", f"pool_mask_stage_{stage}"]
    return names


def partition_from_tensors(tensors: Mapping[str, Tensor], config: Backbone3dConfig) -> SetPartition:
    """The partition that tensors named as in `partition_names` make; its coordinates are left empty."""
    stages = []
    for stage, shifts in enumerate(config.shifts):
        cells = [tensors[f"cell_of_voxel_stage_{stage}_shift_{shift}"] for shift in (0, 1)]
        sets = [
            VoxelSets(
                tensors[f"set_indices_stage_{stage}_shift_{shift}"],
                tensors[f"set_mask_stage_{stage}_shift_{shift}"],
                tensors[f"slot_of_voxel_stage_{stage}_shift_{shift}"],
            )
            if shift in shifts
            else None
            for shift in (0, 1)
        ]
        pooling = None
        if stage < len(config.shifts) - 1:
            pooling = Pooling(tensors[f"pool_indices_stage_{stage}"], tensors[f"pool_mask_stage_{stage}"])
        stages.append(StagePartition((cells[0], cells[1]), (sets[0], sets[1]), pooling))
    return SetPartition(tuple(stages), coords=cells[0].new_empty(0, 4))


def tensors_of_partition(partition: SetPartition) -> dict[str, Tensor]:
    """A partition's tensors by name, in the order of `partition_names`, with int32 indices."""
    tensors = {}
    for number, stage in enumerate(partition.stages):
        for shift, (cells, sets) in enumerate(zip(stage.cells, stage.sets, strict=True)):
            end = f"_stage_{number}_shift_{shift}"
            tensors["cell_of_voxel" + end] = cells.int()
            if sets is not None:
                tensors["set_indices" + end] = sets.indices.int()
                tensors["set_mask" + end] = sets.mask
                tensors["slot_of_voxel" + end] = sets.slot_of_voxel.int()
        if stage.pooling is not None:
            tensors[f"pool_indices_stage_{number}"] = stage.pooling.indices.int()
            tensors[f"pool_mask_stage_{number}"] = stage.pooling.mask
    return tensors


def tensors_for(specs: Iterable[TensorSpec], device: torch.device) -> dict[str, Tensor]:
    """Zeros of the types and shapes that `specs` describe, by name; all extents must be numbers."""
    return {
        spec.name: torch.zeros([int(size) for size in spec.shape], dtype=getattr(torch, spec.type), device=device)
        for spec in specs
    }


def sparse_inputs(features: Tensor, partition: SetPartition) -> dict[str, Tensor]:
    """Inputs of the exported sparse network by name, with int32 indices."""
    return {"voxel_features": features, **tensors_of_partition(partition)}


def named_maps(maps: HeadMaps) -> list[tuple[str, Tensor]]:
    """What the head says, by name; branches that it lacks are left out."""
    values = ((field.name, getattr(maps, field.name)) for field in dataclasses.fields(maps))
    return [(name, value) for name, value in values if value is not None]


def maps_from_tensors(tensors: Mapping[str, Tensor], model: ModelConfig) -> HeadMaps:
    """What the head says, in float32, from the outputs of the exported dense network by name."""
    kind = CenterMaps if isinstance(model.head, CenterHeadConfig) else ProposalMaps
    values = {field.name: tensors.get(field.name) for field in dataclasses.fields(kind)}
    return kind(
        **{
            name: value.float() if value is not None and value.is_floating_point() else value
            for name, value in values.items()
        }  # type: ignore[arg-type]
    )


def sparse_specs(model: ModelConfig, capacity: Capacity | None, float_type: str) -> Specs:
    """Inputs and outputs of the sparse network; without a capacity, counts are only known at run time."""
    backbone = model.backbone_3d
    shapes: dict[str, tuple[int | str, ...]] = {}
    rooms: list[int | str] = []
    for number, stage in enumerate(backbone.stages):
        voxels: int | str = capacity.stages[number].voxels if capacity else f"num_voxels_stage_{number}"
        rooms.append(voxels)
        for shift in (0, 1):
            end = f"_stage_{number}_shift_{shift}"
            sets: int | str = capacity.stages[number].sets[shift] if capacity else f"num_sets{end}"
            shapes[f"cell_of_voxel{end}"] = (voxels,)
            shapes[f"set_indices{end}"] = shapes[f"set_mask{end}"] = (2, sets, stage.set_size)
            shapes[f"slot_of_voxel{end}"] = (2, voxels)
        if number:
            slots = backbone.stages[number - 1].pool_z
            shapes[f"pool_indices_stage_{number - 1}"] = shapes[f"pool_mask_stage_{number - 1}"] = (voxels, slots)
    inputs = [TensorSpec("voxel_features", float_type, (rooms[0], backbone.channels))]
    inputs += [
        TensorSpec(name, "bool" if "_mask_" in name else "int32", shapes[name]) for name in partition_names(backbone)
    ]
    return inputs, [TensorSpec("features", float_type, (rooms[-1], backbone.channels))]


def dense_specs(model: ModelConfig, modules: InferenceModules, float_type: str) -> Specs:
    """Inputs and outputs of the dense network for one cloud."""
    nx, ny, _ = model.grid_size
    columns, rows = model.map_size
    classes, branches = len(model.class_names), model.head.branches
    outputs = []
    if isinstance(modules.head, MergedHead):
        channels = {"heatmap" if name == "hm" else name: count for name, count in modules.head.channels.items()}
        names = [field.name for field in dataclasses.fields(CenterMaps)]
        outputs = [
            TensorSpec(name, float_type, (1, channels[name], rows, columns)) for name in names if name in channels
        ]
    else:
        count = modules.head.config.num_proposals
        outputs = [TensorSpec(name, "int32", (1, count)) for name in ("label", "cell")]
        outputs.append(TensorSpec("peak", "float32", (1, count)))
        outputs.append(TensorSpec("heatmap", float_type, (1, classes, count)))
        outputs += [
            TensorSpec(name, float_type, (1, channels, count))
            for name, channels in PROPOSAL_BRANCHES.items()
            if name in branches
        ]
    return [TensorSpec("bev", float_type, (1, model.backbone_3d.channels, ny, nx))], outputs


def release_inputs(input_layer: InputLayer, features: Tensor, partition: SetPartition) -> dict[str, Tensor]:
    """Inputs of the published deployment by name; `input_layer` gives the position embeddings."""
    blocks = len(input_layer.posembed_layers[0])  # type: ignore[arg-type]
    (stage,) = partition.stages
    inputs = {
        "src": features,
        "pos_embed_tensor": torch.stack([torch.stack(input_layer(0, block, stage)) for block in range(blocks)]),
    }
    for number, sets in enumerate(stage.sets):
        assert sets is not None
        inputs[f"set_voxel_inds_tensor_shift_{number}"] = sets.indices
        inputs[f"set_voxel_masks_tensor_shift_{number}"] = sets.mask
    return inputs


def release_specs(model: ModelConfig) -> Specs:
    """Inputs and outputs of the published deployment; names and dynamic axes as in DSVT ``tools/deploy.py``.

    Raises:
        EngineError: The model has several stages, or a shift without sets.
    """
    backbone = model.backbone_3d
    if len(backbone.stages) != 1 or set(backbone.shifts[0]) != {0, 1}:
        raise EngineError(
            f"the published interface is for one stage with two blocks or more; {model.name} has "
            f"{len(backbone.stages)} stages of {', '.join(str(stage.num_blocks) for stage in backbone.stages)} blocks"
        )
    (stage,) = backbone.stages
    voxels = "voxel_number"
    inputs = [TensorSpec("src", "float32", (voxels, backbone.channels))]
    for kind, of_type in (("inds", "int64"), ("masks", "bool")):
        inputs += [
            TensorSpec(
                f"set_voxel_{kind}_tensor_shift_{number}", of_type, (2, f"set_number_shift_{number}", stage.set_size)
            )
            for number in (0, 1)
        ]
    inputs.append(TensorSpec("pos_embed_tensor", "float32", (stage.num_blocks, 2, voxels, backbone.channels)))
    return inputs, [TensorSpec("output", "float32", (voxels, backbone.channels))]
