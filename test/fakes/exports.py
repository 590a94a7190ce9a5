"""Variants of an export, made from its files; exporting anew takes seconds."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
from onnx import helper, numpy_helper

from dsvt_ros.export.onnx_file import single_precision_nodes


def with_capacity(networks, files, capacity):
    """An export with open extents as one with fixed ones."""
    values = {}
    for number, stage in enumerate(capacity.stages):
        values[f"num_voxels_stage_{number}"] = stage.voxels
        values |= {f"num_sets_stage_{number}_shift_{shift}": sets for shift, sets in enumerate(stage.sets)}
    fixed_networks, fixed_files = {}, {}
    for name, network in networks.items():
        model = onnx.load_model_from_string(files[network.file])
        del model.graph.value_info[:]
        for value in (*model.graph.input, *model.graph.output):
            for size in value.type.tensor_type.shape.dim:
                if size.dim_param in values:
                    size.dim_value = values[size.dim_param]
        specs = [
            tuple(dataclasses.replace(spec, shape=tuple(values.get(s, s) for s in spec.shape)) for spec in group)
            for group in (network.inputs, network.outputs)
        ]
        fixed_networks[name] = dataclasses.replace(network, inputs=specs[0], outputs=specs[1])
        fixed_files[network.file] = model.SerializeToString(deterministic=True)
    return fixed_networks, fixed_files


def with_decomposed_norms(networks, files):
    """An export with fused layer norms as one without."""
    networks, files = dict(networks), dict(files)
    for name, network in networks.items():
        model = onnx.load_model_from_string(files[network.file])
        nodes = []
        for node in model.graph.node:
            nodes += _decomposed(node, model.graph) if node.op_type == "LayerNormalization" else [node]
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        content = model.SerializeToString(deterministic=True)
        single = single_precision_nodes(content) if network.single_precision else ()
        networks[name] = dataclasses.replace(network, single_precision=single)
        files[network.file] = content
    return networks, files


def _decomposed(norm, graph):
    attributes = {entry.name: helper.get_attribute_value(entry) for entry in norm.attribute}
    x, scale, shift = norm.input
    name, epsilon = norm.name, f"{norm.name}/epsilon"
    graph.initializer.append(numpy_helper.from_array(np.float32(attributes["epsilon"]), epsilon))

    def node(operator, inputs, output, **options):
        return helper.make_node(operator, inputs, [output], f"{output}/{operator}", **options)

    return [
        node("ReduceMean", [x], f"{name}/mean", axes=[-1], keepdims=1),
        node("Sub", [x, f"{name}/mean"], f"{name}/centered"),
        node("Mul", [f"{name}/centered", f"{name}/centered"], f"{name}/square"),
        node("ReduceMean", [f"{name}/square"], f"{name}/variance", axes=[-1], keepdims=1),
        node("Add", [f"{name}/variance", epsilon], f"{name}/positive"),
        node("Sqrt", [f"{name}/positive"], f"{name}/deviation"),
        node("Div", [f"{name}/centered", f"{name}/deviation"], f"{name}/normal"),
        node("Mul", [f"{name}/normal", scale], f"{name}/scaled"),
        node("Add", [f"{name}/scaled", shift], norm.output[0]),
    ]
