"""Stands in for NVIDIA's module ``tensorrt`` where there is no GPU.

It has the names that one release has, reads ONNX files, refuses what that release refuses, and runs engines in ONNX
Runtime on the CPU, on memory given by address. Environment variables decide how it behaves:

- ``FAKE_TENSORRT_VERSION``: the release, such as 8.5.3; taken when the module is imported
- ``FAKE_TENSORRT_GPU``, ``FAKE_TENSORRT_COMPUTE``: name and compute capability of the GPU
- ``FAKE_TENSORRT_LOG``: a file that gets a line of JSON for every builder, build and run
- ``FAKE_TENSORRT_BUILD_S``: seconds that a build takes
- ``FAKE_TENSORRT_FAIL``: what goes wrong, one of `FAILURES`
- ``FAKE_TENSORRT_UNWRITTEN``: an output whose second half is never written
"""

from __future__ import annotations

import ctypes
import enum
import hashlib
import json
import os
import signal
import struct
import time

import numpy as np
import onnx
from onnx import TensorProto

__version__ = os.environ.get("FAKE_TENSORRT_VERSION", "10.16.1")
_RELEASE = tuple(int(part) for part in __version__.split(".")[:2])
_NEVER = (99, 0)

FAILURES = {
    "gpu": "there is no usable GPU",
    "build": "no kernel for a layer",
    "exception": "an error of Python in a build",
    "abort": "a build that aborts its process",
    "kill": "a build that is killed as by the kernel when memory runs out",
    "memory": "a build that takes 300 MiB and does not end",
    "context": "no GPU memory for an execution context",
    "run": "an error in every run",
}


def _fails(what):
    return os.environ.get("FAKE_TENSORRT_FAIL") == what


def _gpu():
    return os.environ.get("FAKE_TENSORRT_GPU", "Fake GPU"), os.environ.get("FAKE_TENSORRT_COMPUTE", "9.0")


def _note(**event):
    if path := os.environ.get("FAKE_TENSORRT_LOG"):
        with open(path, "a") as file:  # noqa: PTH123  one write, appended as a whole
            file.write(json.dumps({"pid": os.getpid(), **event}) + "\n")


# ------------------------------------------------------------------------------------------------------ constants


class _Enum(enum.Enum):
    def __int__(self):
        return self.value


def _enum(name, *members):
    """Members are names, or names with the first release that has them and the first that has them no more."""
    entries = [(member, (0, 0), _NEVER) if isinstance(member, str) else member for member in members]
    there = {name: value for value, (name, first, end) in enumerate(entries) if first <= _RELEASE < end}
    return _Enum(name, there)


NetworkDefinitionCreationFlag = _enum(
    "NetworkDefinitionCreationFlag", ("EXPLICIT_BATCH", (0, 0), (11, 0)), ("STRONGLY_TYPED", (10, 0), _NEVER)
)
BuilderFlag = _enum(
    "BuilderFlag",
    *(("FP16", (0, 0), (11, 0)), ("INT8", (0, 0), (11, 0)), "DEBUG", "GPU_FALLBACK", "REFIT", "TF32"),
    *(("OBEY_PRECISION_CONSTRAINTS", (0, 0), (11, 0)), ("PREFER_PRECISION_CONSTRAINTS", (0, 0), (11, 0))),
)
TacticSource = _enum(
    "TacticSource",
    *(("CUBLAS", (0, 0), (11, 0)), ("CUBLAS_LT", (0, 0), (11, 0)), ("CUDNN", (0, 0), (11, 0))),
    *("EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS"),
)
PreviewFeature = _enum(
    "PreviewFeature",
    *(("FASTER_DYNAMIC_SHAPES_0805", (0, 0), (10, 0)), ("PROFILE_SHARING_0806", (8, 6), (11, 0))),
    ("ALIASED_PLUGIN_IO_10_03", (10, 3), _NEVER),
)
MemoryPoolType = _enum("MemoryPoolType", "WORKSPACE", "DLA_MANAGED_SRAM", ("TACTIC_SHARED_MEMORY", (10, 0), _NEVER))
DataType = _enum("DataType", "FLOAT", "HALF", "INT8", "INT32", "BOOL", "UINT8", ("INT64", (10, 0), _NEVER))
LayerType = _enum(
    "LayerType",
    *("CONVOLUTION", "DECONVOLUTION", "ACTIVATION", "SOFTMAX", "CONCATENATION", "ELEMENTWISE", "UNARY", "SHUFFLE"),
    *("REDUCE", "GATHER", "MATRIX_MULTIPLY", "CONSTANT", "IDENTITY", "SLICE", "SHAPE", "POOLING", "SELECT", "TOPK"),
    *(("CAST", (8, 6), _NEVER), ("NORMALIZATION", (8, 6), _NEVER)),
)
LayerInformationFormat = _enum("LayerInformationFormat", "ONELINE", "JSON")
ProfilingVerbosity = _enum("ProfilingVerbosity", "LAYER_NAMES_ONLY", "NONE", "DETAILED")
TensorIOMode = _enum("TensorIOMode", "NONE", "INPUT", "OUTPUT")

