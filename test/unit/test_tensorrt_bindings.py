"""Every part of TensorRT that the source uses exists in the releases that we support, as their own bindings say."""

import re
import runpy
import sys
import textwrap
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from tensorrt_releases import NEW_IN_8_6, Release, faults, look_at, make_stand_ins
from tensorrt_uses import collect

ROOT = Path(__file__).resolve().parents[2]
BOOTSTRAP = runpy.run_path(str(ROOT / "resource" / "environment" / "bootstrap.py"))
WHEELS = [Requirement(line) for line in BOOTSTRAP["requirements"]("tensorrt_bindings")]
FOLDER = Path(sys.prefix) / BOOTSTRAP["BINDINGS"].name
OLDEST = "8.6.1"


def version_of(wheel):
    (specifier,) = wheel.specifier
    return specifier.version


def has_wheel(wheel):
    """Whether a wheel exists for this Python."""
    return wheel.marker is None or wheel.marker.evaluate()


@pytest.fixture(scope="module")
def releases(tmp_path_factory):
    """The bindings for this Python, oldest first, as they describe themselves."""
    if not BOOTSTRAP["linux_wheels_exist"]():
        pytest.skip("TensorRT's bindings exist as wheels for Linux on x86-64 and Python up to 3.13 only")
    stand_ins = tmp_path_factory.mktemp("stand_ins")
    found = []
    for version in map(version_of, filter(has_wheel, WHEELS)):
        if not (FOLDER / version).is_dir():
            pytest.fail(f"TensorRT's bindings {version} are missing in {FOLDER}: make venv puts them there")
        major = int(version.split(".")[0])
        if not (stand_ins / str(major)).exists():
            make_stand_ins(stand_ins / str(major), major)
        content = look_at(FOLDER / version, stand_ins / str(major))
        assert content["version"] == version
        found.append(Release(version, content))
        if version == OLDEST:
            found.insert(0, found[0].without("8.5", NEW_IN_8_6))
    return found


@pytest.fixture
def all_releases(releases):
    if releases[0].name != "8.5":
        pytest.skip(f"TensorRT 8 has no wheels for Python {sys.version_info.major}.{sys.version_info.minor}")
    return releases


@pytest.fixture(scope="module")
def findings():
    """What the whole package uses of TensorRT."""
    texts = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "dsvt_ros").rglob("*.py")}
    return collect({file: text for file, text in texts.items() if re.search(r"\btrt\b|\btensorrt\b", text)})


def test_newest_releases_are_compared_for_every_python():
    always = {version_of(wheel).split(".")[0] for wheel in WHEELS if wheel.marker is None}
    assert always == {"10", "11"}
    assert version_of(WHEELS[0]) == OLDEST


def test_the_source_uses_only_what_exists(findings, releases):
    found = faults(findings, releases, complete=releases[0].name == "8.5")
    assert not found, "\n".join(found)


def test_tensorrt_8_is_among_the_releases(all_releases):
    """Where it is not, this says so."""
    assert [release.name for release in all_releases[:2]] == ["8.5", OLDEST]


def test_the_whole_source_is_seen(findings):
    uses = {(use.owner, use.name) for use in findings.uses}
    building = {(("Builder", "()"), "build_serialized_network"), (("IBuilderConfig", "()"), "set_memory_pool_limit")}
    running = {(("IExecutionContext", "()"), "execute_async_v3"), (("ICudaEngine", "()"), "get_tensor_name")}
    assert building | running <= uses
    assert {"child.py", "runner.py"} <= {use.where.split(":")[0].rpartition("/")[2] for use in findings.uses}


# --- That the comparison finds what it is for ----------------------------------------------------------------------

HEAD = """
from __future__ import annotations
from typing import Any
import tensorrt as trt

SHARED: trt.ICudaEngine

def layers_of(network: trt.INetworkDefinition) -> Iterator[trt.ILayer]: ...

class Holder:
    engine: trt.ICudaEngine

    def __init__(self, context: trt.IExecutionContext) -> None:
        self._context = context

def use(builder: trt.Builder, config: trt.IBuilderConfig, network: trt.INetworkDefinition, engine: trt.ICudaEngine,
        parser: trt.OnnxParser, holder: Holder, logger: Any, anything: Any) -> Any:
"""


def found_in(releases, code):
    """The faults of a function with this body, without their places."""
    found = faults(collect({"sample.py": HEAD + textwrap.indent(code, "    ")}), releases)
    assert all(re.match(r"sample\.py:\d+: ", fault) for fault in found)
    return [fault.split(": ", maxsplit=1)[1] for fault in found]


