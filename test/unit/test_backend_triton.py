"""The backend triton against torch: on a GPU where there is one, through Triton's interpreter on the CPU otherwise."""

import dataclasses
import importlib.util
import json
import re

import numpy as np
import pytest
import torch
import yaml
from fused_fixtures import ALL_KERNELS, DEVICE, interpreted, needs_triton
from tiny import TINY_CONFIGS, randomize, tiny_network, tiny_points, write_tiny_model

from dsvt_ros import Detector
from dsvt_ros.backends.frames import fused_stages
from dsvt_ros.backends.torch import TorchNetworks
from dsvt_ros.backends.triton import TritonNetworks
from dsvt_ros.bev import scatter_bev
from dsvt_ros.comparison import common_proposals
from dsvt_ros.errors import EngineError
from dsvt_ros.export.networks import named_maps
from dsvt_ros.fused import frame
from dsvt_ros.fused.sparse import FusedBackbone3d
from dsvt_ros.model.dsvt import DSVT
from dsvt_ros.set_partition import partition_sets
from dsvt_ros.tools.cli import main as dsvt
from dsvt_ros.voxelization import voxelize

_interpreter = interpreted(*ALL_KERNELS)

SMALL = (-2.56, -1.92, -2.0, 2.56, 1.92, 4.0)
"""A range of 16 by 12 columns, for interpreted kernels take their time."""


def write_small_model(folder):
    """The tiny model over a small range."""
    write_tiny_model(folder)
    description = yaml.safe_load((folder / "model.yaml").read_text())
    description["model"]["point_cloud_range"] = list(SMALL)
    (folder / "model.yaml").write_text(yaml.safe_dump(description))
    return folder


# ----------------------------------------------------------------------------------------------------- whole networks


@needs_triton
@pytest.mark.parametrize("name", ["tiny_voxel", "tiny_proposals"])  # both heads; several stages and one
def test_networks_give_what_torch_does(name):
    model = dataclasses.replace(TINY_CONFIGS[name](), point_cloud_range=SMALL)
    torch.manual_seed(0)
    network = randomize(DSVT(model)).to(DEVICE)
    rng = np.random.default_rng(0)
    low, high = np.array(model.point_cloud_range[:3]), np.array(model.point_cloud_range[3:])
    points = np.column_stack([rng.uniform(low, high, (30, 3)), rng.uniform(0, 1, 30)]).astype(np.float32)
    with torch.inference_mode():
        voxels = voxelize(torch.as_tensor(points, device=DEVICE), model)
        features, partition = network.vfe(voxels), partition_sets(voxels.coords, model)
        reference, networks = TorchNetworks(network), TritonNetworks(network)
        expected, found = (part.sparse(features, partition) for part in (reference, networks))
        torch.testing.assert_close(found.float(), expected, rtol=0, atol=2e-2)
        ours, theirs = (
            part.dense(scatter_bev(output, partition.coords, model.grid_size, 1))
            for part, output in ((networks, found), (reference, expected))
        )
    pairs = zip(*(named_maps(maps) for maps in common_proposals(ours, theirs)), strict=True)
    for (key, values), (_, right) in pairs:
        assert not values.is_floating_point() or values.dtype == torch.float32
        torch.testing.assert_close(values.float(), right.float(), rtol=0, atol=3e-2, msg=key)


