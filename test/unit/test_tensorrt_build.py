"""Building in a child process: what it is told, what it tells, and how it ends."""

import os
import re
import subprocess
import sys
from unittest import mock

import pytest
from fakes.machine import VOXELS, is_running, pretended_machine
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_config, tiny_network

from dsvt_ros.backends.tensorrt import build as build_module
from dsvt_ros.backends.tensorrt import child
from dsvt_ros.backends.tensorrt.build import child_environment, run_child
from dsvt_ros.backends.tensorrt.child import BuildRequest, precision_of
from dsvt_ros.backends.tensorrt.load import _profiles
from dsvt_ros.capacity import capacity_for
from dsvt_ros.config import EngineConfig, ProfileConfig
from dsvt_ros.errors import EngineError
from dsvt_ros.export.folder import ExportOptions
from dsvt_ros.export.manifest import ExportedNetwork
from dsvt_ros.export.networks import release_specs, sparse_specs

pytest_plugins = ("fakes.fixtures",)

linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system does not say or do it")


@pytest.fixture
def request_for(machine, tiny_exports, tmp_path):
    """Requests for the sparse network of the tiny model."""

    def make(options=None, **changes):
        options = options or ExportOptions()
        networks, files = tiny_exports(tiny_network(), options)
        (tmp_path / "sparse.onnx").write_bytes(files["sparse.onnx"])
        config = EngineConfig(profile=ProfileConfig(tuple(VOXELS)))
        (profile,) = _profiles(tiny_config(), networks["sparse"], config)
        request = {
            "onnx": str(tmp_path / "sparse.onnx"),
            "engine": str(tmp_path / "sparse.engine"),
            "timing_cache": str(tmp_path / "cache" / "timing.cache"),
            "profile": profile,
            "half": options.precision == "fp16",
            "single_precision": networks["sparse"].single_precision,
            "workspace_bytes": 1 << 30,
            "optimization_level": 3,
            "tactic_sources": (),
        }
        return BuildRequest(**{**request, **changes})

    return make


@pytest.fixture
def start(request_for):
    """Builds the sparse network in a child; gives its report and what it told."""

    def run(options=None, **changes):
        told = []
        report = run_child(
            request_for(options, **changes),
            child_environment(0),
            "the engine",
            lambda text, fraction: told.append((text, fraction)),
        )
        return report, told

    return run


@pytest.fixture
def build_here(request_for, machine, capsys):
    """The same in this process; gives the settings that TensorRT got."""

    def run(options=None, **changes):
        child.build(request_for(options, **changes))
        capsys.readouterr()
        return machine.events("build")[-1]

    return run


# --------------------------------------------------------------------------------------------------------- how it ends


def test_a_build(start, tmp_path):
    report, told = start()
    assert (tmp_path / "sparse.engine").stat().st_size > 1000
    assert report["build_s"] >= 0
    assert report["unknown_layers"] == []
    assert sum(report["layers"]["gemm"].values()) > 10
    assert all(text.startswith("building the engine: ") for text, _ in told)


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("build", r"TensorRT 10\.16\.1 cannot build sparse\.onnx: .*Could not find any implementation for node Gemm_1"),
        ("gpu", r"TensorRT 10\.16\.1 cannot use this GPU: CUDA initialization failure with error: 35"),
        ("exception", r"its process ended with status 1: RuntimeError: something is wrong inside"),
        ("abort", r"its process ended with status -6"),
        ("kill", r"its process was killed, as the system does when memory runs out"),
    ],
)
def test_failures(machine, start, tmp_path, failure, message):
    machine.breaks(failure)
    with pytest.raises(EngineError, match=rf"^cannot build the engine: {message}"):
        start()
    assert not (tmp_path / "sparse.engine").exists()


def test_a_warning_is_better_than_no_reason(machine, start):
    """TensorRT 8 only warns that there is no GPU."""
    machine.release("8.6.1")
    machine.breaks("gpu")
    with pytest.raises(EngineError, match=r"TensorRT 8\.6\.1 cannot use this GPU: CUDA initialization failure"):
        start()


def test_an_operator_that_the_parser_lacks(machine, start):
    machine.release("8.5.3")
    with pytest.raises(
        EngineError, match=r"TensorRT 8\.5\.3 cannot read sparse\.onnx: .*Plugin not found.* \(node \d+\)"
    ):
        start(ExportOptions())


