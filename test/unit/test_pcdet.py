"""OpenPCDet's YAML files: what they come to, where values came from, and what is refused."""

import dataclasses
import io

import pytest
import torch
import yaml
from pcdet_yamls import WAYMO_BASE, branches, changed, custom, nuscenes, waymo, write
from rich.console import Console

from dsvt_ros.config import CenterHeadConfig
from dsvt_ros.errors import ConfigError
from dsvt_ros.model.dsvt import DSVT
from dsvt_ros.model.folder import open_model
from dsvt_ros.model.pcdet.files import write_origin
from dsvt_ros.model.pcdet.reader import read_pcdet
from dsvt_ros.tools.pcdet_table import pcdet_table

PUBLISHED = {
    "waymo_pillar of the release": (waymo(), "waymo_pillar"),
    "waymo_voxel of the release": (waymo(voxels=True), "waymo_voxel"),
    "nuscenes_pillar of the release": (nuscenes(), "nuscenes_pillar"),
    "waymo_pillar of OpenPCDet": (waymo(openpcdet=True), "waymo_pillar"),
    "waymo_voxel of OpenPCDet": (waymo(voxels=True, openpcdet=True), "waymo_voxel"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_the_embedded_ones(tmp_path, name):
    content, embedded = PUBLISHED[name]
    found = open_model(write(tmp_path / "theirs.yaml", content))
    expected = open_model(embedded)
    assert found.model.name == "theirs"
    # Theirs are Vehicle, Pedestrian and Cyclist, as in the data set.
    assert tuple(name.lower() for name in found.model.class_names) == expected.model.class_names
    names = {"name": embedded, "class_names": expected.model.class_names}
    assert dataclasses.replace(found.model, **names) == expected.model
    defaults = expected.defaults
    if "OpenPCDet" in name:  # which loosened one threshold
        defaults = dataclasses.replace(
            defaults, postprocess=dataclasses.replace(defaults.postprocess, nms_iou=(0.75, 0.6, 0.55))
        )
    assert found.defaults == defaults


def test_a_model_of_ones_own(tmp_path):
    found = open_model(write(tmp_path / "own.yaml", custom()))
    model, post = found.model, found.defaults.postprocess
    assert model.class_names == ("van", "walker", "pole")
    assert model.feature_names == ("x", "y", "z", "intensity")
    assert [feature.scale for feature in model.features] == ["none"] * 4
    assert model.grid_size == (32, 32, 2)
    first, second = model.backbone_3d.stages
    assert (first.num_blocks, first.set_size, first.pool_z) == (1, 5, 2)
    assert first.windows == ((6, 5, 2), (12, 5, 2))
    assert second.windows == ((6, 5, 1), (12, 5, 1))
    assert second.offsets == ((0, 0, 0), (3, 2, 0))
    assert model.backbone_2d.blocks == (1, 2)
    assert isinstance(model.head, CenterHeadConfig)
    assert model.head.groups == (("pole", "van"), ("walker",))
    assert model.head.branches == ("center", "center_z", "dim", "rot", "vel", "hm")
    assert model.head.bias_before_norm
    assert (post.nms_classes, post.nms_iou, post.max_boxes, post.max_candidates) == ("group", (0.3,), (), 40)
    assert post.iou_rectifier == ()
    assert any("CustomDataset" in remark for remark in found.pcdet.remarks)


def test_upstream_default_of_a_missing_epsilon(tmp_path):
    """Published configurations set 0.001; without it, OpenPCDet trains with 1e-5."""
    given = open_model(write(tmp_path / "own.yaml", changed(waymo(), f"{HEAD}.BN_EPS", 0.002)))
    missing = open_model(write(tmp_path / "other.yaml", changed(waymo(), f"{HEAD}.BN_EPS", None)))
    assert (given.model.head.norm_eps, missing.model.head.norm_eps) == (0.002, 1e-5)
    norms = [part for part in DSVT(missing.model).dense_head.modules() if isinstance(part, torch.nn.BatchNorm2d)]
    assert {norm.eps for norm in norms} == {1e-5}


@pytest.mark.parametrize(
    ("yaml_at", "base_at"),
    [
        ("tools/cfgs/dsvt_models/model.yaml", "tools/cfgs/dataset_configs/waymo_dataset.yaml"),
        ("model.yaml", "tools/cfgs/dataset_configs/waymo_dataset.yaml"),
        ("a/b/model.yaml", "cfgs/dataset_configs/waymo_dataset.yaml"),
        ("model.yaml", "waymo_dataset.yaml"),
    ],
)
def test_base_files_are_found_around_the_model(tmp_path, yaml_at, base_at):
    base = changed(WAYMO_BASE, "POINT_FEATURE_ENCODING.used_feature_list", ["x", "y", "z", "elongation"])
    write(tmp_path / base_at, base)
    found = read_pcdet(write(tmp_path / yaml_at, waymo()))
    assert found.model.feature_names == ("x", "y", "z", "elongation")
    (row,) = [row for row in found.rows if row.key == "model.features"]
    assert row.from_files == ("waymo_dataset.yaml",)


def test_an_absolute_base_file(tmp_path):
    base = write(tmp_path / "far" / "away.yaml", changed(WAYMO_BASE, "DATASET", "KittiDataset"))
    content = changed(waymo(), "DATA_CONFIG._BASE_CONFIG_", str(base))
    assert read_pcdet(write(tmp_path / "near" / "model.yaml", content)).model.ground_z == -1.73


def test_without_its_base_file_the_table_says_what_was_assumed(tmp_path):
    found = read_pcdet(write(tmp_path / "model.yaml", nuscenes()))
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(pcdet_table(found))
    text = console.export_text()
    assert "nuscenes_dataset.yaml (not found: known facts)" in text
    assert "MODEL.BACKBONE_3D.INPUT_LAYER.set_info, window_shape, hybrid_factor" in text
    assert "{name: time}" in text


def test_an_unknown_base_file_is_named(tmp_path):
    content = changed(waymo(), "DATA_CONFIG._BASE_CONFIG_", "cfgs/dataset_configs/mine.yaml")
    with pytest.raises(ConfigError, match=r"base file cfgs/dataset_configs/mine.yaml was looked for"):
        read_pcdet(write(tmp_path / "model.yaml", content))


def scales(tmp_path, content):
    model = read_pcdet(write(tmp_path / "model.yaml", content)).model
    return [feature.name for feature in model.features if feature.scale == "tanh"]


def test_which_columns_are_squashed(tmp_path):
    """The release does it in code, OpenPCDet asks POINTS_TANH_DIM, and other data sets do not at all."""
    ours = waymo(openpcdet=True)
    assert scales(tmp_path, waymo()) == ["intensity", "elongation"]
    assert scales(tmp_path, ours) == ["intensity", "elongation"]
    assert scales(tmp_path, changed(ours, "DATA_CONFIG.POINTS_TANH_DIM", None)) == ["intensity"]
    assert scales(tmp_path, changed(ours, "DATA_CONFIG.POINTS_TANH_DIM", [4])) == ["elongation"]
    kitti = changed(ours, "DATA_CONFIG._BASE_CONFIG_", "cfgs/dataset_configs/kitti_dataset.yaml")
    assert scales(tmp_path, kitti) == []
    unclear = changed(waymo(), "MODEL.VFE.NAME", "DynPillarVFE")
    unclear["MODEL"]["DENSE_HEAD"]["POST_PROCESSING"]["NMS_CONFIG"] = custom()["MODEL"]["DENSE_HEAD"][
        "POST_PROCESSING"
    ]["NMS_CONFIG"] | {"NMS_POST_MAXSIZE": 500}
    with pytest.raises(ConfigError, match=r"POINTS_TANH_DIM is missing, .* add \[3, 4\] or \[3\]"):
        scales(tmp_path, unclear)


def test_several_frames(tmp_path):
    content = changed(waymo(), "DATA_CONFIG._BASE_CONFIG_", "cfgs/dataset_configs/waymo_dataset_multiframe.yaml")
    content["DATA_CONFIG"]["SEQUENCE_CONFIG"] = {"ENABLED": True, "SAMPLE_OFFSET": [-3, 0]}
    model = read_pcdet(write(tmp_path / "model.yaml", content)).model
    assert model.sweeps == 4
    assert model.feature_names == ("x", "y", "z", "intensity", "elongation", "time")
    content["DATA_CONFIG"]["SEQUENCE_CONFIG"]["ENABLED"] = False
    assert read_pcdet(write(tmp_path / "model.yaml", content)).model.sweeps == 1


HEAD, POST = "MODEL.DENSE_HEAD", "MODEL.DENSE_HEAD.POST_PROCESSING"
BACKBONE, LAYOUT = "MODEL.BACKBONE_3D", "MODEL.BACKBONE_3D.INPUT_LAYER"
NMS_GPU = {"NMS_TYPE": "nms_gpu", "NMS_THRESH": 0.2, "NMS_PRE_MAXSIZE": 1000, "NMS_POST_MAXSIZE": 83}


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        (f"{POST}.IOU_RECTIFIER", 0.5, {"iou_rectifier": (0.5,)}),
        (f"{POST}.USE_IOU_TO_RECTIFY_SCORE", False, {"iou_rectifier": ()}),
        (f"{POST}.USE_IOU_TO_RECTIFY_SCORE", None, {"iou_rectifier": ()}),
        (f"{POST}.NMS_CONFIG", NMS_GPU, {"nms_classes": "group", "nms_iou": (0.2,), "max_boxes": (83,)}),
        (f"{POST}.NMS_CONFIG.NMS_POST_MAXSIZE", [500, 100, 50], {"nms_classes": "own", "max_boxes": (500, 100, 50)}),
        (f"{POST}.MAX_OBJ_PER_SAMPLE", 300, {"max_candidates": 300, "max_boxes": ()}),
        (f"{POST}.SCORE_THRESH", 0.25, {"score_threshold": 0.25}),
    ],
)
def test_post_processing(tmp_path, key, value, expected):
    post = read_pcdet(write(tmp_path / "model.yaml", changed(waymo(), key, value))).defaults.postprocess
    assert {name: getattr(post, name) for name in expected} == expected