_LAYERS = {
    "Add": "ELEMENTWISE", "Cast": "CAST", "Concat": "CONCATENATION", "Conv": "CONVOLUTION",
    "ConvTranspose": "DECONVOLUTION", "Div": "ELEMENTWISE", "Erf": "UNARY", "Gather": "GATHER", "Gelu": "ACTIVATION",
    "Gemm": "MATRIX_MULTIPLY", "LayerNormalization": "NORMALIZATION", "MatMul": "MATRIX_MULTIPLY",
    "Mul": "ELEMENTWISE", "ReduceMean": "REDUCE", "Relu": "ACTIVATION", "Reshape": "SHUFFLE", "Slice": "SLICE",
    "Softmax": "SOFTMAX", "Split": "SLICE", "Sqrt": "UNARY", "Squeeze": "SHUFFLE", "Sub": "ELEMENTWISE",
    "Transpose": "SHUFFLE", "Unsqueeze": "SHUFFLE", "Clip": "ACTIVATION", "Equal": "ELEMENTWISE", "Floor": "UNARY",
    "MaxPool": "POOLING", "Not": "UNARY", "ReduceMax": "REDUCE", "ReduceSum": "REDUCE", "Sigmoid": "ACTIVATION",
    "TopK": "TOPK", "Where": "SELECT",
}  # fmt: skip
if _RELEASE < (8, 6):
    _LAYERS["Cast"] = "IDENTITY"
    del _LAYERS["LayerNormalization"]

_TYPES = {
    TensorProto.FLOAT: DataType.FLOAT,
    TensorProto.FLOAT16: DataType.HALF,
    TensorProto.INT8: DataType.INT8,
    TensorProto.INT32: DataType.INT32,
    TensorProto.BOOL: DataType.BOOL,
    # Before release 10 the parser made them INT32.
    TensorProto.INT64: DataType.INT64 if _RELEASE >= (10, 0) else DataType.INT32,
}
_NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "INT8": np.int8, "INT32": np.int32, "BOOL": np.bool_}
_NUMPY["INT64"] = np.int64
# As the inspector writes them, before release 10 and since.
_FORMATS = {
    "FLOAT": ("Row major linear FP32", "Float"),
    "HALF": ("Row major linear FP16 format", "Half"),
    "INT8": ("Row major Int8 format", "Int8"),
    "INT32": ("Row major linear Int32", "Int32"),
    "BOOL": ("Row major linear BOOL", "Bool"),
    "INT64": ("", "Int64"),
}


# --------------------------------------------------------------------------------------- objects of the interface


class ILogger:
    Severity = _enum("Severity", "INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")

    def __init__(self):
        pass


if _RELEASE >= (10, 0):

    class IProgressMonitor:
        def __init__(self):
            pass


class IHostMemory(bytearray):
    @property
    def nbytes(self):
        return len(self)


class Dims:
    """A shape that is no tuple."""

    def __init__(self, extents):
        self._extents = tuple(int(extent) for extent in extents)

    def __len__(self):
        return len(self._extents)

    def __getitem__(self, index):
        return self._extents[index]

    def __repr__(self):
        return repr(self._extents)


class ITensor:
    __slots__ = ("_shape", "dtype", "is_network_input", "name")

    def __init__(self, name, dtype, shape=(), is_network_input=False):
        self.name, self.dtype, self._shape, self.is_network_input = name, dtype, tuple(shape), is_network_input

    @property
    def shape(self):
        return Dims(self._shape)

    @shape.setter
    def shape(self, value):
        self._shape = tuple(value)


