"""What ``dsvt export`` writes: files that pass ONNX's own checks and compute what the modules compute."""

import hashlib
import json
import re
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tiny import tiny_config, tiny_network, tiny_points, write_tiny_model

from dsvt_ros.capacity import capacity_for
from dsvt_ros.errors import ConfigError, EngineError
from dsvt_ros.export.cache import read_networks
from dsvt_ros.export.folder import ExportOptions, description_of, export_folder, export_networks
from dsvt_ros.export.manifest import read_manifest
from dsvt_ros.export.networks import sparse_inputs
from dsvt_ros.export.onnx_file import OPERATORS, export_onnx
from dsvt_ros.model.fold import inference_modules
from dsvt_ros.model.folder import open_model
from dsvt_ros.set_partition import partition_sets
from dsvt_ros.tools import cli
from dsvt_ros.voxelization import voxelize

OPTIONS = {
    "fp32": ExportOptions(voxels=300),
    "fp16": ExportOptions(precision="fp16", layer_norm="decomposed"),
    "opset 20": ExportOptions(opset=20),
    "release": ExportOptions(interface="dsvt_release", opset=14, layer_norm="decomposed"),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("export") / "model")


@pytest.fixture(scope="module")
def written(source, tmp_path_factory):
    """What the command writes."""
    output = tmp_path_factory.mktemp("export") / "output"
    assert cli.main(["export", "--model", str(source), "--output", str(output), "--voxels", "300"]) == 0
    return output


@pytest.fixture(scope="module")
def exports(written):
    """Networks and files of every variant, exported when first asked for; the first is what the command wrote."""
    manifest = read_manifest(written)
    done = {"fp32": (manifest.networks, read_networks(written, manifest))}

    def export(name):
        if name not in done:
            done[name] = export_networks(tiny_network(), OPTIONS[name])
        return done[name]

    return export


@pytest.fixture(scope="module")
def scene():
    """Inputs and outputs of both networks in torch."""
    network, model = tiny_network(), tiny_config()
    with torch.no_grad():
        voxels = voxelize(torch.as_tensor(tiny_points()), model)
        features = network.vfe(voxels)
        partition = partition_sets(voxels.coords, model)
        modules = inference_modules(network)
        bev = torch.randn(1, 16, 32, 32, generator=torch.Generator().manual_seed(0))
        maps = modules.head(modules.backbone_2d(bev))
        positions = [network.backbone_3d.input_layer(0, block, partition.stages[0]) for block in range(2)]
        return {
            "features": features,
            "partition": partition,
            "output": modules.backbone_3d(features, partition).numpy(),
            "bev": bev.numpy(),
            "maps": maps,
            "positions": torch.stack([torch.stack(pair) for pair in positions]).numpy(),
        }


def run(content, feed):
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    types = {"tensor(float16)": np.float16}
    feed = {v.name: feed[v.name].astype(types.get(v.type, feed[v.name].dtype)) for v in session.get_inputs()}
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(None, feed), strict=True))


def operators(content):
    return {node.op_type for node in onnx.load_model_from_string(content).graph.node}


@pytest.mark.parametrize("variant", list(OPTIONS))
def test_files_are_valid_and_describe_themselves(exports, variant):
    networks, files = exports(variant)
    assert set(files) == {network.file for network in networks.values()}
    for network in networks.values():
        model = onnx.load_model_from_string(files[network.file])
        onnx.checker.check_model(model, full_check=True)
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPTIONS[variant].opset)]
        assert [value.name for value in model.graph.input] == [spec.name for spec in network.inputs]
        assert [value.name for value in inferred.graph.output] == [spec.name for spec in network.outputs]
        assert not model.doc_string
        assert not re.search(rb"/[a-z]+/[a-z_]+/|\.py\b", files[network.file]), "no paths of the machine"