def test_a_limit_of_boxes_in_a_group_is_remarked(tmp_path):
    found = read_pcdet(write(tmp_path / "model.yaml", changed(waymo(), f"{POST}.NMS_CONFIG", NMS_GPU)))
    assert "at most 83 boxes of a group" in "".join(found.remarks)


def test_proposals_of_waymo(tmp_path):
    """The release's constants for TARGET_ASSIGNER_CONFIG.DATASET: Waymo."""
    content = changed(waymo(), "MODEL.DENSE_HEAD", nuscenes()["MODEL"]["DENSE_HEAD"])
    content["MODEL"]["DENSE_HEAD"]["TARGET_ASSIGNER_CONFIG"] = {"FEATURE_MAP_STRIDE": 1, "DATASET": "Waymo"}
    found = read_pcdet(write(tmp_path / "model.yaml", content))
    assert found.model.head.small_classes == ("Pedestrian", "Cyclist")
    assert found.defaults.postprocess.nms_iou == (0.7, 0.7, 0.7)
    assert found.defaults.postprocess.max_boxes == (100, 100, 100)


def test_points_out_of_range_of_a_pillar_are_remarked(tmp_path):
    content = nuscenes()
    assert read_pcdet(write(tmp_path / "model.yaml", content)).remarks == ()
    del content["DATA_CONFIG"]["DATA_PROCESSOR"][0]["MASK_Z"]
    assert "above and below" in "".join(read_pcdet(write(tmp_path / "model.yaml", content)).remarks)