WRONG = [
    # What does not exist.
    ("config.set_flagg(trt.BuilderFlag.TF32)", "no release has trt.IBuilderConfig.set_flagg"),
    ("x = trt.Bulder(logger)", "no release has trt.Bulder"),
    ("x: trt.Bulder", "no release has trt.Bulder"),
    ("x: list['trt.Bulder | None'] = []", "no release has trt.Bulder"),
    ("config.set_flag(trt.BuilderFlag.TF23)", "no release has trt.BuilderFlag.TF23"),
    ("x = trt.DataType.FLOAT.size", "no release has trt.DataType.FLOAT.size"),
    ("class Log(trt.ILoger):\n    pass", "no release has trt.ILoger"),
    ("class Log(trt.ILogger):\n    def say(self): self.louder()", "no release has trt.ILogger.louder"),
    ("class Log(trt.ILogger):\n    def __init__(self): super().start()", "no release has trt.ILogger.start"),
    # What does not exist everywhere.
    ("config.set_flag(trt.BuilderFlag.FP16)", r"BuilderFlag.FP16 does not .* guards it \(TensorRT 11.4.0.106\)"),
    ("config.progress_monitor = None", r"progress_monitor does not .* guards it \(TensorRT 8.5, 8.6.1\)"),
    ("config.builder_optimization_level = 3", r"level does not .* guards it \(TensorRT 8.5\)"),
    ("x = trt.BuilderFlag.STRICT_NANS", r"STRICT_NANS does not .* guards it \(TensorRT 8.5, 8.6.1, 10.0.1\)"),
    ("x = getattr(trt.TacticSource, 'CUBLAS')", r"CUBLAS does not .* guards it \(TensorRT 11.4.0.106\)"),
    # Guards that are none.
    ("if hasattr(trt.BuilderFlag, 'FP61'):\n    pass", "no release has trt.BuilderFlag.FP61"),
    ("if hasattr(config, 'tactics'):\n    pass", "no release has trt.IBuilderConfig.tactics"),
    ("x = getattr(trt.TacticSource, 'CUBLASS', None)", "no release has trt.TacticSource.CUBLASS"),
    ("for name in ('CUDNN', 'CUDN'):\n    hasattr(trt.TacticSource, name)", "no release has trt.TacticSource.CUDN"),
    ("x = getattr(trt.TacticSource, anything, None)", "getattr asks trt.TacticSource for a name that the source"),
    (
        "if hasattr(trt.BuilderFlag, 'FP16'):\n    x = trt.BuilderFlag.INT8",
        "trt.BuilderFlag.INT8 does not exist in",
    ),
    ("if hasattr(trt.BuilderFlag, 'FP16'):\n    pass\nx = trt.BuilderFlag.FP16", "trt.BuilderFlag.FP16 does not"),
    ("if hasattr(trt.BuilderFlag, 'FP16') or anything:\n    x = trt.BuilderFlag.FP16", "trt.BuilderFlag.FP16 does"),
    (
        "if not hasattr(trt.BuilderFlag, 'FP16'):\n    x = trt.BuilderFlag.FP16",
        "trt.BuilderFlag.FP16 does not exist",
    ),
    ("x = 0 if hasattr(trt.BuilderFlag, 'FP16') else trt.BuilderFlag.FP16", "trt.BuilderFlag.FP16 does not exist"),
    # Objects whose class is not said, or said wrongly.
    ("made = builder.create_network(0)", "returns trt.INetworkDefinition: annotate made"),
    ("holder.context = engine.create_execution_context()", "trt.IExecutionContext: annotate holder.context"),
    ("x: trt.IBuilderConfig = builder.create_network(0)", "INetworkDefinition, but x is annotated as trt.IBuilder"),
    ("x: Any = builder.create_network(0)", "returns trt.INetworkDefinition, but x is annotated as something else"),
    (
        "def make() -> Any:\n    return builder.create_network(0)",
        "the result of this function is annotated as some",
    ),
    ("def inner(x: Any):\n    x.add()\ninner(network)", "but x, a parameter of inner, is annotated as something"),
    ("def inner(library):\n    library.add()\ninner(trt)", "hands over the module, which would be called library"),
    (
        "x: trt.IConstantLayer\nx.weights.size",
        "cannot tell what trt.IConstantLayer.weights is, so .size",
    ),
    ("from tensorrt import Builder", "imports names out of TensorRT"),
    ("import tensorrt", "imports TensorRT under another name than trt"),
    # Objects that come from afar.
    ("network.get_layer(0).title", r"no release has trt.INetworkDefinition.get_layer\(\).title"),
    (
        "low, _, _ = engine.get_tensor_profile_shape('x', 0)\nlow.extent",
        r"no release has trt.ICudaEngine.get_tensor_profile_shape\(\)\[\].extent",
    ),
    ("layers: list[trt.ILayer] = []\nlayers[0].title", "no release has trt.ILayer.title"),
    (
        "x = [network.get_layer(i) for i in (0, 1)]\nfor _, layer in enumerate(x[1:]):\n    layer.title",
        "get_layer.*title",
    ),
    ("layer: trt.ILayer\nfor layer in anything:\n    layer.title", "no release has trt.ILayer.title"),
    ("[layer.title for layer in layers_of(network)]", "no release has trt.ILayer.title"),
    ("with trt.Builder(logger) as x:\n    x.make()", "no release has trt.Builder.make"),
    ("x = engine\nx.num_tensors", "no release has trt.ICudaEngine.num_tensors"),
    ("SHARED.num_tensors", "no release has trt.ICudaEngine.num_tensors"),
    ("holder.engine.num_tensors", "no release has trt.ICudaEngine.num_tensors"),
    ("holder._context.run()", "no release has trt.IExecutionContext.run"),
    ("anything.engine.num_tensors", "no release has trt.ICudaEngine.num_tensors"),
    ("def inner(x):\n    x.engine.num_tensors", "no release has trt.ICudaEngine.num_tensors"),
    # Arguments, and what cannot be set.
    ("parser.parse(model=b'', file='x')", "trt.OnnxParser.parse does not take .*: 0 positional, model=, file="),
    ("config.set_flag(trt.BuilderFlag.TF32, True)", "trt.IBuilderConfig.set_flag does not take these arguments"),
    ("config.clear_flag()", "trt.IBuilderConfig.clear_flag does not take these arguments: 0 positional"),
    ("x = trt.Builder()", "trt.Builder does not take these arguments: 0 positional"),
    ("engine.num_io_tensors = 3", "trt.ICudaEngine.num_io_tensors cannot be set"),
    ("engine.get_tensor_name = None", "trt.ICudaEngine.get_tensor_name cannot be set"),
]