@pytest.mark.parametrize("variant", ["fp32", "fp16", "opset 20"])
def test_only_operators_that_engines_run_well(exports, variant):
    _, files = exports(variant)
    found = operators(files["sparse.onnx"]) | operators(files["dense.onnx"])
    assert found <= OPERATORS
    assert not found & {"ScatterND", "ScatterElements", "NonZero", "Loop", "If", "Where", "Shape", "Pow", "Range"}
    assert ("LayerNormalization" in found) == (OPTIONS[variant].layer_norm == "fused")


def test_names_and_shapes(exports):
    networks, _ = exports("fp32")
    capacity = capacity_for(tiny_config(), 300)
    inputs = {spec.name: (spec.type, spec.shape) for spec in networks["sparse"].inputs}
    expected = {"voxel_features": ("float32", (300, 16))}
    for shift in (0, 1):
        expected |= {
            f"set_indices_stage_0_shift_{shift}": ("int32", (2, capacity.stages[0].sets[shift], 6)),
            f"set_mask_stage_0_shift_{shift}": ("bool", (2, capacity.stages[0].sets[shift], 6)),
            f"slot_of_voxel_stage_0_shift_{shift}": ("int32", (2, 300)),
            f"cell_of_voxel_stage_0_shift_{shift}": ("int32", (300,)),
        }
    assert inputs == expected
    assert [(spec.name, spec.shape) for spec in networks["dense"].outputs] == [
        ("heatmap", (1, 3, 16, 16)),
        ("center", (1, 2, 16, 16)),
        ("center_z", (1, 1, 16, 16)),
        ("dim", (1, 3, 16, 16)),
        ("rot", (1, 2, 16, 16)),
        ("iou", (1, 1, 16, 16)),
    ]


def test_fixed_counts_are_fixed_everywhere(exports):
    _, files = exports("fp32")
    model = onnx.shape_inference.infer_shapes(onnx.load_model_from_string(files["sparse.onnx"]), data_prop=True)
    for value in model.graph.value_info:
        assert all(size.HasField("dim_value") for size in value.type.tensor_type.shape.dim), value.name


def test_nodes_are_named_by_their_module(exports):
    _, files = exports("fp32")
    names = [node.name for node in onnx.load_model_from_string(files["sparse.onnx"]).graph.node]
    assert len(set(names)) == len(names)
    assert "backbone_3d.stage_0.1.encoder_list.0.win_attn.norm1/LayerNormalization" in names
    assert "backbone_3d.stage_0.0.encoder_list.1.win_attn.self_attn/Softmax" in names


def test_indices_reach_the_gathers_as_int32(exports):
    """Without a cast to int64 on the way, which an engine would have to carry."""
    _, files = exports("fp32")
    model = onnx.shape_inference.infer_shapes(onnx.load_model_from_string(files["sparse.onnx"]))
    casts = [node for node in model.graph.node if node.op_type == "Cast"]
    targets = {attribute.i for node in casts for attribute in node.attribute if attribute.name == "to"}
    assert onnx.TensorProto.INT64 not in targets


def test_half_precision_keeps_sensitive_parts_in_single(exports):
    _, files = exports("fp16")
    model = onnx.shape_inference.infer_shapes(onnx.load_model_from_string(files["sparse.onnx"]))
    types = {v.name: v.type.tensor_type.elem_type for v in (*model.graph.value_info, *model.graph.input)}
    types |= {entry.name: entry.data_type for entry in model.graph.initializer}
    by_operator = {}
    for node in model.graph.node:
        by_operator.setdefault(node.op_type, set()).add(types[node.input[0]])
    single, half = {onnx.TensorProto.FLOAT}, {onnx.TensorProto.FLOAT16}
    assert by_operator["Softmax"] == by_operator["ReduceMean"] == by_operator["Sqrt"] == single
    assert by_operator["Gemm"] == by_operator["MatMul"] == half
    for name in ("sparse.onnx", "dense.onnx"):
        for entry in onnx.load_model_from_string(files[name]).graph.initializer:
            values = onnx.numpy_helper.to_array(entry)
            assert np.isfinite(values).all(), "no infinite masks"
    dense = onnx.load_model_from_string(files["dense.onnx"])
    assert {entry.data_type for entry in dense.graph.initializer} <= {onnx.TensorProto.FLOAT16, onnx.TensorProto.INT64}