class ILayer:
    __slots__ = (
        *("_in_file", "_op", "_outputs", "_types", "name", "type"),
        *(("precision",) if _RELEASE < (11, 0) else ()),
    )

    def __init__(self, name, type_, op, outputs, in_file):
        self.name, self.type, self._op, self._outputs, self._types = name, type_, op, outputs, {}
        self._in_file = in_file  # element types of the outputs
        if _RELEASE < (11, 0):
            self.precision = None

    @property
    def num_outputs(self):
        return len(self._outputs)

    def get_output(self, index):
        return self._outputs[index]

    if _RELEASE < (11, 0):

        def set_output_type(self, index, dtype):
            self._types[index] = dtype

    def _single(self):
        """Whether it was asked to compute and give float32."""
        wanted = [getattr(self, "precision", None), *(self._types.get(i) for i in range(self.num_outputs))]
        return all(entry == DataType.FLOAT for entry in wanted)


class INetworkDefinition:
    def __init__(self, flags):
        names = NetworkDefinitionCreationFlag.__members__
        given = {name for name, flag in names.items() if flags & 1 << int(flag)}
        self._strong = "STRONGLY_TYPED" in given or _RELEASE >= (11, 0)
        self._explicit = "EXPLICIT_BATCH" in given or _RELEASE >= (10, 0)
        self._inputs, self._layers, self._model = [], [], None

    @property
    def num_inputs(self):
        return len(self._inputs)

    def get_input(self, index):
        return self._inputs[index]

    @property
    def num_layers(self):
        return len(self._layers)

    def get_layer(self, index):
        return self._layers[index]


class IOptimizationProfile:
    def __init__(self):
        self._shapes = {}

    def set_shape(self, input, min, opt, max):
        shapes = [tuple(shape) for shape in (min, opt, max)]
        if any(not low <= usual <= high for low, usual, high in zip(*shapes, strict=True)):
            raise ValueError("Shape provided for min is inconsistent with other shapes.")
        self._shapes[input] = shapes


class ITimingCache:
    MAGIC = b"fake timing cache"

    def __init__(self, builds):
        self._builds = builds

    def serialize(self):
        return IHostMemory(self.MAGIC + json.dumps(self._builds).encode())


class IBuilderConfig:
    __slots__ = (
        *("_cache", "_flags", "_limits", "_logger", "_preview", "_profiles", "_tactics", "profiling_verbosity"),
        *(("builder_optimization_level",) if _RELEASE >= (8, 6) else ()),
        *(("progress_monitor",) if _RELEASE >= (10, 0) else ()),
    )

    def __init__(self, logger):
        self._logger, self._flags, self._profiles, self._limits = logger, {BuilderFlag.TF32}, [], {}
        self._cache, self._preview, self._tactics = None, set(), None
        self.profiling_verbosity = ProfilingVerbosity.LAYER_NAMES_ONLY
        if _RELEASE >= (8, 6):
            self.builder_optimization_level = 3
        if _RELEASE >= (10, 0):
            self.progress_monitor = None

    def set_flag(self, flag):
        self._flags.add(BuilderFlag(flag))

    def clear_flag(self, flag):
        self._flags.discard(BuilderFlag(flag))

    def add_optimization_profile(self, profile):
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def set_memory_pool_limit(self, pool, pool_size):
        self._limits[MemoryPoolType(pool).name] = pool_size

    def set_preview_feature(self, feature, enable):
        (self._preview.add if enable else self._preview.discard)(PreviewFeature(feature).name)

    def set_tactic_sources(self, tactic_sources):
        known = {1 << int(source): name for name, source in TacticSource.__members__.items()}
        self._tactics = [name for bit, name in known.items() if tactic_sources & bit]
        return tactic_sources & ~sum(known) == 0

    def create_timing_cache(self, serialized_timing_cache):
        content = bytes(serialized_timing_cache)
        if not content:
            return ITimingCache([])
        if not content.startswith(ITimingCache.MAGIC):
            self._logger.log(
                ILogger.Severity.ERROR,
                "1: [stdArchiveReader.cpp::StdArchiveReaderInitCommon::36] Error Code 1: Serialization (Serialization "
                "assertion magicTagRead == kMAGIC_TAG failed.Magic tag does not match)",
            )
            return None
        return ITimingCache(json.loads(content[len(ITimingCache.MAGIC) :]))

    def set_timing_cache(self, cache, ignore_mismatch):
        if not isinstance(cache, ITimingCache):
            raise TypeError("set_timing_cache(): incompatible function arguments.")
        self._cache = cache
        return True


