"""What is said of where a figure comes from."""

from types import SimpleNamespace

import pytest
import torch

import dsvt_ros
from dsvt_ros.tools.machine import ran_with


def test_what_a_detector_ran_with():
    """Also the version of what its backend needs, and of no other one."""
    onnxruntime = pytest.importorskip("onnxruntime")
    model = SimpleNamespace(name="demo")
    detector = SimpleNamespace(model=model, backend="onnxruntime", precision="fp16", device=torch.device("cpu"))
    ran = ran_with(detector)
    assert ran["model"] == "demo"
    assert (ran["backend"], ran["precision"], ran["hardware"]["device"]) == ("onnxruntime", "fp16", "cpu")
    assert set(ran["versions"]) == {"dsvt_ros", "python", "torch", "numpy", "onnxruntime"}
    assert ran["versions"]["dsvt_ros"] == dsvt_ros.__version__
    assert ran["versions"]["onnxruntime"] == onnxruntime.__version__