WAYMO_REFUSED = [
    ("MODEL.NAME", "PVRCNN", "MODEL.NAME is PVRCNN and must be CenterPoint or TransFusion"),
    ("MODEL.ROI_HEAD", {"NAME": "PVRCNNHead"}, "MODEL.ROI_HEAD is not known here"),
    ("MODEL.VFE.NAME", "PillarVFE", "MODEL.VFE.NAME is PillarVFE and must be"),
    ("MODEL.VFE.WITH_DISTANCE", True, "MODEL.VFE.WITH_DISTANCE is True and must be False"),
    ("MODEL.VFE.USE_ABSLOTE_XYZ", False, "MODEL.VFE.USE_ABSLOTE_XYZ is False"),
    ("MODEL.VFE.USE_NORM", False, "MODEL.VFE.USE_NORM is False"),
    ("MODEL.VFE.USE_CLUSTER", True, "MODEL.VFE.USE_CLUSTER is not known here; remove it"),
    ("MODEL.VFE.NUM_FILTERS", None, "MODEL.VFE.NUM_FILTERS is missing"),
    ("MODEL.VFE.NUM_FILTERS", [192, 128], r"backbone_3d.channels \(192\) must equal the encoder's last channels"),
    (f"{BACKBONE}.NAME", "VoxelResBackBone8x", f"{BACKBONE}.NAME is VoxelResBackBone8x and must be DSVT"),
    (f"{BACKBONE}.activation", "relu", f"{BACKBONE}.activation is relu and must be gelu"),
    (f"{BACKBONE}.block_name", ["OtherBlock"], "only DSVTBlock is known"),
    (f"{BACKBONE}.d_model", "192", f"{BACKBONE}.d_model must be a list of numbers"),
    (f"{BACKBONE}.nhead", [8, 8], f"{BACKBONE}.nhead is .* must have 1 entries"),
    (f"{BACKBONE}.conv_out_channel", 128, f"{BACKBONE}.conv_out_channel is 128 and must be 192"),
    (f"{LAYOUT}.normalize_pos", True, f"{LAYOUT}.normalize_pos is True and must be False"),
    (f"{LAYOUT}.d_model", [128], f"{LAYOUT}.d_model is .128. and must be .192. .as in BACKBONE_3D.d_model"),
    (f"{LAYOUT}.sparse_shape", [468, 400, 1], f"{LAYOUT}.sparse_shape is .* must be .468, 468, 1. .the range in"),
    (f"{LAYOUT}.window_shape", [[12, 12]], "window_shape and hybrid_factor three"),
    (f"{LAYOUT}.hybrid_factor", [2, 2], f"{LAYOUT}.hybrid_factor .* must be a list of 3"),
    ("MODEL.MAP_TO_BEV.NAME", "HeightCompression", "MODEL.MAP_TO_BEV.NAME is HeightCompression"),
    ("MODEL.MAP_TO_BEV.INPUT_SHAPE", [468, 468, 2], "MODEL.MAP_TO_BEV.INPUT_SHAPE is"),
    ("MODEL.BACKBONE_2D.NAME", "BaseBEVBackbone", "MODEL.BACKBONE_2D.NAME is BaseBEVBackbone and must be BaseBEVRes"),
    ("MODEL.BACKBONE_2D.UPSAMPLE_STRIDES", [1, 2], "MODEL.BACKBONE_2D.UPSAMPLE_STRIDES is .* must have 3"),
    ("MODEL.BACKBONE_2D.LAYER_NUMS", [], "MODEL.BACKBONE_2D.LAYER_NUMS must be a list of numbers, got"),
    ("DATA_CONFIG.DATASET", ["WaymoDataset"], "DATA_CONFIG.DATASET must be a word"),
    (f"{HEAD}.NAME", "AnchorHeadSingle", f"{HEAD}.NAME is AnchorHeadSingle and must be CenterHead"),
    (f"{HEAD}.CLASS_AGNOSTIC", True, f"{HEAD}.CLASS_AGNOSTIC is True"),
    (f"{HEAD}.NUM_HM_CONV", 3, f"{HEAD}.NUM_HM_CONV is 3 and must be 2"),
    (f"{HEAD}.BN_EPS", "1e-3", f"{HEAD}.BN_EPS must be a number, got '1e-3'"),
    (f"{HEAD}.UPSAMPLE", 2, f"{HEAD}.UPSAMPLE is 2 and must be 1"),
    (f"{HEAD}.SEPARATE_HEAD_CFG.HEAD_DICT.iou.num_conv", 3, r"HEAD_DICT.iou.num_conv is 3 and must be 2"),
    (f"{HEAD}.SEPARATE_HEAD_CFG.HEAD_DICT.dim.out_channels", 4, r"HEAD_DICT.dim.out_channels is 4 and must be 3"),
    (f"{HEAD}.SEPARATE_HEAD_CFG", branches({"center": 2, "height": 1}), "HEAD_DICT.height is no branch that is known"),
    (f"{HEAD}.CLASS_NAMES_EACH_HEAD", [["Vehicle"]], "head.groups must name each class once .*CLASS_NAMES_EACH_HEAD"),
    (f"{HEAD}.TARGET_ASSIGNER_CONFIG.FEATURE_MAP_STRIDE", 2, "FEATURE_MAP_STRIDE is 2 and must be 1"),
    (f"{POST}.NMS_CONFIG.NMS_TYPE", "circle_nms", f"{POST}.NMS_CONFIG.NMS_TYPE is circle_nms and must be"),
    (f"{POST}.NMS_CONFIG.NMS_THRESH", [0.7], f"{POST}.NMS_CONFIG.NMS_THRESH is .* must have 3 entries"),
    (f"{POST}.NMS_CONFIG.NMS_PRE_MAXSIZE", [100] * 3, f"{POST}.NMS_CONFIG.NMS_PRE_MAXSIZE is 100, which cuts the 500"),
    (f"{POST}.NMS_CONFIG.SCORE_THRESH", 0.3, f"{POST}.NMS_CONFIG.SCORE_THRESH is a second threshold"),
    (f"{POST}.HEATMAP_NMS", True, f"{POST}.HEATMAP_NMS is not known here"),
    (f"{POST}.SCORE_THRESH", 2.0, r"score_threshold must be .* is their MODEL.DENSE_HEAD.POST_PROCESSING.SCORE_THRESH"),
    ("DATA_CONFIG.POINT_CLOUD_RANGE", [-75, -75, -2, 75, 75, 4], "is no multiple of voxel_size"),
    ("DATA_CONFIG.DATA_PROCESSOR", [{"NAME": "sample_points"}], "has the step sample_points, which is not done here"),
    ("DATA_CONFIG.DATA_PROCESSOR", [], "has no step with a VOXEL_SIZE"),
    ("DATA_CONFIG.POINTS_TANH_DIM", [7], "POINTS_TANH_DIM is .7., but there are 5 columns"),
    ("CLASS_NAMES", "Vehicle", "CLASS_NAMES must be a list of words"),
    ("MODEL.VFE", None, "MODEL.VFE is missing"),
    ("MODEL.VFE", 3, "MODEL.VFE must be a mapping"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "message"), WAYMO_REFUSED, ids=[f"{k}={v}" for k, v, _ in WAYMO_REFUSED])