@pytest.mark.parametrize(("code", "expected"), WRONG)
def test_what_is_wrong_is_found(code, expected, all_releases):
    (found,) = found_in(all_releases, code)
    assert re.search(expected, found)


RIGHT = [
    "if hasattr(trt.BuilderFlag, 'FP16'):\n    config.set_flag(trt.BuilderFlag.FP16)",
    "if not hasattr(trt.BuilderFlag, 'FP16'):\n    return\nconfig.set_flag(trt.BuilderFlag.FP16)",
    "if not hasattr(trt.BuilderFlag, 'FP16'):\n    pass\nelse:\n    config.set_flag(trt.BuilderFlag.FP16)",
    "if anything and hasattr(trt.BuilderFlag, 'FP16'):\n    config.set_flag(trt.BuilderFlag.FP16)",
    "assert hasattr(trt.BuilderFlag, 'FP16')\nx = lambda: trt.BuilderFlag.FP16",
    "x = hasattr(trt.BuilderFlag, 'FP16') and config.get_flag(trt.BuilderFlag.FP16)",
    "x = not hasattr(trt.BuilderFlag, 'FP16') or config.get_flag(trt.BuilderFlag.FP16)",
    "x = trt.TacticSource.CUBLAS if hasattr(trt.TacticSource, 'CUBLAS') else None",
    "x = [1 for _ in anything if hasattr(trt.TacticSource, 'CUBLAS') if trt.TacticSource.CUBLAS]",
    "x = getattr(trt.TacticSource, 'CUBLAS', None)",
    "if hasattr(config, 'builder_optimization_level'):\n    config.builder_optimization_level = 3",
    "if hasattr(trt.IBuilderConfig, 'max_aux_streams'):\n    config.max_aux_streams = 0",
    "if hasattr(trt, 'IProgressMonitor'):\n    class Monitor(trt.IProgressMonitor):\n"
    "        def phase_start(self): self.seen = self.phase_finish",
    "for name in ('CUBLAS', 'CUDNN'):\n    x = getattr(trt.TacticSource, name, None)",
    "x: trt.INetworkDefinition | None = builder.create_network(flags=0)",
    "layer: trt.ILayer = network.add_identity(network.get_input(0))",
    "x = trt.Runtime(logger)\nx.deserialize_cuda_engine(b'')",
    "done = parser.parse(b'', path='x')\nname = engine.get_tensor_name(0).upper()",
    "x = tuple(engine.get_tensor_shape('x'))\ny = [name.lower() for name in trt.TacticSource.__members__]",
    "config.set_timing_cache(*anything)",
    "class Lazy:\n    def __getattr__(self, name): return getattr(trt, name)",
    "return trt.volume(engine.get_tensor_shape('x')).bit_length()",
]


@pytest.mark.parametrize("code", RIGHT)
def test_what_is_right_is_left_alone(code, all_releases):
    assert found_in(all_releases, code) == []


def test_names_of_another_file_are_known(all_releases):
    maker = """
        import tensorrt as trt
        def make() -> "trt.Builder": ...
        class Run:
            engine: "trt.ICudaEngine"
    """
    taker = """
        import maker
        from maker import Run, make
        def take(run: Run):
            make().a
            maker.make().b
            run.engine.c
    """
    texts = {"maker.py": textwrap.dedent(maker), "taker.py": textwrap.dedent(taker)}
    assert faults(collect(texts), all_releases) == [
        "taker.py:5: no release has trt.Builder.a",
        "taker.py:6: no release has trt.Builder.b",
        "taker.py:7: no release has trt.ICudaEngine.c",
    ]


def test_a_guard_for_a_release_that_is_not_compared_is_left_alone(all_releases):
    findings = collect(
        {"sample.py": "import tensorrt as trt\nx = hasattr(trt.PreviewFeature, 'FASTER_DYNAMIC_SHAPES_0805')"}
    )
    assert faults(findings, all_releases) == []
    assert len(faults(findings, all_releases[2:])) == 1
    assert faults(findings, all_releases[2:], complete=False) == []
