"""``dsvt verify --against pcdet``, with our own modules behind pcdet's interface (fakes/pcdet)."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pcdet_yamls import changed, custom, nuscenes, write
from safetensors.torch import save_file
from tiny import randomize, write_tiny_model

from dsvt_ros.export.folder import description_of
from dsvt_ros.model.checkpoint import read_weights
from dsvt_ros.model.dsvt import DSVT
from dsvt_ros.model.folder import open_model
from dsvt_ros.model.pcdet.files import ORIGIN, write_origin
from dsvt_ros.tools import cli, pcdet_reference

FAKES = Path(__file__).parents[1] / "fakes"


def small_nuscenes():
    """TransFusionHead on a small map."""
    content = changed(nuscenes(), "DATA_CONFIG.POINT_CLOUD_RANGE", [-4.8, -4.8, -5.0, 4.8, 4.8, 3.0])
    content["MODEL"]["BACKBONE_3D"]["INPUT_LAYER"]["sparse_shape"] = [32, 32, 1]
    content["MODEL"]["MAP_TO_BEV"]["INPUT_SHAPE"] = [32, 32, 1]
    content["MODEL"]["DENSE_HEAD"]["NUM_PROPOSALS"] = 20
    return content


@pytest.fixture
def faults(monkeypatch):
    """The fake package is installed, and the CPU does for CUDA; modules in this set give something else."""
    monkeypatch.syspath_prepend(str(FAKES))
    monkeypatch.setattr(pcdet_reference, "DEVICE_TYPE", "cpu")
    from pcdet import models

    yield models.FAULTS
    models.FAULTS.clear()
    for name in ("pcdet", "pcdet.models", "easydict"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module", params=["center", "proposals"])
def theirs(request, tmp_path_factory):
    """A YAML, a checkpoint and a cloud."""
    folder = tmp_path_factory.mktemp(request.param)
    content = custom() if request.param == "center" else small_nuscenes()
    model = write(folder / "theirs.yaml", content)
    torch.manual_seed(3)
    network = randomize(DSVT(open_model(model).model))
    if request.param == "proposals":  # scores far enough apart that most proposals are settled
        network.dense_head.heatmap_head[1].weight.mul_(10)
    torch.save({"model_state": network.state_dict()}, folder / "weights.pth")
    low, high = np.reshape(network.config.point_cloud_range, (2, 3))
    rng = np.random.default_rng(5)
    rest = rng.uniform(0, 1, (1500, len(network.config.features) - 3))
    cloud = np.column_stack([rng.uniform(low, high, (1500, 3)), rest]).astype(np.float32)
    np.save(folder / "cloud.npy", cloud)
    return model, folder / "weights.pth", folder / "cloud.npy"


def verify(theirs, *more):
    model, weights, cloud = theirs
    arguments = ["--weights", str(weights)] if weights else []
    return cli.main(
        ["verify", str(model), *arguments, "--cloud", str(cloud), "--against", "pcdet", "--device", "cpu", *more]
    )


def test_the_same_network_is_within_the_limits(theirs, faults, tmp_path, capsys):
    output = tmp_path / "result.json"
    assert verify(theirs, "--output", str(output)) == 0
    said = capsys.readouterr().out
    assert "torch, fp32, against pcdet 0.6.0+fake on 1 cloud" in said
    assert "within the limits" in said
    content = json.loads(output.read_text())
    assert content["reference"]["version"] == "0.6.0+fake"
    (result,) = content["results"]
    assert {"voxel_features", "backbone_3d", "backbone_2d", "heatmap", "center"} < set(result["tensors"])
    assert all(tensor["max_error"] < 1e-4 for tensor in result["tensors"].values())
    assert result["boxes"]["expected"] > 0
    assert result["boxes"]["matched"] == 1


# What a faulty module makes the command say, and whether it touches what comes after it (in the fake, sets and boxes
# do not).
FAULTS = {
    "vfe": ("voxel_features: error", True),
    "coords": ("voxel_coords: 1 of", False),
    "sets": ("inds_stage0_shift0: ", False),
    "masks": ("mask_stage0_shift0: shape", False),
    "backbone_3d": ("backbone_3d: cosine -1.0", True),
    "head": ("center: error|height: error", True),
    "boxes": ("boxes: ", False),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_module_that_differs_is_named(theirs, faults, capsys, fault):
    message, spreads = FAULTS[fault]
    faults.add(fault)
    assert verify(theirs) == 1
    said = capsys.readouterr().out
    exceeded = [line.removeprefix("exceeded: ") for line in said.splitlines() if line.startswith("exceeded: ")]
    assert any(re.match(message, line) for line in exceeded), said
    if not spreads:
        assert {line[:4] for line in exceeded} == {message[:4]}, said


def test_an_exported_folder_remembers_its_origin(theirs, faults, tmp_path, capsys):
    model, weights, cloud = theirs
    folder = open_model(model)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.yaml").write_text(description_of(folder))
    save_file(read_weights(weights), tmp_path / "out" / "weights.safetensors")
    assert verify((tmp_path / "out", None, cloud)) == 1
    assert "comes from an OpenPCDet YAML, and theirs does not: name the YAML itself" in capsys.readouterr().err
    write_origin(tmp_path / "out" / ORIGIN, folder.pcdet.config)
    assert verify((tmp_path / "out", None, cloud)) == 0
    other = changed(folder.pcdet.config, "MODEL.VFE.NUM_FILTERS", [8, folder.model.encoder.channels[-1]])
    write_origin(tmp_path / "out" / ORIGIN, other)
    assert verify((tmp_path / "out", None, cloud)) == 1
    assert "describes another model than the model.yaml beside it" in capsys.readouterr().err


def test_without_the_package(theirs, monkeypatch, capsys):
    monkeypatch.setattr(pcdet_reference, "DEVICE_TYPE", "cpu")
    monkeypatch.setitem(sys.modules, "pcdet", None)
    assert verify(theirs) == 1
    said = capsys.readouterr().err
    assert "install pcdet from a checkout of Haiyang-W/DSVT or open-mmlab/OpenPCDet" in said
    assert said.count("\n") == 1


def test_needs_cuda(theirs, capsys):
    assert verify(theirs) == 1
    assert "--against pcdet needs --device cuda" in capsys.readouterr().err


def test_the_wrong_package_of_the_two(theirs, faults, capsys):
    faults.add("build")
    assert verify(theirs) == 1
    assert "cannot build theirs (KeyError" in capsys.readouterr().err


def test_the_original_code_fails(theirs, faults, capsys):
    faults.add("backbone_2d")
    assert verify(theirs) == 1
    assert "the network of pcdet 0.6.0+fake fails (RuntimeError: expected scalar type Float)" in capsys.readouterr().err


def test_a_model_of_ours_has_no_original(theirs, tmp_path, capsys):
    assert verify((write_tiny_model(tmp_path), None, theirs[2])) == 1
    assert "needs a model that comes from an OpenPCDet YAML" in capsys.readouterr().err


def test_an_empty_cloud(theirs, faults, tmp_path, capsys):
    model, weights, cloud = theirs
    np.save(tmp_path / "empty.npy", np.load(cloud)[:0])
    assert verify((model, weights, tmp_path / "empty.npy")) == 1
    assert "no clouds with points in the model's range" in capsys.readouterr().err


def test_an_unknown_option_of_the_detector(theirs, faults, capsys):
    assert verify(theirs, "--set", "postprocess.score=1") == 1
    assert "did you mean postprocess.score_threshold" in capsys.readouterr().err


def test_a_missing_folder_is_noticed_first(theirs, faults, monkeypatch, capsys):
    monkeypatch.setattr("dsvt_ros.tools.verify_pcdet.compare", lambda *_: pytest.fail("compared all the same"))
    assert verify(theirs, "--output", "nowhere/x.json") == 1
    said = capsys.readouterr().err
    assert "--output nowhere/x.json: there is no folder nowhere" in said
    assert said.count("\n") == 1


def test_weights_are_those_of_the_folder_otherwise(theirs, capsys):
    model, weights, cloud = theirs
    assert cli.main(["verify", str(model), "--weights", str(weights), "--cloud", str(cloud)]) == 1
    assert "--weights goes with --against pcdet" in capsys.readouterr().err