def test_what_cannot_be_done_is_refused_by_name(tmp_path, key, value, message):
    with pytest.raises(ConfigError, match=message) as error:
        read_pcdet(write(tmp_path / "model.yaml", changed(waymo(), key, value)))
    assert "model.yaml: " in str(error.value)


@pytest.mark.parametrize(
    ("content", "key", "value", "message"),
    [
        (waymo(voxels=True), f"{BACKBONE}.reduction_type", "linear", "reduction_type is linear and must be attention"),
        (waymo(voxels=True), f"{BACKBONE}.reduction_type", "maxpool", "reduction_type is maxpool and must be"),
        (waymo(voxels=True), f"{BACKBONE}.d_model", [192, 192, 192, 256], "all stages have the same"),
        (
            waymo(voxels=True),
            f"{LAYOUT}.downsample_stride",
            [[2, 2, 4], [1, 1, 4], [1, 1, 2]],
            r"downsample_stride has \[2, 2, 4\]; here stages are pooled along z alone",
        ),
        (waymo(voxels=True), "MODEL.VFE.NAME", "DynPillarVFE", "voxels are stacked 32 high"),
        (nuscenes(), f"{POST}.NMS_CONFIG", None, "TransFusionHead of OpenPCDet itself is another network"),
        (nuscenes(), f"{POST}.NMS_CONFIG.NMS_TYPE", "nms_normal_gpu", "NMS_TYPE is nms_normal_gpu"),
        (nuscenes(), f"{POST}.NMS_CONFIG.SCORE_THRES", 0.1, "SCORE_THRES is 0.1 and must be 0"),
        (nuscenes(), f"{HEAD}.TARGET_ASSIGNER_CONFIG.DATASET", "Waymo", "expects 3 classes in its order; there are 10"),
        (nuscenes(), f"{HEAD}.TARGET_ASSIGNER_CONFIG.DATASET", "Kitti", "DATASET is Kitti and must be nuScenes or"),
        (nuscenes(), f"{HEAD}.ACTIVATION", "gelu", "ACTIVATION is gelu and must be relu"),
        (nuscenes(), f"{HEAD}.LOSS_CONFIG.LOSS_CLS.use_sigmoid", False, "use_sigmoid is False"),
        (nuscenes(), "CLASS_NAMES", ["car", "pedestrian"], "expects 10 classes in its order; there are 2"),
    ],
)
def test_what_cannot_be_done_in_other_models(tmp_path, content, key, value, message):
    with pytest.raises(ConfigError, match=message):
        read_pcdet(write(tmp_path / "model.yaml", changed(content, key, value)))


def test_an_error_names_the_base_file(tmp_path):
    write(tmp_path / "waymo_dataset.yaml", changed(WAYMO_BASE, "POINT_FEATURE_ENCODING.encoding_type", "other"))
    with pytest.raises(ConfigError, match=r"encoding_type \(from waymo_dataset.yaml\) is other and must be"):
        read_pcdet(write(tmp_path / "model.yaml", waymo()))


def test_other_yaml_files_are_no_models(tmp_path):
    with pytest.raises(ConfigError, match="or CLASS_NAMES and MODEL as in OpenPCDet"):
        open_model(write(tmp_path / "base.yaml", WAYMO_BASE))


@pytest.mark.parametrize("content", [custom(), nuscenes(), waymo(voxels=True, openpcdet=True)])
def test_what_an_export_keeps_is_the_same_model(tmp_path, content):
    found = read_pcdet(write(tmp_path / "first" / "theirs.yaml", content))
    write_origin(tmp_path / "theirs.yaml", found.config)
    again = read_pcdet(tmp_path / "theirs.yaml")
    assert (again.model, again.defaults) == (found.model, found.defaults)
    assert "DATA_PATH" not in yaml.safe_load((tmp_path / "theirs.yaml").read_text())["DATA_CONFIG"]