def test_partitions_for_the_kernels():
    """Voxels set after set, and where each of them is, in the sets of the partition."""
    rng = np.random.default_rng(0)
    cells = sorted(rng.choice(16 * 12, 60, replace=False).tolist())
    coords = torch.tensor([(0, 0, cell % 12, cell // 12) for cell in cells], dtype=torch.int32)
    partition = partition_sets(coords, dataclasses.replace(TINY_CONFIGS["tiny"](), point_cloud_range=SMALL))
    ((stage,), (published,)) = fused_stages(partition), partition.stages
    for sets, expected in zip(stage.sets, published.sets, strict=True):
        start = sets.set_start.tolist()
        assert start[-1] == len(coords)
        assert int(sets.num_sets) == len(start) - 1 == expected.mask.shape[1]
        for order, position, indices in zip(sets.order, sets.position, expected.indices, strict=True):
            for number, own in enumerate(indices):
                assert order[start[number] : start[number + 1]].tolist() == own.unique_consecutive().tolist()
            assert position[order.long()].tolist() == list(range(len(coords)))


@needs_triton
def test_detector(tmp_path, monkeypatch):
    """What it finds is compared in test_fused_frame.py."""
    monkeypatch.setattr(frame, "MIN_POINTS", 32)
    overrides = {"postprocess.score_threshold": 0.05, "postprocess.max_candidates": 14}
    folder = write_small_model(tmp_path / "model")
    detector = Detector.load(folder, backend="triton", device=str(DEVICE), overrides=overrides)
    assert (detector.backend, detector.precision, detector.backend_reason) == ("triton", "fp16", "asked for")
    assert len(detector.detect(tiny_points(30))) > 0
    assert detector.num_voxels > 0


# ------------------------------------------------------------------------------------------------------------- refusals


@needs_triton
def test_a_cpu_cannot_run_it(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(EngineError, match="backend triton needs a CUDA device, not cpu; use torch or onnxruntime"):
        TritonNetworks(tiny_network())


def test_without_triton(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match="install triton; a Jetson without it uses torch or tensorrt"):
        TritonNetworks(tiny_network())


@needs_triton
@pytest.mark.parametrize("version", ["3.5.1", "2.3.1+git4f6b", "3.5"])
def test_an_older_triton(version, monkeypatch):
    import triton

    monkeypatch.setattr(triton, "__version__", version)
    with pytest.raises(EngineError, match=f"needs Triton 3.6 or later.* this is {re.escape(version)}: use torch"):
        TritonNetworks(tiny_network())


@needs_triton
def test_a_triton_that_cannot_compile(monkeypatch):
    def fail(*_args, **_kwargs):
        raise RuntimeError("no C compiler")

    monkeypatch.setattr("dsvt_ros.fused.sparse.FusedBackbone3d._run_stage", fail)
    with pytest.raises(EngineError, match="cannot compile or run its kernels here; use torch or tensorrt: no C comp"):
        TritonNetworks(tiny_network().to(DEVICE))


@needs_triton
def test_auto_goes_on_without_frames_that_fail(tmp_path, monkeypatch, caplog):
    """Kernels for the networks compile, and something else of the frame does not."""

    def fail(*_args):
        raise EngineError("a frame in Triton's kernels fails here")

    def choose(*arguments):
        failed = arguments[-1]
        return ("torch", f"chosen by auto: {failed['triton']}; torch") if failed else ("triton", "chosen by auto")

    monkeypatch.setattr("dsvt_ros.backends.choice._choose", choose)
    monkeypatch.setattr("dsvt_ros.detector.FusedFrames", fail)
    folder = write_small_model(tmp_path / "model")
    detector = Detector.load(folder, device=str(DEVICE))
    assert detector.backend != "triton"
    assert detector.backend_reason.startswith("chosen by auto: a frame in Triton's kernels fails here; ")
    assert "fails here" in caplog.text
    with pytest.raises(EngineError, match="fails here"):
        Detector.load(folder, backend="triton", device=str(DEVICE))


@needs_triton
def test_more_candidates_than_the_kernels_take(tmp_path):
    folder = write_small_model(tmp_path / "model")
    overrides = {"postprocess.max_candidates": 2000}
    with pytest.raises(EngineError, match=r"at most 1024 candidates .* not 2000; use torch or tensorrt"):
        Detector.load(folder, backend="triton", device=str(DEVICE), overrides=overrides)


@needs_triton
@pytest.mark.parametrize(
    "path",
    [
        "backbone_3d.stage_0.0.encoder_list.0.win_attn.linear1",
        "backbone_2d.blocks.1.0.conv2",
        "dense_head.heads_list.0.hm.1",
        "dense_head.heads_list.0.center.1",
    ],
)
def test_weights_beyond_float16(path):
    network = tiny_network().to(DEVICE)
    network.get_submodule(path).weight[0, 0] = 1e6
    with pytest.raises(EngineError, match="beyond the range of float16"):
        TritonNetworks(network)


# ---------------------------------------------------------------------------------------------------------- dsvt verify


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    command = ["export", "--model", str(write_small_model(folder / "model")), "--output", str(folder / "exported")]
    assert dsvt(command) == 0
    return folder / "exported"


@pytest.fixture
def small_frames(monkeypatch):
    """Interpreted frames take as long as they have room."""
    monkeypatch.setattr(frame, "MIN_POINTS", 64)


def verify(exported, folder):
    """The result of ``dsvt verify``, as a status and as JSON."""
    np.save(folder / "cloud.npy", tiny_points(40))
    options = ["--backends", "triton", "--device", str(DEVICE), "--output", str(folder / "report.json")]
    options += ["--set", "postprocess.max_candidates=40"]
    status = dsvt(["verify", str(exported), "--cloud", str(folder / "cloud.npy"), *options])
    (result,) = json.loads((folder / "report.json").read_text())["results"]
    return status, result


@needs_triton
def test_verify(exported, tmp_path, small_frames, monkeypatch, capsys):
    """It runs the kernels, and compares all that they give."""
    run, calls = FusedBackbone3d.__call__, []

    def counted(self, features, stages):
        calls.append(len(features))
        return run(self, features, stages)

    monkeypatch.setattr(FusedBackbone3d, "__call__", counted)
    status, result = verify(exported, tmp_path)
    assert status == 0, capsys.readouterr().out
    assert (result["backend"], result["precision"], result["limits"]["max_error"]) == ("triton", "fp16", 0.1)
    assert set(result["tensors"]) == {"features", "heatmap", "center", "center_z", "dim", "rot", "iou"}
    assert all(tensor["max_error"] > 0 for tensor in result["tensors"].values())
    assert result["boxes"]["expected"] > 5
    assert calls[0] == 1, "once at the start"
    assert len(set(calls[1:])) == 2, "for the tensors, and for the boxes, in frames with more room"


@needs_triton
def test_verify_finds_wrong_frames(exported, tmp_path, small_frames, monkeypatch):
    """Its tensors do not come from frames, and its boxes do."""
    begin = frame.FusedFrames.begin

    def moved(self, clouds, poses, **options):
        result = begin(self, clouds, poses, **options)()
        result.rows[..., 0] += 0.05
        return lambda: result

    monkeypatch.setattr(frame.FusedFrames, "begin", moved)
    status, result = verify(exported, tmp_path)
    assert status == 1
    assert [text.split(":")[0] for text in result["exceeded"]] == ["boxes"]


@needs_triton
def test_verify_finds_a_wrong_heatmap(exported, tmp_path, small_frames, monkeypatch):
    class Wrong(TritonNetworks):
        def __init__(self, model):
            super().__init__(model)
            right = self.dense_network

            def wrong(features, grid):
                maps = right(features, grid)
                maps.logits[0, 1, 2, 3] += 2
                return maps

            self.dense_network = wrong

    monkeypatch.setattr("dsvt_ros.tools.verify.TritonNetworks", Wrong)
    status, result = verify(exported, tmp_path)
    assert status == 1
    tensors = [text.split(":")[0] for text in result["exceeded"] if not text.startswith("boxes")]
    assert tensors == ["heatmap", "heatmap"], "error and cosine"