class ParserError:
    def __init__(self, text, node):
        self._text, self._node = text, node

    def desc(self):
        return self._text

    def node(self):
        return self._node


class OnnxParser:
    def __init__(self, network, logger):
        self._network, self._logger, self._errors = network, logger, []

    @property
    def num_errors(self):
        return len(self._errors)

    def get_error(self, index):
        return self._errors[index]

    def parse(self, model, path=None):
        try:
            parsed = onnx.load_model_from_string(bytes(model))
        except Exception:  # protobuf's own
            return self._refuse("Failed to parse ONNX model", -1)
        if not self._network._explicit:
            return self._refuse("This version of the ONNX parser only supports networks with an explicit batch", -1)
        if not parsed.graph.node:
            return self._refuse("The model holds no graph", -1)
        for index, node in enumerate(parsed.graph.node):
            if node.op_type not in _LAYERS:
                return self._refuse(
                    'Assertion failed: creator && "Plugin not found, are the plugin name, version, and namespace '
                    'correct?"',
                    index,
                )
        self._fill(parsed)
        return True

    def _refuse(self, text, node):
        self._errors.append(ParserError(text, node))
        self._logger.log(ILogger.Severity.ERROR, f"ModelImporter.cpp: ERROR: In node {node}: {text}")
        return False

    def _fill(self, model):
        graph = onnx.shape_inference.infer_shapes(model).graph
        weights = {entry.name: _TYPES[entry.data_type] for entry in graph.initializer}
        values = {v.name: v for v in (*graph.input, *graph.value_info, *graph.output)}
        types = {name: _TYPES[value.type.tensor_type.elem_type] for name, value in values.items()} | weights
        network = self._network
        network._model = model
        network._inputs = [ITensor(v.name, types[v.name], _shape(v), is_network_input=True) for v in graph.input]

        def layer(name, op, outputs):
            in_file = [types[output] for output in outputs]
            # Unless it is strongly typed, a network takes the results of its layers for float32 until it is built.
            known = network._strong or op == "Constant"
            seen = [t if known or t != DataType.HALF else DataType.FLOAT for t in in_file]
            tensors = [ITensor(*pair) for pair in zip(outputs, seen, strict=True)]
            return ILayer(name, LayerType[_LAYERS.get(op, "CONSTANT")], op, tensors, in_file)

        network._layers = [layer(name, "Constant", [name]) for name in weights] + [
            layer(node.name, node.op_type, [name for name in node.output if name]) for node in graph.node
        ]


def _shape(value):
    """Extents of a tensor of an ONNX file; -1 for those that are open."""
    return tuple(-1 if size.dim_param else size.dim_value for size in value.type.tensor_type.shape.dim)


# ------------------------------------------------------------------------------------------------ building engines


class _RefusalError(Exception):
    pass