@pytest.mark.parametrize(("content", "reason"), [(b"\xff\xff", "Failed to parse"), (b"", "holds no graph")])
def test_no_network(start, tmp_path, content, reason):
    (tmp_path / "other.onnx").write_bytes(content)
    with pytest.raises(EngineError, match=rf"cannot read other\.onnx: .*{reason}"):
        start(onnx=str(tmp_path / "other.onnx"))


def test_a_network_with_other_inputs(start, request_for):
    profile = dict(request_for().profile)
    del profile["cell_of_voxel_stage_0_shift_1"]
    with pytest.raises(EngineError, match=r"sparse\.onnx has an input cell_of_voxel_stage_0_shift_1, which is none"):
        start(profile=profile)


def test_no_place_for_the_engine(start, tmp_path):
    with pytest.raises(EngineError, match=r"status 1: FileNotFoundError: .*No such file or directory"):
        start(engine=str(tmp_path / "missing" / "sparse.engine"))


@pytest.mark.alone
@linux
def test_too_much_memory(machine, start, monkeypatch):
    """The child would take 300 MiB."""
    machine.breaks("memory")
    monkeypatch.setattr(build_module, "free_host_memory", lambda: 250 * 2**20)
    with pytest.raises(
        EngineError,
        match=r"took more than 200 MiB of host memory, 80% of what was free, and was stopped: .*optimization_level",
    ):
        start()
    assert not is_running(machine.events("builder")[-1]["pid"])


@linux
def test_memory_of_this_machine():
    assert 50 * 2**20 < build_module.free_host_memory() < 2**50
    assert 10 * 2**20 < build_module.resident_memory(os.getpid()) < 2**40
    assert build_module.resident_memory(2**22 + 1) == 0


@pytest.mark.alone
@linux
def test_the_child_ends_where_its_parent_is_gone(request_for, tmp_path):
    """It asks to die with its parent, which may have died before."""
    (tmp_path / "request.json").write_text(child.request_text(request_for()))
    module = "dsvt_ros.backends.tensorrt.child"
    arguments = [sys.executable, "-m", module, str(tmp_path / "request.json"), str(os.getppid())]
    done = subprocess.run(arguments, env=child_environment(0), timeout=30, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, b"", b"")
    assert not (tmp_path / "sparse.engine").exists()


def test_the_child_leaves_torch_alone():
    """Its memory is for the builder."""
    code = f"import sys, {child.__name__}; print({{'torch', 'numpy', 'onnx'}} & {{*sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code], env=child_environment(0), timeout=30, capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"