@pytest.mark.parametrize(("variant", "atol"), [("opset 20", 1e-5), ("fp16", 2e-2)])
def test_open_counts_compute_the_same(exports, scene, variant, atol):
    _, files = exports(variant)
    feed = {name: value.numpy() for name, value in sparse_inputs(scene["features"], scene["partition"]).items()}
    found = run(files["sparse.onnx"], feed)["features"]
    np.testing.assert_allclose(found.astype(np.float32), scene["output"], rtol=0, atol=atol)
    maps = run(files["dense.onnx"], {"bev": scene["bev"]})
    for name, values in maps.items():
        expected = getattr(scene["maps"], name).numpy()
        np.testing.assert_allclose(values.astype(np.float32), expected, rtol=0, atol=atol, err_msg=name)


def test_published_interface(exports, scene):
    """Names, types and shapes of DSVT tools/deploy.py, and our numbers."""
    networks, files = exports("release")
    model = onnx.load_model_from_string(files["dsvt.onnx"])
    assert model.opset_import[0].version == 14
    interface = {spec.name: (spec.type, spec.shape) for spec in networks["dsvt"].inputs}
    assert interface == {
        "src": ("float32", ("voxel_number", 16)),
        "set_voxel_inds_tensor_shift_0": ("int64", (2, "set_number_shift_0", 6)),
        "set_voxel_inds_tensor_shift_1": ("int64", (2, "set_number_shift_1", 6)),
        "set_voxel_masks_tensor_shift_0": ("bool", (2, "set_number_shift_0", 6)),
        "set_voxel_masks_tensor_shift_1": ("bool", (2, "set_number_shift_1", 6)),
        "pos_embed_tensor": ("float32", (2, 2, "voxel_number", 16)),
    }
    assert [value.name for value in model.graph.input] == list(interface)
    assert [(spec.name, spec.shape) for spec in networks["dsvt"].outputs] == [("output", ("voxel_number", 16))]
    first, second = scene["partition"].stages[0].sets
    feed = {
        "src": scene["features"].numpy(),
        "set_voxel_inds_tensor_shift_0": first.indices.numpy(),
        "set_voxel_inds_tensor_shift_1": second.indices.numpy(),
        "set_voxel_masks_tensor_shift_0": first.mask.numpy(),
        "set_voxel_masks_tensor_shift_1": second.mask.numpy(),
        "pos_embed_tensor": scene["positions"],
    }
    found = run(files["dsvt.onnx"], feed)["output"]
    np.testing.assert_allclose(found, scene["output"], rtol=0, atol=1e-5)
    assert "LayerNormalization" not in operators(files["dsvt.onnx"])


def test_same_weights_same_bytes(exports):
    _, files = exports("fp32")
    _, again = export_networks(tiny_network(), OPTIONS["fp32"])
    assert again == files


def test_weights_beyond_half_precision(monkeypatch):
    network = tiny_network()
    with torch.no_grad():
        network.backbone_3d.stage_0[0].encoder_list[0].win_attn.linear1.weight[0, 0] = 1e5
    with pytest.raises(EngineError, match=r"linear1\.weight holds values up to 1e\+05, beyond the range of float16"):
        export_networks(network, ExportOptions(precision="fp16"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"voxels": 0}, "room for at least one voxel"),
        ({"opset": 16}, "opset must be at least 17, got 16"),
        ({"interface": "dsvt_release"}, "has opset 14, got 17"),
        ({"interface": "dsvt_release", "opset": 14}, "has layer norm decomposed, got fused"),
        (
            {"interface": "dsvt_release", "opset": 14, "layer_norm": "decomposed", "voxels": 9},
            "has voxels open, got 9",
        ),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(ConfigError, match=message):
        ExportOptions(**options)


