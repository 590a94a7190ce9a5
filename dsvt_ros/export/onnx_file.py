"""From a module to a checked ONNX file."""

from __future__ import annotations

import ast
import importlib
import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dsvt_ros.errors import EngineError
from dsvt_ros.export.networks import TensorSpec

if TYPE_CHECKING:
    import onnx

# The exporter writes none older than 18; `_lower` brings that down to 17, which TensorRT 8.5 and 8.6 read.
EXPORTER_OPSET = 18
OLDEST_OPSET = 17
RELEASE_OPSET = 14

# What an engine builder can lay out beforehand: no scattering, no control flow, no shapes that depend on values.
OPERATORS = {
    *("Add", "Cast", "Clip", "Concat", "Conv", "ConvTranspose", "Div", "Equal", "Erf", "Floor", "Gather", "Gelu"),
    *("Gemm", "LayerNormalization", "MatMul", "MaxPool", "Mul", "Not", "ReduceMax", "ReduceMean", "ReduceSum"),
    *("Relu", "Reshape", "Sigmoid", "Slice", "Softmax", "Split", "Sqrt", "Squeeze", "Sub", "TopK", "Transpose"),
    *("Unsqueeze", "Where"),
}
SCOPES = "pkg.torch.onnx.name_scopes"


def require_exporter() -> None:
    """Check for what exporting needs; run before anything that takes time.

    Raises:
        EngineError: A package is missing or too old.
    """
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if release < (2, 6):
        raise EngineError(f"exporting needs torch 2.6 or later, this is {torch.__version__}")
    for name in ("onnx", "onnxscript"):
        try:
            importlib.import_module(name)
        except ImportError:
            raise EngineError(f"exporting needs the package {name}: pip install onnx onnxscript") from None


def export_onnx(
    network: nn.Module, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], opset: int, name: str
) -> bytes:
    """Export a network in evaluation mode.

    Args:
        network: Takes and gives tensors by position.
        inputs: Their names, types and shapes.
        outputs: Likewise; checked against what comes out.
        opset: Version of the operator set, `OLDEST_OPSET` or later.
        name: Name of the graph.

    Returns:
        The file's content: the same for the same weights and package versions, free of dates and paths.

    Raises:
        EngineError: A package is missing, the export fails, or its result is not what was asked for.
    """
    require_exporter()
    from onnxscript import opset18, optimizer

    def index_select(self: Any, dim: int, index: Any) -> Any:  # the exporter's own casts indices to int64
        return opset18.Gather(self, index, axis=dim)

    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                network,
                tuple(_example(inputs)),
                dynamo=True,
                external_data=False,
                verbose=False,
                opset_version=max(opset, EXPORTER_OPSET),
                input_names=[spec.name for spec in inputs],
                output_names=[spec.name for spec in outputs],
                dynamic_shapes=_dynamic_shapes(network, inputs),
                custom_translation_table={torch.ops.aten.index_select.default: index_select},
            )
            assert program is not None
            # Slices of weights exceed the size that the exporter folds by itself.
            limit = 1 << 28
            optimizer.fold_constants(program.model, input_size_limit=limit, output_size_limit=limit)
            optimizer.remove_unused_nodes(program.model)
            model = program.model_proto
            _tidy(model, name)
            if opset < EXPORTER_OPSET:
                _lower(model)
    except Exception as error:  # the exporter has no common base of its errors
        raise EngineError(f"cannot export the {name} network with torch {torch.__version__}: {error}") from error
    check(model, inputs, outputs, opset)
    unknown = {node.op_type for node in model.graph.node} - OPERATORS
    if unknown:
        raise EngineError(f"the exported {name} network holds {', '.join(sorted(unknown))}, which engines run badly")
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def export_release(network: nn.Module, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> bytes:
    """Export a network for the published deployment, whose tools expect opset 14.

    The exporter of torch.export starts at opset 18, and no converter leads from there below 16 (``ScatterND``); the
    older exporter writes 14 directly.

    Raises:
        EngineError: As `export_onnx`.
    """
    require_exporter()
    import onnx

    dynamic = {
        spec.name: {axis: size for axis, size in enumerate(spec.shape) if isinstance(size, str)}
        for spec in (*inputs, *outputs)
    }
    try:
        with _quiet(), torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "network.onnx"
            torch.onnx.export(
                network,
                tuple(_example(inputs)),
                file,
                dynamo=False,
                opset_version=RELEASE_OPSET,
                input_names=[spec.name for spec in inputs],
                output_names=[spec.name for spec in outputs],
                dynamic_axes=dynamic,
            )
            model = onnx.load(file)
    except Exception as error:
        raise EngineError(f"cannot export with torch {torch.__version__}: {error}") from error
    _tidy(model, "dsvt")
    check(model, inputs, outputs, RELEASE_OPSET)
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def check(model: onnx.ModelProto, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], opset: int) -> None:
    """Check a model with ONNX's own checker and shape inference, and its interface against what was asked for.

    Raises:
        EngineError: Something differs.
    """
    import onnx

    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise EngineError(f"the exported network {model.graph.name} is not valid: {error}") from None
    domains = {entry.domain: entry.version for entry in model.opset_import}
    if domains != {"": opset}:
        raise EngineError(f"the exported network uses operator sets {domains}, expected the standard one, {opset}")
    for kind, values, specs in (("inputs", model.graph.input, inputs), ("outputs", model.graph.output, outputs)):
        found = [_spec_of(value) for value in values]
        if found != list(specs):
            raise EngineError(f"the exported network has {kind} {found}, expected {list(specs)}")