class Builder:
    def __init__(self, logger):
        _require_gpu(logger)
        _note(event="builder")
        self._logger = logger

    def create_network(self, flags=0):
        return INetworkDefinition(flags)

    def create_builder_config(self):
        return IBuilderConfig(self._logger)

    def create_optimization_profile(self):
        return IOptimizationProfile()

    def build_serialized_network(self, network, config):
        try:
            shapes = _input_shapes(network, config)
            layers = _layers(network, config)
            _note(event="build", **_summary(network, config, shapes))
            self._work(config)
            return _plan(network, config, shapes, layers)
        except _RefusalError as refusal:
            self._logger.log(ILogger.Severity.ERROR, f"IBuilder::buildSerializedNetwork: {refusal}")
            return None

    def _work(self, config):
        """Take as long and end as the environment says; a build has eight steps, each of two halves."""
        print("{a library's own words, which look like JSON}", flush=True)
        if _fails("exception"):
            raise RuntimeError("something is wrong inside")
        if _fails("abort"):
            os.abort()
        if _fails("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        if _fails("build"):
            raise _RefusalError("Error Code 10: Internal Error (Could not find any implementation for node Gemm_1.)")
        hog = b"x" * (300 << 20) if _fails("memory") else b""
        seconds = float(os.environ.get("FAKE_TENSORRT_BUILD_S", "60" if hog else "0"))
        monitor = getattr(config, "progress_monitor", None)
        if monitor:
            monitor.phase_start("Building engine", None, 8)
        for step in range(8):
            if monitor:
                monitor.phase_start("Timing layers", "Building engine", 2)
            for half in range(2):
                time.sleep(seconds / 16)
                if monitor:
                    monitor.step_complete("Timing layers", half)
            if monitor:
                monitor.phase_finish("Timing layers")
                monitor.step_complete("Building engine", step)
        if monitor:
            monitor.phase_finish("Building engine")


def _require_gpu(logger):
    if _fails("gpu"):
        logger.log(
            ILogger.Severity.WARNING if _RELEASE < (10, 0) else ILogger.Severity.ERROR,
            "CUDA initialization failure with error: 35",
        )
        raise TypeError("pybind11::init(): factory function returned nullptr")


def _input_shapes(network, config):
    """Minimum, optimum and maximum shape of each input; symbols of the file must get one value each."""
    shapes = {}
    for tensor in network._inputs:
        if -1 not in tensor._shape:
            shapes[tensor.name] = [tensor._shape] * 3
        elif not config._profiles:
            raise _RefusalError(
                "Error Code 4: API Usage Error (Network has dynamic or shape inputs, but no optimization profile has "
                "been defined.)"
            )
        elif tensor.name not in config._profiles[0]._shapes:
            raise _RefusalError(f"Error Code 4: API Usage Error ({tensor.name}: no dimensions in profile 0)")
        else:
            shapes[tensor.name] = config._profiles[0]._shapes[tensor.name]
    for kind in range(3):
        _symbols(network._model, {name: triple[kind] for name, triple in shapes.items()})
    return shapes


def _symbols(model, shapes):
    """The values of a file's symbols for these shapes of its inputs."""
    found = {}
    for value in model.graph.input:
        sizes = value.type.tensor_type.shape.dim
        if len(sizes) != len(shapes[value.name]):
            raise _RefusalError(f"Error Code 4: Internal Error ({value.name}: {len(sizes)} dimensions expected)")
        for size, extent in zip(sizes, shapes[value.name], strict=True):
            expected = found.setdefault(size.dim_param, extent) if size.dim_param else size.dim_value
            if extent != expected:
                raise _RefusalError(f"Error Code 4: Internal Error ({value.name}: dimensions {extent} and {expected})")
    return found


def _layers(network, config):
    """Name, kind and element types of each layer as built; without its consent no layer of float32 stays one."""
    flags = {flag.name for flag in config._flags}
    types = {dtype for layer in network._layers for dtype in layer._in_file}
    if network._strong:
        if "FP16" in flags or any(getattr(layer, "precision", None) for layer in network._layers):
            raise _RefusalError("Error Code 3: API Usage Error (precisions are set on a strongly typed network)")
    elif DataType.HALF in types and "FP16" not in flags:
        raise _RefusalError(
            "Error Code 4: Internal Error (FP16 precision has been set for a layer or layer output, but fp16 is not "
            "configured in the builder)"
        )
    obeyed = "OBEY_PRECISION_CONSTRAINTS" in flags
    built = []
    for layer in network._layers:
        if layer.type == LayerType.CONSTANT:
            continue
        fused = "FP16" in flags and not (obeyed and layer._single())
        names = ["HALF" if fused and dtype == DataType.FLOAT else dtype.name for dtype in layer._in_file]
        kind = {"Conv": "CaskConvolution", "Gemm": "gemm", "MatMul": "gemm"}.get(layer._op, "kgen")
        built.append([layer.name, "Myelin" if _RELEASE < (10, 0) and kind != "CaskConvolution" else kind, names])
    return built


def _summary(network, config, shapes):
    return {
        "network": network._model.graph.name,
        "shapes": shapes,
        "strongly_typed": network._strong,
        "flags": sorted(flag.name for flag in config._flags),
        "limits": config._limits,
        "tactics": config._tactics,
        "preview": sorted(config._preview),
        "level": getattr(config, "builder_optimization_level", None),
        "earlier_builds": len(config._cache._builds) if config._cache else None,
        "rounded": _rounded(network, config),
    }


def _rounded(network, config):
    """Constants in float32 that half precision takes hold of, as nobody asked for more."""
    names = {flag.name for flag in config._flags}
    if network._strong or "FP16" not in names:
        return []
    left_alone = "OBEY_PRECISION_CONSTRAINTS" in names
    return [
        layer.name
        for layer in network._layers
        if layer.type == LayerType.CONSTANT
        and layer._in_file == [DataType.FLOAT]
        and not (left_alone and layer._single())
    ]


_MAGIC = b"ptrt"


def _plan(network, config, shapes, layers):
    """Magic, checksum, header and the ONNX file, in which fixed shapes are fixed."""
    model = onnx.ModelProto()
    model.CopyFrom(network._model)
    fixed = {name for name, (low, _, high) in shapes.items() if tuple(low) == tuple(high)}
    symbols = _symbols(model, {name: high for name, (_, _, high) in shapes.items()})
    known = {s.dim_param for v in model.graph.input if v.name in fixed for s in v.type.tensor_type.shape.dim}
    del model.graph.value_info[:]
    rounded = set(_rounded(network, config))
    for entry in model.graph.initializer:
        if entry.name in rounded:
            values = onnx.numpy_helper.to_array(entry).astype(np.float16).astype(np.float32)
            entry.CopyFrom(onnx.numpy_helper.from_array(values, entry.name))
    for value in (*model.graph.input, *model.graph.output):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param and size.dim_param in known:
                size.dim_value = symbols[size.dim_param]
    if config._cache:
        config._cache._builds.append(model.graph.name)
    gpu, compute = _gpu()
    header = {"version": __version__, "gpu": gpu, "compute": compute, "shapes": shapes, "layers": layers}
    header["detailed"] = config.profiling_verbosity == ProfilingVerbosity.DETAILED
    text = json.dumps(header).encode()
    body = struct.pack("<I", len(text)) + text + model.SerializeToString(deterministic=True)
    return IHostMemory(_MAGIC + hashlib.sha256(body).digest() + body)


# ------------------------------------------------------------------------------------------------- running engines


class Runtime:
    def __init__(self, logger):
        _require_gpu(logger)
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine):
        plan = bytes(serialized_engine)
        body = plan[36:]
        reason = ""
        if plan[:4] != _MAGIC:
            reason = "Serialization assertion magicTagRead == kMAGIC_TAG failed.Magic tag does not match"
        elif hashlib.sha256(body).digest() != plan[4:36]:
            reason = "Serialization assertion sizeRead == checksum failed.Engine is corrupted"
        if not reason:
            (size,) = struct.unpack_from("<I", body)
            header = json.loads(body[4 : 4 + size])
            gpu, compute = _gpu()
            if header["version"] != __version__:
                reason = (
                    f"Serialization assertion stdVersionRead == kSERIALIZATION_VERSION failed.Version tag does not "
                    f"match. Note: Current Version: {__version__}, Serialized Engine Version: {header['version']}"
                )
            elif header["compute"] != compute:
                reason = (
                    f"The engine plan file is generated on an incompatible device, expecting compute {compute} got "
                    f"compute {header['compute']}, please rebuild."
                )
            elif header["gpu"] != gpu:
                self._logger.log(
                    ILogger.Severity.WARNING,
                    "Using an engine plan file across different models of devices is not recommended",
                )
        if reason:
            self._logger.log(ILogger.Severity.ERROR, f"IRuntime::deserializeCudaEngine: Error Code 1: {reason}")
            return None
        return ICudaEngine(header, onnx.load_model_from_string(body[4 + size :]), self._logger)


