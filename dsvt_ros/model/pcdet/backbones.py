"""``VFE``, ``BACKBONE_3D``, ``MAP_TO_BEV`` and ``BACKBONE_2D``."""

from __future__ import annotations

from typing import Any

from dsvt_ros.config import ModelConfig
from dsvt_ros.model.pcdet.section import Section
from dsvt_ros.model.pcdet.translation import Translation

STAGE_KEYS = ("set_info", "window_shape", "hybrid_factor", "shifts_list", "downsample_stride")


def translate_encoder(out: Translation, vfe: Section) -> None:
    """The encoder; its names stand for the same layers, and differ in what they do with points out of range."""
    vfe.only("NAME", "DynPillarVFE3D", "DynPillarVFE", "DynamicVoxelVFE")
    vfe.only("WITH_DISTANCE", False)
    vfe.only("USE_ABSLOTE_XYZ", True)  # their spelling
    vfe.only("USE_NORM", True)
    out.put("model.encoder.channels", vfe.numbers("NUM_FILTERS"), vfe, "NUM_FILTERS")
    vfe.close()


def translate_backbone_3d(out: Translation, backbone: Section) -> None:
    """The set-attention backbone with its input layer."""
    backbone.only("NAME", "DSVT", "DSVT_TrtEngine")
    backbone.only("activation", "gelu")
    blocks = backbone.names("block_name")
    if set(blocks) != {"DSVTBlock"}:
        raise backbone.error("block_name", f"is {blocks}; only DSVTBlock is known")
    if len(blocks) > 1:
        backbone.only("reduction_type", "attention", default="attention")
    for theirs, ours in (("d_model", "channels"), ("dim_feedforward", "ffn_channels"), ("nhead", "num_heads")):
        values = backbone.numbers(theirs, count=len(blocks))
        if len(set(values)) != 1:
            raise backbone.error(theirs, f"is {values}; here all stages have the same")
        out.put(f"model.backbone_3d.{ours}", values[0], backbone, theirs)
    backbone.only("conv_out_channel", backbone.need("d_model")[-1], why="as in d_model")

    layout = backbone.section("INPUT_LAYER")
    layout.only("normalize_pos", False)
    for name in ("d_model", "set_info"):
        layout.only(name, backbone.need(name), why=f"as in BACKBONE_3D.{name}")
    out.put("model.backbone_3d.stages", _stages(layout, len(blocks)), layout, *STAGE_KEYS)
    layout.skip("sparse_shape")  # see check_sizes
    layout.close()
    backbone.skip("reduction_type", "dropout", "output_shape", "USE_CHECKPOINT", "ues_checkpoint", "trt_engine")
    backbone.close()


def _stages(layout: Section, count: int) -> list[dict[str, Any]]:
    """Our stages: the window of the second shift is the first one's times the hybrid factor."""
    sets, windows, factor, offsets, strides = (layout.need(name) for name in STAGE_KEYS)
    sizes = (count, count, 3, count, count - 1)
    for name, values, size in zip(STAGE_KEYS, (sets, windows, factor, offsets, strides), sizes, strict=True):
        if not isinstance(values, list) or len(values) != size:
            raise layout.error(name, f"is {values!r} and must be a list of {size}")
    for stride in strides:
        if not isinstance(stride, list) or len(stride) != 3 or stride[:2] != [1, 1]:
            raise layout.error("downsample_stride", f"has {stride}; here stages are pooled along z alone: [1, 1, n]")
    stages = []
    for number in range(count):
        try:
            set_size, num_blocks = sets[number]
            second = [cells * by for cells, by in zip(windows[number], factor, strict=True)]
        except (TypeError, ValueError):
            raise layout.error(
                "set_info", "must hold two numbers for each stage, and window_shape and hybrid_factor three"
            ) from None
        stage = {
            "num_blocks": num_blocks,
            "set_size": set_size,
            "windows": [windows[number], second],
            "offsets": offsets[number],
        }
        stages.append(stage if number == count - 1 else {**stage, "pool_z": strides[number][2]})
    return stages


def translate_backbone_2d(out: Translation, backbone: Section) -> None:
    """The BEV backbone."""
    backbone.only("NAME", "BaseBEVResBackbone")
    # Theirs leaves out the first block, which changes the resolution.
    blocks = [number + 1 for number in backbone.numbers("LAYER_NUMS")]
    out.put("model.backbone_2d.blocks", blocks, backbone, "LAYER_NUMS")
    for theirs, ours in (
        ("LAYER_STRIDES", "strides"),
        ("NUM_FILTERS", "channels"),
        ("UPSAMPLE_STRIDES", "upsample_strides"),
        ("NUM_UPSAMPLE_FILTERS", "upsample_channels"),
    ):
        out.put(f"model.backbone_2d.{ours}", backbone.numbers(theirs, count=len(blocks)), backbone, theirs)
    backbone.close()


def check_sizes(model: ModelConfig, network: Section) -> None:
    """Refuse sizes that contradict the range, the voxel size or each other."""
    nx, ny, nz = model.grid_size
    layout = network.section("BACKBONE_3D").section("INPUT_LAYER")
    layout.only("sparse_shape", [nx, ny, nz], why="the range in voxels")
    vfe = network.section("VFE")
    if vfe.need("NAME") == "DynPillarVFE" and nz > 1:
        raise vfe.error("NAME", f"is DynPillarVFE, which makes pillars, but voxels are stacked {nz} high")
    scatter = network.section("MAP_TO_BEV")
    if scatter.only("NAME", "PointPillarScatter3d", "PointPillarScatter") == "PointPillarScatter3d":
        scatter.only("INPUT_SHAPE", [nx, ny, 1], why="the range in pillars")
    scatter.only("NUM_BEV_FEATURES", model.backbone_3d.channels, why="as in BACKBONE_3D.d_model")
    scatter.close()
    head = network.section("DENSE_HEAD")
    targets = head.section("TARGET_ASSIGNER_CONFIG")
    targets.only("FEATURE_MAP_STRIDE", model.output_stride, why="what the strides of BACKBONE_2D come to")
    columns, rows = model.map_size
    if model.head.type == "transfusion" and columns != rows:
        raise head.error("NAME", f"is TransFusionHead, published for square maps alone; this is {columns} x {rows}")