def test_operators_that_engines_run_badly_are_refused():
    class Scatter(torch.nn.Module):
        def forward(self, x, index):
            return torch.zeros_like(x).index_put((index,), x)

    from dsvt_ros.export.networks import TensorSpec

    inputs = [TensorSpec("x", "float32", (4, 2)), TensorSpec("index", "int64", (4,))]
    with pytest.raises(EngineError, match=r"holds .*ScatterND"):
        export_onnx(Scatter(), inputs, [TensorSpec("y", "float32", (4, 2))], 18, "scatter")


def test_missing_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(EngineError, match="exporting needs the package onnxscript"):
        export_networks(tiny_network(), ExportOptions())


# ------------------------------------------------------------------------------------------------ folders

def test_folder_holds_all_and_hashes_it(written, source):
    assert sorted(path.name for path in written.iterdir()) == [
        "dense.onnx", "manifest.json", "model.yaml", "sparse.onnx", "weights.safetensors",
    ]  # fmt: skip
    manifest = read_manifest(written)
    for name, expected in manifest.sha256.items():
        assert hashlib.sha256((written / name).read_bytes()).hexdigest() == expected
    assert set(manifest.sha256) == {"dense.onnx", "model.yaml", "sparse.onnx", "weights.safetensors"}
    assert manifest.capacity == capacity_for(tiny_config(), 300)
    assert (manifest.precision, manifest.opset, manifest.layer_norm) == ("fp32", 17, "fused")
    assert set(manifest.versions) == {"dsvt_ros", "torch", "onnx", "onnxscript"}
    assert not re.search(r"20\d\d-|/", json.dumps(json.loads((written / "manifest.json").read_text())))
    there, origin = open_model(written), open_model(source)
    assert (there.model, there.defaults) == (origin.model, origin.defaults)


def test_descriptions_survive(tmp_path):
    for name in ("demo", "waymo_pillar"):
        folder = open_model(name)
        (tmp_path / "model.yaml").write_text(description_of(folder))
        again = open_model(tmp_path)
        assert (again.model, again.defaults) == (folder.model, folder.defaults)


def test_an_earlier_export_is_not_overwritten_unasked(written, source, tmp_path, capsys):
    output = shutil.copytree(written, tmp_path / "copy")
    command = ["export", "--model", str(source), "--output", str(output)]
    assert cli.main(command) == 1
    assert "holds sparse.onnx, dense.onnx, manifest.json already" in capsys.readouterr().err
    assert cli.main([*command, "--overwrite", "--interface", "dsvt_release"]) == 0
    assert "dsvt.onnx in fp32 for any number of voxels, opset 14" in capsys.readouterr().out
    assert sorted(path.name for path in output.glob("*.onnx")) == ["dsvt.onnx"]
    assert read_manifest(output).interface == "dsvt_release"


def test_a_failed_export_leaves_nothing(source, tmp_path, monkeypatch):
    def fail(*_):
        raise EngineError("no")

    monkeypatch.setattr("dsvt_ros.export.folder.export_networks", fail)
    folder = open_model(source)
    with pytest.raises(EngineError):
        export_folder(folder, folder.weights, tmp_path / "output", ExportOptions())
    assert not (tmp_path / "output").exists()


def test_other_weights_in_the_folder_are_not_overwritten(source, tmp_path):
    other = write_tiny_model(tmp_path / "other", seed=3)
    folder = open_model(source)
    with pytest.raises(ConfigError, match=r"holds weights\.safetensors already"):
        export_folder(folder, folder.weights, other, ExportOptions())
    with pytest.raises(ConfigError, match="is a file"):
        export_folder(folder, folder.weights, source / "model.yaml", ExportOptions())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "waymo_pillar"], "comes without weights"),
        (["--interface", "dsvt_release", "--voxels", "100"], "leaves the number of voxels open"),
        (["--interface", "dsvt_release", "--precision", "fp16"], "has precision fp32, got fp16"),
        (["--voxels", "-5"], "room for at least one voxel"),
        (["--weights", "nowhere.pth"], "no weights file nowhere.pth"),
    ],
)
def test_command_refuses(arguments, message, tmp_path, capsys):
    assert cli.main(["export", "--output", str(tmp_path / "output"), *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "output").exists()
