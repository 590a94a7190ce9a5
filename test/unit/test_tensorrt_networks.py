"""TensorRT engines give the boxes of torch: in every release, from engines of every size, and again from the cache."""

import hashlib
import json
import logging
import sys

import numpy as np
import onnx
import pytest
import torch
from fakes.machine import FAKES, assert_alike, assert_same, engine_of, files_in
from tiny import tiny_points

from dsvt_ros import Detector
from dsvt_ros.backends.tensorrt import api
from dsvt_ros.errors import EngineError
from dsvt_ros.export.folder import ExportOptions
from dsvt_ros.model.checkpoint import weights_sha256

pytest_plugins = ("fakes.fixtures",)

RELEASES = [
    ("8.5.3", "fp16"),
    ("8.5.3", "fp32"),
    ("8.6.1", "fp16"),
    ("8.6.1", "fp32"),
    ("10.0.1", "fp32"),
    ("10.16.1", "fp16"),
    ("11.4.0", "fp16"),
    ("11.4.0", "fp32"),
]


def sidecars(cache_dir):
    return {
        network: json.loads(engine_of(cache_dir, network).with_suffix(".engine.json").read_text())
        for network in ("sparse", "dense")
    }


def precisions(sidecar):
    """Number of layers by precision."""
    total = {}
    for counts in sidecar["layers"].values():
        for precision, count in counts.items():
            total[precision] = total.get(precision, 0) + count
    return total


@pytest.mark.parametrize(("release", "precision"), RELEASES)
def test_boxes_of_torch_and_again_from_the_cache(
    machine, open_tiny, cache_dir, tiny_model, torch_boxes, release, precision
):
    machine.release(release)
    if precision == "fp16":
        machine.use_processes()
    detector = open_tiny(precision=precision)
    assert (detector.backend, detector.precision) == ("tensorrt", precision)
    assert detector.backend_reason.count("built now") == 2
    assert machine.builds() == ["sparse", "dense"]
    found = detector.detect(tiny_points(400))
    assert detector.num_dropped_voxels == 0
    {"fp32": assert_same, "fp16": assert_alike}[precision](found, torch_boxes(400))

    again = open_tiny(precision=precision)
    assert len(machine.builds()) == 2, "nothing is built again"
    for network in ("sparse", "dense"):
        assert str(engine_of(cache_dir, network)) in again.backend_reason
    assert "built now" not in again.backend_reason
    assert again.detect(tiny_points(400)).boxes.tobytes() == found.boxes.tobytes()

    weights_hash = weights_sha256(tiny_model / "weights.safetensors")
    for network, sidecar in sidecars(cache_dir).items():
        spec = sidecar["spec"]
        expected = {
            "model": "tiny", "network": network, "weights_sha256": weights_hash, "precision": precision,
            "tensorrt": release, "gpu": "Fake GPU", "compute_capability": "9.0", "optimization_level": 3,
        }  # fmt: skip
        assert expected.items() <= spec.items()
        plan = engine_of(cache_dir, network).read_bytes()
        assert sidecar["engine_sha256"] == hashlib.sha256(plan).hexdigest()
        assert sidecar["size_bytes"] == len(plan)
        assert sidecar["build_s"] >= 0
        assert ("fp16" in precisions(sidecar)) == (precision == "fp16")
    assert sidecars(cache_dir)["sparse"]["spec"]["profile"]["voxel_features"] == [[512, 16]] * 3
    if precision == "fp16":
        # TensorRT 8 would compute everything in half precision; later releases know the types, those of casts too.
        all_single, named = single_precision(cache_dir)
        assert 0 < len(named) < len(all_single)
        assert precisions(sidecars(cache_dir)["sparse"])["fp32"] == len(named if release[0] == "8" else all_single)
    for event in machine.events("build"):
        assert event["strongly_typed"] == (release[0] == "1")
        assert ("FP16" in event["flags"]) == (release[0] == "8" and precision == "fp16")
        assert "TF32" not in event["flags"]
    assert all(path.startswith("onnx/") for path in files_in(cache_dir)), "nothing is left behind"


def single_precision(cache_dir):
    """Nodes of the exported sparse network that give float32: all of them, and those that the manifest names."""
    (folder,) = (cache_dir / "onnx").iterdir()
    graph = onnx.shape_inference.infer_shapes(onnx.load(folder / "sparse.onnx")).graph
    single = {v.name for v in graph.value_info if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}
    named = json.loads((folder / "manifest.json").read_text())["networks"]["sparse"]["single_precision"]
    return [node.name for node in graph.node if single & set(node.output)], named


# ---------------------------------------------------------------------------------------------------- sizes of clouds


