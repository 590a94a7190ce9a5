"""What package.xml, setup.py, the lock file and the changelog say about the same things."""

import importlib
import os
import re
import runpy
import xml.etree.ElementTree as ET
from pathlib import Path
from unittest import mock

import pytest

import dsvt_ros
from dsvt_ros.ros.local_dds import free_domain_id

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = ROOT / "resource" / "environment"
TYPE_HASH = "RIHS01_793f5eab9595ac1c0da07873cc859db42eae51f0ee76056db8562515d830e018"


@pytest.fixture(scope="module")
def arguments():
    """The keyword arguments that setup.py hands to setuptools."""
    folder = Path.cwd()
    os.chdir(ROOT)
    try:
        with mock.patch("setuptools.setup") as setup:
            runpy.run_path("setup.py")
    finally:
        os.chdir(folder)
    return setup.call_args.kwargs


@pytest.fixture(scope="module")
def manifest():
    return ET.parse(ROOT / "package.xml").getroot()


def test_name_and_version_agree(arguments, manifest):
    assert arguments["name"] == manifest.findtext("name") == "dsvt_ros"
    newest = re.search(r"^(\d+\.\d+\.\d+) \(\d{4}-\d{2}-\d{2}\)\n-+$", (ROOT / "CHANGELOG.rst").read_text(), re.M)
    assert newest is not None
    assert arguments["version"] == manifest.findtext("version") == newest[1] == dsvt_ros.__version__


def test_manifest_agrees_with_setup(arguments, manifest):
    assert manifest.get("format") == "3"
    assert manifest.findtext("export/build_type") == "ament_python"
    assert manifest.findtext("license") == arguments["license"] == "Apache-2.0"
    assert manifest.findtext("description") == arguments["description"]
    assert "Apache License" in (ROOT / manifest.find("license").get("file")).read_text()


def test_nobodys_torch_is_replaced(arguments, manifest):
    depends = {element.text for element in manifest if element.tag.endswith("depend")}
    everything = " ".join([*arguments["install_requires"], *depends])
    assert not re.search(r"torch|tensorrt|onnx|cuda|triton", everything)


def test_every_subpackage_is_installed(arguments):
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "dsvt_ros").rglob("*.py")}
    assert {".".join(folder.parts) for folder in folders} == set(arguments["packages"])


def test_data_files_exist(arguments):
    installed = {target: [Path(name).name for name in sources] for target, sources in arguments["data_files"]}
    assert all((ROOT / name).is_file() for _, sources in arguments["data_files"] for name in sources)
    assert installed["share/ament_index/resource_index/packages"] == ["dsvt_ros"]
    assert installed["share/dsvt_ros"] == ["package.xml"]
    assert installed["lib/dsvt_ros"] == ["dsvt_detector"]
    assert {"detector.launch.py", "replay.launch.py"} <= set(installed["share/dsvt_ros/launch"])
    assert {"detector.yaml", "detector.rviz"} <= set(installed["share/dsvt_ros/config"])


def test_package_data_exists(arguments):
    for package, patterns in arguments["package_data"].items():
        folder = ROOT.joinpath(*package.split("."))
        missing = [pattern for pattern in patterns if not any(folder.glob(pattern))]
        assert not missing, f"{package} has no {missing}"


def test_executable_is_executable():
    script = ROOT / "resource" / "scripts" / "dsvt_detector"
    assert os.access(script, os.X_OK)
    assert script.read_text().startswith("#!/usr/bin/env python3\n")


@pytest.mark.parametrize("name", ["dsvt", "dsvt-detector"])
def test_command_exists(arguments, name):
    commands = dict(entry.split(" = ") for entry in arguments["entry_points"]["console_scripts"])
    module, function = commands[name].split(":")
    if module.startswith("dsvt_ros.ros."):
        pytest.importorskip("rclpy")
    assert callable(getattr(importlib.import_module(module), function))


def test_lock_file_pins_everything():
    lines = (ENVIRONMENT / "requirements.lock").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    exact = re.compile(r'[a-z0-9.-]+==[0-9][0-9a-z.]*(; python_version [<>=]+ "3\.\d+")?')
    assert [line for line in pins if not exact.fullmatch(line)] == []
    names = [line.split("==")[0] for line in pins if ";" not in line]
    assert len(names) == len(set(names))


def test_lock_file_has_everything_that_is_required(arguments):
    bootstrap = runpy.run_path(str(ENVIRONMENT / "bootstrap.py"))
    canonical, pins = bootstrap["canonical"], bootstrap["requirements"]
    locked = {canonical(pin) for section in ("core", "torch", "dev") for pin in pins(section)}
    extras = arguments["extras_require"]
    required = [*arguments["install_requires"]]
    for extra in ("torch", "onnx", "argoverse", "bags", "plot", "test", "dev"):
        required += extras[extra]
    assert {canonical(re.split(r"[<>=]", name)[0]) for name in required} <= locked


@pytest.mark.ros
def test_vision_msgs_have_the_hash_of_ros():
    rclpy = pytest.importorskip("rclpy")
    msg = pytest.importorskip("vision_msgs.msg")
    context = rclpy.Context()
    rclpy.init(context=context, domain_id=free_domain_id())
    try:
        node = rclpy.create_node("type_hash", context=context)
        publisher = node.create_publisher(msg.Detection3DArray, "detections", 1)
        (endpoint,) = node.get_publishers_info_by_topic("detections")
        announced = getattr(endpoint, "topic_type_hash", None)  # Iron and later
        node.destroy_publisher(publisher)
        node.destroy_node()
    finally:
        rclpy.shutdown(context=context)
    if announced is None:
        pytest.skip("this ROS has no type hashes")
    assert str(announced) == TYPE_HASH
