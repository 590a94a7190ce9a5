"""The node's settings and their parameter file."""

import re
from pathlib import Path

import pytest
import yaml

from dsvt_ros.config import DetectorConfig, flatten
from dsvt_ros.errors import ConfigError
from dsvt_ros.ros.node_config import NodeConfig, Settings, node_config_from_overrides, parameter_file

PARAMETER_FILE = Path(__file__).resolve().parents[2] / "config" / "detector.yaml"


def test_parameter_file_is_up_to_date():
    assert PARAMETER_FILE.read_text() == parameter_file(), (
        "run: python -m dsvt_ros.ros.node_config > config/detector.yaml"
    )


def test_parameter_file_has_every_key_with_its_default():
    active = yaml.safe_load(PARAMETER_FILE.read_text())["/**"]["ros__parameters"]
    assert active == dict(flatten(NodeConfig()))
    commented = re.findall(r"^    #([a-z_]+\..*)$", PARAMETER_FILE.read_text(), re.MULTILINE)
    expected = {key: list(v) if isinstance(v, tuple) else v for key, v in flatten(DetectorConfig())}
    assert yaml.safe_load("\n".join(commented)) == expected


def test_names_do_not_collide():
    assert not set(dict(flatten(NodeConfig()))) & set(dict(flatten(DetectorConfig())))


def test_unknown_name_is_answered_with_the_closest():
    with pytest.raises(ConfigError, match=r"did you mean qos\.reliability\?"):
        node_config_from_overrides({"qos.relaibility": "reliable"})
    with pytest.raises(ConfigError, match=r"did you mean postprocess\.nms_iou\?"):
        Settings(NodeConfig(), DetectorConfig()).changed({"postprocess.nms_iuo": 0.5})


def test_values_go_where_they_belong():
    changed = Settings(NodeConfig(), DetectorConfig()).changed(
        {"markers.lifetime_s": 2, "postprocess.nms_iou": [0.1, 0.2, 0.3], "preprocess.sensor_pose": ()}
    )
    assert changed.node.markers.lifetime_s == 2.0
    assert changed.detector.postprocess.nms_iou == (0.1, 0.2, 0.3)
    assert changed.detector.preprocess.sensor_pose == ()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("qos.reliability", "perfect", "best_effort, reliable"),
        ("diagnostics.period_s", 0.0, "at least 0.1 and at most 60"),
        ("autostart", "yes", "must be a bool"),
        ("model", 7, "must be a str"),
    ],
)
def test_impossible_value_is_refused(name, value, message):
    with pytest.raises(ConfigError, match=message):
        node_config_from_overrides({name: value})