def single_precision_nodes(content: bytes) -> tuple[str, ...]:
    """Names of the nodes of a file that compute real numbers in float32; casts, which compute nothing, are left out."""
    import onnx

    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(content))
    graph = model.graph
    single = {
        value.name
        for value in (*graph.value_info, *graph.output)
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    }
    return tuple(node.name for node in graph.node if node.op_type != "Cast" and single & set(node.output))


def _spec_of(value: onnx.ValueInfoProto) -> TensorSpec:
    import onnx

    tensor = value.type.tensor_type
    shape = tuple(size.dim_param or size.dim_value for size in tensor.shape.dim)
    return TensorSpec(value.name, str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)), shape)


def _example(specs: Sequence[TensorSpec]) -> list[Tensor]:
    """Inputs of the right shapes; extents that stay open get sizes that nothing else has."""
    names = sorted({size for spec in specs for size in spec.shape if isinstance(size, str)})
    return [
        torch.zeros(
            [101 + 2 * names.index(size) if isinstance(size, str) else size for size in spec.shape],
            dtype=getattr(torch, spec.type),
        )
        for spec in specs
    ]


def _dynamic_shapes(network: nn.Module, inputs: Sequence[TensorSpec]) -> tuple[Any, ...] | None:
    names = {size for spec in inputs for size in spec.shape if isinstance(size, str)}
    if not names:
        return None
    sizes = {name: torch.export.Dim(name) for name in names}
    shapes = tuple(
        {axis: sizes[size] for axis, size in enumerate(spec.shape) if isinstance(size, str)} for spec in inputs
    )
    # torch.export wants the structure of the signature: what `*args` takes is one tuple.
    return (*shapes[:1], shapes[1:]) if len(shapes) > 1 else shapes


def _lower(model: onnx.ModelProto) -> None:
    """Bring a model from opset 18 down to 17, in place.

    ONNX's own converter knows no way for Split and leaves ReduceMean invalid. Of `OPERATORS` only three changed:
    ReduceMax and ReduceMean take their axes as an attribute, and Split no number of outputs (nor is it given where
    sizes are).
    """
    from onnx import helper, numpy_helper

    constants = {entry.name: entry for entry in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in ("ReduceMax", "ReduceMean"):
            axes = numpy_helper.to_array(constants[node.input.pop()])
            keep = [entry for entry in node.attribute if entry.name != "noop_with_empty_axes"]
            del node.attribute[:]
            node.attribute.extend([*keep, helper.make_attribute("axes", axes.tolist())])
    used = {name for node in model.graph.node for name in node.input}
    kept = [entry for entry in model.graph.initializer if entry.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    model.opset_import[0].version = OLDEST_OPSET
    model.ir_version = min(model.ir_version, 8)  # the one of that time


def _tidy(model: onnx.ModelProto, name: str) -> None:
    """Name nodes by the module they come from; drop what else the exporter notes, such as paths of source files."""
    model.graph.name = name
    model.doc_string = model.graph.doc_string = ""
    del model.metadata_props[:]
    del model.graph.metadata_props[:]
    used: Counter[str] = Counter()
    for node in model.graph.node:
        scopes = next((entry.value for entry in node.metadata_props if entry.key == SCOPES), None)
        if scopes:
            path = ast.literal_eval(scopes)
            node.name = f"{path[-2] if len(path) > 1 else name}/{node.op_type}"
            used[node.name] += 1
            if used[node.name] > 1:
                node.name += f"_{used[node.name]}"
        node.doc_string = ""
        del node.metadata_props[:]
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer):
        value.doc_string = ""
        del value.metadata_props[:]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's chatter off the terminal; its errors are exceptions."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