@pytest.fixture(scope="module")
def near_points():
    """Clouds cut to the nearest voxels, as whoever has no room for all of them does it."""

    def cut(points, limit):
        cell = np.floor((points[:, :2] + 5.12) / 0.32)
        distance = np.linalg.norm((cell + 0.5) * 0.32 - 5.12, axis=1)
        cells, index = np.unique(cell[:, ::-1], axis=0, return_inverse=True)
        order = np.argsort([distance[index == i][0] for i in range(len(cells))], kind="stable")
        return points[np.isin(index, order[:limit])]

    return cut


def sizes_of_runs(machine):
    return [e["shapes"]["voxel_features"][0] for e in machine.events("run") if e["network"] == "sparse"]


def test_the_smallest_engine_with_room(machine, open_tiny, exported, torch_boxes):
    detector = open_tiny(**{"profile.voxels": [96, 256, 512]})
    assert machine.builds() == ["sparse", "sparse", "sparse", "dense"]
    for count in (50, 400, 150, 50):  # more points than voxels
        assert_same(detector.detect(tiny_points(count)), torch_boxes(count))
        assert detector.num_dropped_voxels == 0
    assert sizes_of_runs(machine) == [96, 512, 256, 96]


def test_every_engine_gives_the_same_boxes(machine, open_tiny, exported, torch_boxes):
    for size in (96, 256):
        detector = open_tiny(**{"profile.voxels": [size]})
        assert_same(detector.detect(tiny_points(50)), torch_boxes(50))
    assert sizes_of_runs(machine) == [96, 256]


def test_as_many_voxels_as_there_is_room_for(machine, open_tiny, built, tiny_model, torch_boxes):
    torch_detector = Detector.load(tiny_model, backend="torch", device="cpu")
    torch_detector.detect(tiny_points(150))
    voxels = torch_detector.num_voxels
    detector = open_tiny(**{"profile.voxels": [voxels - 1, voxels, 512]})
    assert_same(detector.detect(tiny_points(150)), torch_boxes(150))
    assert sizes_of_runs(machine) == [voxels]


def test_beyond_the_largest_engine_the_farthest_voxels_go(
    machine, open_tiny, exported, tiny_model, near_points, caplog
):
    detector = open_tiny(**{"profile.voxels": [96, 256]})
    points = tiny_points(1500)
    found = detector.detect(points)
    assert detector.num_voxels > 256
    assert detector.num_dropped_voxels == detector.num_voxels - 256
    assert [r for r in caplog.records if "room for 256: the farthest are dropped" in r.getMessage()]
    expected = Detector.load(tiny_model, backend="torch", device="cpu").detect(near_points(points, 256))
    assert abs(len(found) - len(expected)) <= 3  # cells at the limit are equally far
    assert sizes_of_runs(machine) == [256]
    detector.detect(points[:50])
    assert detector.num_dropped_voxels == 0


def test_one_engine_for_a_range(machine, open_tiny, exported, torch_boxes):
    """Shapes follow the cloud; below the minimum it is padded, above the maximum it is cut."""
    detector = open_tiny(**{"profile.voxels": [64, 128, 400], "profile.dynamic": True})
    assert machine.builds() == ["sparse", "dense"]
    sizes = []
    for count in (30, 400, 100, 30, 250):
        assert_same(detector.detect(tiny_points(count)), torch_boxes(count))
        assert detector.num_dropped_voxels == 0
        sizes.append(max(64, detector.num_voxels))
    assert sizes_of_runs(machine) == sizes
    assert sizes[0] == 64 < sizes[2] < sizes[4] < sizes[1] < 400
    detector.detect(tiny_points(1500))
    assert sizes_of_runs(machine)[-1] == 400
    assert detector.num_dropped_voxels == detector.num_voxels - 400 > 0


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_next_to_nothing(open_tiny, built, tiny_model, count, dynamic):
    sizes = [64, 128, 400] if dynamic else [512]
    detector = open_tiny(**{"profile.voxels": sizes, "profile.dynamic": dynamic})
    points = np.array([[1, 1, 0.5, 0.5], [-3, 2, 0.5, 0.5]], np.float32)[:count]
    found = detector.detect(points)
    expected = Detector.load(tiny_model, backend="torch", device="cpu").detect(points)
    # Far from the points all cells are alike, so the order of boxes is not defined.
    np.testing.assert_allclose(np.sort(found.scores), np.sort(expected.scores), rtol=0, atol=1e-4)
    assert (count == 0) == (len(found) == 0)


def test_a_small_cloud_after_a_large_one(open_tiny, built, torch_boxes):
    """Nothing of the former cloud is left in the engine's memory."""
    detector = open_tiny()
    for count in (400, 30, 400, 1, 30):
        found = detector.detect(tiny_points(count))
        if count > 1:
            assert_same(found, torch_boxes(count))


def test_networks_refuse_more_than_they_hold(machine, tiny_model, open_tiny, built):
    detector = open_tiny()
    with pytest.raises(EngineError, match=r"513 voxels, but the engines have room for 512: .* engine\.profile\.voxels"):
        detector.networks.sparse(torch.zeros(513, 16), None)


