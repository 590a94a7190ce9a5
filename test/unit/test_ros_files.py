"""The RViz configuration and the launch files, as far as they can be checked without RViz and launch."""

import ast
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
LAUNCH_FILES = sorted((ROOT / "launch").glob("*.launch.py"))


@pytest.fixture(scope="module")
def rviz():
    return yaml.safe_load((ROOT / "config" / "detector.rviz").read_text())


def classes(tree):
    """Every value under a key "Class" of a tree of dictionaries and lists."""
    if isinstance(tree, dict):
        own = [tree["Class"]] if "Class" in tree else []
        return own + [name for value in tree.values() for name in classes(value)]
    return [name for value in tree for name in classes(value)] if isinstance(tree, list) else []


def test_rviz_has_stock_classes_only(rviz):
    assert set(rviz) == {"Panels", "Visualization Manager", "Window Geometry"}
    names = classes(rviz["Visualization Manager"]) + classes(rviz["Panels"])
    assert all(re.fullmatch(r"|rviz_(default_plugins|common)/[A-Za-z0-9]+", name) for name in names)


def test_rviz_shows_clouds_boxes_and_frames(rviz):
    displays = {display["Class"].split("/")[1]: display for display in rviz["Visualization Manager"]["Displays"]}
    assert set(displays) == {"Grid", "PointCloud2", "MarkerArray", "TF"}
    # Drivers publish best effort, and a reliable subscription would not hear them.
    assert displays["PointCloud2"]["Topic"]["Reliability Policy"] == "Best Effort"
    launch = (ROOT / "launch" / "detector.launch.py").read_text()
    for name, constant in (("PointCloud2", "RVIZ_CLOUD"), ("MarkerArray", "RVIZ_MARKERS")):
        assert f'{constant} = "{displays[name]["Topic"]["Value"]}"' in launch


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=lambda path: path.name)
def test_launch_file_has_a_description(path):
    functions = [node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
    assert "generate_launch_description" in functions


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=lambda path: path.name)
def test_launch_file_can_be_loaded_where_launch_exists(path):
    pytest.importorskip("launch_ros")
    source = pytest.importorskip("launch.launch_description_sources")
    index = pytest.importorskip("ament_index_python.packages")
    try:
        index.get_package_share_directory("dsvt_ros")
    except LookupError:
        pytest.skip("dsvt_ros is not installed into an ament index")
    description = source.get_launch_description_from_python_launch_file(str(path))
    arguments = description.get_launch_arguments()
    assert arguments
    assert all(argument.description for argument in arguments)