@pytest.mark.parametrize(
    ("visible", "index", "expected"),
    [(None, 0, "0"), (None, 2, "2"), ("3,1", 1, "1"), ("GPU-8a, GPU-9b", 1, "GPU-9b"), ("", 0, "0")],
)
def test_the_child_sees_one_gpu(monkeypatch, visible, index, expected):
    """The one that has this index for us."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert child_environment(index)["CUDA_VISIBLE_DEVICES"] == expected


@pytest.mark.alone
def test_control_c_reaches_us_alone(machine, request_for):
    """Whoever handles the signal decides whether the build ends."""
    groups = set()

    def progress(text, fraction):
        groups.update(os.getpgid(event["pid"]) for event in machine.events("builder"))

    machine.slow(0.3)
    run_child(request_for(), child_environment(0), "the engine", progress)
    assert len(groups) == 1
    assert os.getpgid(0) not in groups


# ------------------------------------------------------------------------------------------------------ what it tells


@pytest.mark.alone
def test_progress_in_fractions(machine, start):
    machine.slow(0.8)
    _, told = start()
    fractions = [fraction for text, fraction in told if fraction is not None]
    assert fractions == sorted(fractions)
    assert len(set(fractions)) >= 3
    assert 0 < fractions[0] <= 0.5
    assert 0.9 < fractions[-1] <= 1
    stages = [text.split(": ")[1].split(",")[0] for text, _ in told]
    assert {"choosing kernels", "inspecting the engine"} & {*stages}
    assert all(re.search(r", \d+ s$", text) for text, _ in told), "it tells how long it has taken"


@pytest.mark.alone
def test_progress_of_releases_that_know_no_fractions(machine, start):
    machine.release("8.6.1")
    machine.slow(0.3)
    _, told = start()
    assert {fraction for _, fraction in told} == {None}
    assert [text for text, _ in told if "choosing kernels" in text]


STEPS = st.recursive(st.just(()), lambda inner: st.lists(inner, max_size=4).map(tuple), max_leaves=12)


@settings(max_examples=50, deadline=None)
@given(tree=STEPS)
def test_fractions_of_nested_phases(tree):
    """They grow and stay below 1, however TensorRT divides its work."""
    told = []
    with pretended_machine(), mock.patch.object(child, "say", lambda fraction, **_: told.append(fraction)):
        run_phase(child._monitor(), tree, "whole", None)
    assert told == sorted(told)
    assert all(0 < fraction <= 1 for fraction in told)
    if tree:
        assert told[-1] == 1


def test_as_many_fractions_as_a_reader_can_tell_apart(machine, monkeypatch):
    told = []
    monkeypatch.setattr(child, "say", lambda **content: told.append(content["fraction"]))
    run_phase(child._monitor(), [()] * 5000, "whole", None)
    assert 90 <= len(told) <= 100


def run_phase(monitor, tree, name, parent):
    monitor.phase_start(name, parent, len(tree))
    for number, part in enumerate(tree):
        if part:
            run_phase(monitor, part, f"{name}.{number}", name)
        assert monitor.step_complete(name, number), "false would end the build"
    monitor.phase_finish(name)


# --------------------------------------------------------------------------------------------- what TensorRT is told


def test_settings(build_here):
    event = build_here(optimization_level=1, workspace_bytes=123 << 20)
    assert event["level"] == 1
    assert event["limits"] == {"WORKSPACE": 123 << 20}
    assert event["flags"] == [], "TF32 would round float32"
    assert event["strongly_typed"]
    assert event["tactics"] is None
    assert event["shapes"]["voxel_features"] == [[512, 16]] * 3


@pytest.mark.parametrize("release", ["8.6.1", "10.16.1", "11.4.0"])
def test_settings_that_a_release_lacks(machine, build_here, release):
    """Single precision needs no permission, in no release."""
    machine.release(release)
    event = build_here()
    assert event["flags"] == []
    assert event["strongly_typed"] == (release != "8.6.1")
    assert ("FASTER_DYNAMIC_SHAPES_0805" in event["preview"]) == (release == "8.6.1")


def test_half_precision_in_tensorrt_8(machine, build_here):
    machine.release("8.6.1")
    event = build_here(ExportOptions(precision="fp16"))
    assert event["flags"] == ["FP16", "OBEY_PRECISION_CONSTRAINTS"]


@pytest.mark.parametrize("release", ["8.5.3", "8.6.1"])
def test_constants_in_single_precision_stay_so(machine, build_here, release):
    """TensorRT 8 would round them, such as the parameters of layer norms, whatever becomes of the layers they go to."""
    machine.release(release)
    layer_norm = "decomposed" if release == "8.5.3" else "fused"
    assert build_here(ExportOptions(precision="fp16", layer_norm=layer_norm))["rounded"] == []


def test_layers_that_are_not_found(machine, request_for):
    """They would run in half precision in TensorRT 8."""
    machine.release("8.6.1")
    request = request_for(ExportOptions(precision="fp16"))
    names = (*request.single_precision, "renamed")
    assert len(names) > 5
    report = child.build(BuildRequest(**{**vars(request), "single_precision": names}))
    assert report["unknown_layers"] == ["renamed"]


def test_half_precision_without_permission_is_refused(machine, start):
    """That the stand-in behaves like TensorRT 8, which the tests above rest on."""
    machine.release("8.6.1")
    with pytest.raises(EngineError, match="fp16 is not configured in the builder"):
        start(ExportOptions(precision="fp16"), half=False)


def test_tactic_sources(machine, build_here):
    assert build_here(tactic_sources=("CUBLAS", "jit_convolutions"))["tactics"] == ["CUBLAS", "JIT_CONVOLUTIONS"]
    machine.release("11.4.0")
    with pytest.raises(
        EngineError,
        match=r"engine\.tactic_sources: TensorRT 11\.4\.0 has no cublas; it has edge_mask_convolutions, jit_conv",
    ):
        build_here(tactic_sources=("cublas",))
    assert build_here(tactic_sources=("jit_convolutions",))["tactics"] == ["JIT_CONVOLUTIONS"]


def test_open_extents_need_a_profile(build_here, request_for):
    low, high = request_for().profile, {}
    for name, (shape, _, _) in low.items():
        high[name] = (shape, shape, tuple(2 * extent if extent > 100 else extent for extent in shape))
    shapes = build_here(profile=high)["shapes"]
    assert shapes["voxel_features"] == [[512, 16], [512, 16], [1024, 16]]


def test_timing_cache(build_here, tmp_path):
    """What was measured for one engine serves the next."""
    path = tmp_path / "cache" / "timing.cache"
    assert build_here()["earlier_builds"] == 0
    assert build_here()["earlier_builds"] == 1
    path.write_bytes(b"damaged")
    assert build_here()["earlier_builds"] == 0
    assert build_here()["earlier_builds"] == 1
    assert [entry.name for entry in path.parent.iterdir()] == ["timing.cache"]


def test_no_place_for_the_timing_cache(build_here, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert build_here(timing_cache=str(tmp_path / "file" / "timing.cache"))["earlier_builds"] == 0
    assert (tmp_path / "sparse.engine").exists()


def test_timing_caches_of_releases_and_gpus_are_kept_apart(machine, open_tiny, built):
    machine.release("10.0.1")
    open_tiny()
    machine.gpu("Another GPU")
    open_tiny()
    assert sorted(path.name for path in (built / "tensorrt").glob("*.cache")) == [
        "timing-10.0.1-Another_GPU.cache",
        "timing-10.0.1-Fake_GPU.cache",
        "timing-10.16.1-Fake_GPU.cache",
    ]


# -------------------------------------------------------------------------------------------------- numbers and shapes

DESCRIPTIONS = {
    "Row major linear FP16 format": "fp16",
    "Channel major FP16 format where channel % 8 == 0": "fp16",
    "Two wide channel vectorized row major FP16 format": "fp16",
    "Half": "fp16",
    "Row major linear FP32": "fp32",
    "Thirty-two wide channel vectorized row major FP32 format": "fp32",
    "Float": "fp32",
    "Row major linear Int32": "int",
    "Row major linear INT8 format (kLINEAR)": "int",
    "Row major Int8 format": "int",
    "Row major linear BOOL": "int",
    "Int64": "int",
    "Bool": "int",
    "BF16": "bf16",
    "BFloat16": "bf16",
}


@settings(deadline=None)
@given(st.lists(st.sampled_from([*DESCRIPTIONS, "", "Unknown format"])))
def test_precision_of_a_layer(descriptions):
    """All that its outputs have, in one word, whatever their order."""
    expected = {DESCRIPTIONS[text] for text in descriptions if text in DESCRIPTIONS}
    assert precision_of(descriptions) == ("+".join(sorted(expected)) or "unknown")


@settings(max_examples=50, deadline=None)
@given(voxels=st.sets(st.integers(1, 1024), min_size=3, max_size=3).map(sorted), dynamic=st.booleans())
@pytest.mark.parametrize("interface", ["dsvt_ros", "dsvt_release"])
def test_profiles(interface, voxels, dynamic):
    """Ranges in order, with room for as many sets as so many voxels can make."""
    model = tiny_config()
    specs = sparse_specs(model, None, "float32") if interface == "dsvt_ros" else release_specs(model)
    network = ExportedNetwork("sparse.onnx", *map(tuple, specs))
    config = EngineConfig(profile=ProfileConfig(tuple(voxels), dynamic))
    profiles = _profiles(model, network, config)
    assert len(profiles) == (1 if dynamic else 3)
    for profile, most in zip(profiles, voxels[-1:] if dynamic else voxels, strict=True):
        assert set(profile) == {spec.name for spec in network.inputs}
        sizes = {}
        for spec in network.inputs:
            low, usual, high = profile[spec.name]
            assert all(1 <= a <= b <= c for a, b, c in zip(low, usual, high, strict=True))
            assert dynamic or low == usual == high
            for symbol, size in zip(spec.shape, high, strict=True):
                assert sizes.setdefault(symbol, size) == size if isinstance(symbol, str) else symbol == size
        counts = [size for symbol, size in sizes.items() if "set_number" in symbol or "num_sets" in symbol]
        assert sorted(counts) == sorted(capacity_for(model, most).stages[0].sets)
        assert most in sizes.values()


def test_networks_of_fixed_size_have_one_profile():
    model = tiny_config()
    specs = sparse_specs(model, capacity_for(model, 256), "float32")
    network = ExportedNetwork("sparse.onnx", *map(tuple, specs))
    (profile,) = _profiles(model, network, EngineConfig())
    assert profile == {spec.name: (spec.shape,) * 3 for spec in network.inputs}
