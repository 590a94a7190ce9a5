"""Node parameters, declared from the configuration dataclasses: names, defaults, descriptions, ranges."""

from __future__ import annotations

import dataclasses
import sys
import typing
from collections.abc import Mapping
from typing import Any, Literal

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from rclpy.node import Node
from rclpy.parameter import Parameter

from dsvt_ros.config import leaves
from dsvt_ros.errors import ConfigError
from dsvt_ros.ros.node_config import Settings, type_of_key


def parameter_overrides(node: Node) -> dict[str, Any]:
    """What the user gave on the command line or in a file, less what every node has.

    An empty list arrives as a parameter without a value; it is returned as an empty tuple.
    """
    # rclpy has no public way to ask for overrides that nobody declared.
    overrides: Mapping[str, Parameter[Any]] = node._parameter_overrides
    return {
        name: () if parameter.type_ == Parameter.Type.NOT_SET else parameter.value
        for name, parameter in overrides.items()
        if not node.has_parameter(name) and not name.startswith("qos_overrides.")
    }


def declare(node: Node, settings: Settings) -> None:
    """Declare every parameter with its value, description and range."""
    for config in (settings.node, settings.detector):
        for name, described, value in leaves(config):
            hint = type_of_key(config, name)
            parameter = parameter_from_value(name, hint, value)
            # Declared by type, set and only then made read-only: rclpy takes an empty list for
            # one of bytes.
            writable = descriptor_from_field(described, hint)
            writable.read_only = False
            node.declare_parameter(name, parameter.type_, writable, ignore_override=True)
            (result,) = node.set_parameters([parameter])
            if not result.successful:
                raise ConfigError(f"{name}: {result.reason}")
            descriptor = descriptor_from_field(described, hint)
            descriptor.type = parameter.type_.value
            node.set_descriptor(name, descriptor)


def parameter_from_value(name: str, hint: Any, value: Any) -> Parameter[Any]:
    """A parameter of the type that the annotation asks for, also where the value is empty."""
    if typing.get_origin(hint) is not tuple:
        return Parameter(name, value=value)
    kinds = {
        float: Parameter.Type.DOUBLE_ARRAY,
        int: Parameter.Type.INTEGER_ARRAY,
        str: Parameter.Type.STRING_ARRAY,
        bool: Parameter.Type.BOOL_ARRAY,
    }
    return Parameter(name, kinds[typing.get_args(hint)[0]], list(value))


def descriptor_from_field(described: dataclasses.Field[Any], hint: Any) -> ParameterDescriptor:
    """Description, range and choices of a dataclass field; read-only unless it is live."""
    descriptor = ParameterDescriptor(description=described.metadata["help"], read_only=not described.metadata["live"])
    minimum, maximum = described.metadata["minimum"], described.metadata["maximum"]
    if typing.get_origin(hint) is Literal:
        choices = ", ".join(map(str, typing.get_args(hint)))
        descriptor.additional_constraints = f"one of {choices}"
    elif hint is float and (minimum is not None or maximum is not None):
        descriptor.floating_point_range = [
            FloatingPointRange(
                from_value=-sys.float_info.max if minimum is None else float(minimum),
                to_value=sys.float_info.max if maximum is None else float(maximum),
            )
        ]
    elif hint is int and (minimum is not None or maximum is not None):
        descriptor.integer_range = [
            IntegerRange(
                from_value=-(2**63) if minimum is None else int(minimum),
                to_value=2**63 - 1 if maximum is None else int(maximum),
                step=1,
            )
        ]
    return descriptor