# -------------------------------------------------------------------------------------------- engines that misbehave


@pytest.mark.parametrize("name", ["features", "heatmap"])
def test_checked_outputs_are_complete(machine, open_tiny, built, torch_boxes, name):
    assert_same(open_tiny(check_outputs=True).detect(tiny_points(150)), torch_boxes(150))
    machine.monkeypatch.setenv("FAKE_TENSORRT_UNWRITTEN", name)
    detector = open_tiny(check_outputs=True)
    with pytest.raises(EngineError, match=rf"\d+ of \d+ values of {name} are NaN or not written"):
        detector.detect(tiny_points(150))
    open_tiny().detect(tiny_points(150))  # the check costs time, so it has to be asked for


def test_a_run_that_fails(machine, open_tiny, built):
    detector = open_tiny()
    machine.breaks("run")
    with pytest.raises(EngineError, match=r"tiny-sparse-\w+\.engine failed: .*illegal memory access"):
        detector.detect(tiny_points(150))


def test_no_gpu_memory_for_an_engine(machine, open_tiny, built):
    machine.breaks("context")
    with pytest.raises(EngineError, match=r"does not fit into the GPU's memory: .*OutOfMemory"):
        open_tiny()
    assert not machine.builds(), "another engine would need as much"


def test_a_gpu_that_tensorrt_cannot_use(machine, open_tiny, built):
    machine.breaks("gpu")
    with pytest.raises(EngineError, match=r"cannot use this GPU: CUDA initialization failure with error: 35"):
        open_tiny()
    assert not machine.builds()


# -------------------------------------------------------------------------------------------------- what has to be here


def test_other_devices_are_refused(tiny_model, monkeypatch):
    monkeypatch.syspath_prepend(str(FAKES))
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    try:
        with pytest.raises(EngineError, match="runs on NVIDIA GPUs, not on device cpu"):
            Detector.load(tiny_model, backend="tensorrt", device="cpu")
    finally:
        sys.modules.pop("tensorrt", None)


def test_missing_module(tiny_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(EngineError, match=r"needs TensorRT 8\.5 or later .*pip install tensorrt"):
        Detector.load(tiny_model, backend="tensorrt", device="cpu")


def test_a_library_that_does_not_load(open_tiny, machine, tmp_path):
    (tmp_path / "tensorrt.py").write_text("raise OSError('libnvinfer.so.10: cannot open shared object file')")
    machine.monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("tensorrt", None)
    with pytest.raises(EngineError, match=r"needs TensorRT 8\.5 or later \(libnvinfer\.so\.10: cannot open"):
        open_tiny()


def test_too_old(open_tiny, machine):
    machine.release("8.4.3")
    with pytest.raises(EngineError, match=r"needs TensorRT 8\.5 or later, this is 8\.4\.3"):
        open_tiny()
    assert api.release_of("10.16.1.11") == (10, 16)


# --------------------------------------------------------------------------------------- networks of the model's folder


def test_an_exported_folder_needs_no_export(open_tiny, export_folder, cache_dir, torch_boxes):
    detector = open_tiny(model=export_folder(ExportOptions()))
    assert not (cache_dir / "onnx").exists()
    assert_same(detector.detect(tiny_points(400)), torch_boxes(400))


def test_an_exported_folder_says_how_much_room_there_is(machine, open_tiny, export_folder, cache_dir, torch_boxes):
    detector = open_tiny(model=export_folder(ExportOptions(voxels=256)), **{"profile.voxels": []})
    assert not (cache_dir / "onnx").exists()
    assert_same(detector.detect(tiny_points(150)), torch_boxes(150))
    assert sizes_of_runs(machine) == [256]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"precision": "fp16"}, "they have precision fp32"),
        ({"profile.voxels": [128]}, "they have room for 256 voxels"),
        ({"profile.voxels": [64, 128, 256], "profile.dynamic": True}, "they have room for 256 voxels"),
    ],
    ids=["precision", "capacity", "range"],
)
def test_networks_of_a_folder_that_do_not_suit(open_tiny, export_folder, exported, caplog, options, reason):
    """Others are exported to the cache."""
    caplog.set_level(logging.INFO)
    detector = open_tiny(model=export_folder(ExportOptions(voxels=256)), **options)
    assert [r for r in caplog.records if f"are not used: {reason}" in r.getMessage()]
    assert len(detector.detect(tiny_points(150))) > 0


def test_layer_norms_of_a_folder_that_8_5_does_not_know(machine, open_tiny, export_folder, caplog):
    caplog.set_level(logging.INFO)
    machine.release("8.5.3")
    detector = open_tiny(model=export_folder(ExportOptions(precision="fp16")), precision="fp16")
    assert [r for r in caplog.records if "does not know their LayerNormalization" in r.getMessage()]
    assert len(detector.detect(tiny_points(150))) > 0