class ICudaEngine:
    def __init__(self, header, model, logger):
        self._header, self._model, self._logger = header, model, logger
        self._inputs = {value.name: value for value in model.graph.input}
        self._outputs = {value.name: value for value in model.graph.output}
        self._values = {**self._inputs, **self._outputs}

    @property
    def num_io_tensors(self):
        return len(self._values)

    def get_tensor_name(self, index):
        return [*self._values][index]

    def get_tensor_mode(self, name):
        return TensorIOMode.INPUT if name in self._inputs else TensorIOMode.OUTPUT

    def get_tensor_shape(self, name):
        return Dims(_shape(self._values[name]))

    def get_tensor_dtype(self, name):
        return _TYPES[self._values[name].type.tensor_type.elem_type]

    def get_tensor_profile_shape(self, name, profile_index):
        return [Dims(shape) for shape in self._header["shapes"][name]]

    def create_execution_context(self):
        if _fails("context"):
            self._logger.log(ILogger.Severity.ERROR, "Error Code 2: OutOfMemory (requested size was 123456 bytes)")
            return None
        return IExecutionContext(self)

    def create_engine_inspector(self):
        return EngineInspector(self)


class IExecutionContext:
    def __init__(self, engine):
        self._engine, self._addresses, self._session = engine, {}, None
        self._shapes = {name: tuple(engine.get_tensor_shape(name)) for name in engine._inputs}

    def _complain(self, text):
        self._engine._logger.log(ILogger.Severity.ERROR, f"IExecutionContext: Error Code 3: API Usage Error ({text})")
        return False

    def set_input_shape(self, name, shape):
        low, _, high = self._engine._header["shapes"][name]
        if len(shape) != len(low) or any(not a <= s <= b for a, s, b in zip(low, shape, high, strict=True)):
            return self._complain(f"set_input_shape: {tuple(shape)} of {name} is not in the profile")
        self._shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name):
        if name in self._shapes:
            return Dims(self._shapes[name])
        if any(-1 in shape for shape in self._shapes.values()):
            return self._engine.get_tensor_shape(name)
        symbols = _symbols(self._engine._model, self._shapes)
        sizes = self._engine._outputs[name].type.tensor_type.shape.dim
        return Dims(symbols[size.dim_param] if size.dim_param else size.dim_value for size in sizes)

    def set_tensor_address(self, name, memory):
        if name not in self._engine._values:
            return self._complain(f"no tensor {name}")
        self._addresses[name] = int(memory)
        return True

    def execute_async_v3(self, stream_handle):
        engine = self._engine
        if _fails("run"):
            return self._complain("Cuda failure 700: an illegal memory access was encountered")
        if missing := [name for name in engine._values if not self._addresses.get(name)]:
            return self._complain(f"no address for {missing[0]}")
        if any(-1 in shape for shape in self._shapes.values()):
            return self._complain("not all shapes are specified")
        try:
            _symbols(engine._model, self._shapes)
        except _RefusalError as refusal:
            return self._complain(refusal)
        _note(event="run", network=engine._model.graph.name, shapes=self._shapes)
        results = self._run({name: self._read(name) for name in engine._inputs})
        for name, values in zip(engine._outputs, results, strict=True):
            size = values.nbytes // 2 if os.environ.get("FAKE_TENSORRT_UNWRITTEN") == name else values.nbytes
            ctypes.memmove(self._addresses[name], np.ascontiguousarray(values).ctypes.data, size)
        return True

    def _read(self, name):
        dtype = np.dtype(_NUMPY[self._engine.get_tensor_dtype(name).name])
        shape = self._shapes[name]
        size = int(np.prod(shape)) * dtype.itemsize
        return np.frombuffer((ctypes.c_char * size).from_address(self._addresses[name]), dtype).reshape(shape)

    def _run(self, feed):
        import onnxruntime  # not in the process that builds

        if self._session is None:
            options = onnxruntime.SessionOptions()
            options.log_severity_level, options.intra_op_num_threads = 3, 1
            content = self._engine._model.SerializeToString()
            self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        return self._session.run(list(self._engine._outputs), feed)


class EngineInspector:
    def __init__(self, engine):
        self._engine = engine

    def get_engine_information(self, format):
        header = self._engine._header
        layers = [
            {
                "Name": name,
                "LayerType": kind,
                "Outputs": [{"Name": name, "Format/Datatype": _FORMATS[t][_RELEASE >= (10, 0)]} for t in types],
            }
            for name, kind, types in header["layers"]
        ]
        if not header["detailed"]:
            layers = [layer["Name"] for layer in layers]
        return json.dumps({"Layers": layers, "Bindings": [*self._engine._values]})
