import dataclasses

import pytest
import yaml

from dsvt_ros.config import (
    DetectorConfig,
    ModelConfig,
    PointFeature,
    flatten,
    from_mapping,
    parse_assignment,
    with_overrides,
)
from dsvt_ros.errors import ConfigError
from dsvt_ros.model.dsvt import DSVT
from dsvt_ros.model.folder import embedded_models, open_model


def test_overrides_reach_the_leaf():
    config = with_overrides(DetectorConfig(), {"postprocess.score_threshold": 1, "preprocess.sensor_pose": [0] * 6})
    assert config.postprocess.score_threshold == 1.0
    assert config.preprocess.sensor_pose == (0.0,) * 6
    assert DetectorConfig().postprocess.score_threshold != 1.0


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("postprocess.score_treshold", 0.1, "did you mean postprocess.score_threshold"),
        ("postprocess", 0.1, "unknown key postprocess"),
        ("postprocess.score_threshold", 1.5, "at least 0.0 and at most 1.0, got 1.5"),
        ("postprocess.score_threshold", float("nan"), "got nan"),
        ("postprocess.score_threshold", "high", "must be a float"),
        ("postprocess.max_candidates", 0, "at least 1"),
        ("postprocess.max_candidates", True, "must be a int"),
        ("postprocess.nms_geometry", "round", "one of exact, dsvt_release"),
        ("preprocess.sensor_pose", [1, 2], "takes 6 numbers"),
        ("preprocess.sensor_pose", "1", "must be a list"),
        ("preprocess.min_range", -1, "at least 0.0"),
        ("preprocess.sweeps", -1, "at least 0"),
        ("preprocess.mounting", [0, 0, 1.7], r"preprocess\.mounting takes 6 numbers"),
    ],
)
def test_impossible_values_say_what_is_allowed(key, value, message):
    with pytest.raises(ConfigError, match=message):
        with_overrides(DetectorConfig(), {key: value})


def test_assignments_of_the_command_line():
    assert parse_assignment("a.b=0.5") == ("a.b", 0.5)
    assert parse_assignment("a=1,2,3") == ("a", [1, 2, 3])
    assert parse_assignment("a=[1, 2]") == ("a", [1, 2])
    assert parse_assignment("a=true") == ("a", True)
    for text in ("a", "=1", "a=[1"):
        with pytest.raises(ConfigError):
            parse_assignment(text)


def test_flatten_lists_every_leaf_once():
    keys = [key for key, _ in flatten(DetectorConfig())]
    assert len(keys) == len(set(keys))
    assert {"preprocess.min_range", "postprocess.nms_geometry"} <= set(keys)


@pytest.mark.parametrize("name", embedded_models())
def test_embedded_models_are_valid(name):
    folder = open_model(name)
    assert folder.model.name == name
    assert folder.model.stage_grids[-1][2] == 1


def test_kitti_has_the_sizes_of_waymo():
    """468 x 468 pillars by rounding, four features, and everything behind the first layer as for Waymo."""
    model = open_model("kitti_pillar").model
    assert model.grid_size == (468, 468, 1)
    shapes = {key: tuple(value.shape) for key, value in DSVT(model).state_dict().items()}
    waymo = {key: tuple(value.shape) for key, value in DSVT(open_model("waymo_pillar").model).state_dict().items()}
    assert shapes.pop("vfe.pfn_layers.0.linear.weight") == (96, 10)
    assert waymo.pop("vfe.pfn_layers.0.linear.weight") == (96, 11)
    assert shapes == waymo


def test_grid_is_rounded_and_checked():
    model = open_model("waymo_pillar").model
    assert model.grid_size == (468, 468, 1), "int(149.76 / 0.32) would be 467"
    content = yaml.safe_load((open_model("waymo_pillar").path / "model.yaml").read_text())["model"]
    content["voxel_size"] = [0.33, 0.32, 6.0]
    with pytest.raises(ConfigError, match="no multiple"):
        from_mapping(ModelConfig, content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": [{"name": "x"}, {"name": "z"}, {"name": "y"}]}, "start with x, y, z"),
        ({"class_nams": []}, "did you mean model.class_names"),
        ({"encoder": {"channels": [64, 32]}}, "must equal"),
        ({"encoder": {"channels": []}}, "encoder.channels and the lists of backbone_2d must not be empty"),
        ({"voxel_size": [0.32, 0.32]}, "needs 3 values"),
        ({"sweeps": 10}, "a model of 10 sweeps needs a feature time; it has x, y, z, intensity"),
        ({"sweeps": 0}, "at least 1"),
        ({"voxel_size": [0.32, 0.32, 0.75]}, "the stages are 8 voxels high, and the last one has pool_z 1"),
        ({"head": {"type": "anchors"}}, "head.type must be one of center, transfusion; got 'anchors'"),
        ({"head": {"shared_channels": 8, "groups": [["car"], ["cyclist"]]}}, "head.groups must name each class once"),
        ({"head": {"shared_channels": 8, "branches": ["center", "hm"]}}, "head.branches must name each of center,"),
        (
            {
                "backbone_2d": {
                    "blocks": [1, 1],
                    "strides": [1, 2],
                    "channels": [8, 8],
                    "upsample_strides": [1, 1],
                    "upsample_channels": [8, 8],
                }
            },
            "must bring all stages to one resolution, a whole number of voxels; they come to 1, 2 voxels",
        ),
    ],
)
def test_wrong_descriptions_are_refused(change, message):
    content = yaml.safe_load((open_model("demo").path / "model.yaml").read_text())["model"]
    with pytest.raises(ConfigError, match=message):
        from_mapping(ModelConfig, content | change, path="model.")


def test_several_sweeps_need_a_feature_time():
    demo = open_model("demo").model
    config = with_overrides(DetectorConfig(), {"preprocess.sweeps": 3})
    with pytest.raises(ConfigError, match=r"preprocess\.sweeps is 3, but model demo has no feature time"):
        config.check_against(demo)
    config.check_against(dataclasses.replace(demo, features=(*demo.features, PointFeature("time"))))


def test_missing_keys_are_named():
    with pytest.raises(ConfigError, match=r"missing model\.name"):
        from_mapping(ModelConfig, {}, path="model.")
