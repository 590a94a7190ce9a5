"""Node parameters, declared from the configuration dataclasses: names, defaults, descriptions, ranges."""

from __future__ import annotations

import dataclasses
import difflib
import sys
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from rclpy.node import Node
from rclpy.parameter import Parameter

from dsvt_ros.config import DetectorConfig, flatten, leaves, option, with_overrides
from dsvt_ros.errors import ConfigError


@dataclass(frozen=True)
class InputConfig:
    """What is expected of the clouds."""

    reliability: Literal["best_effort", "reliable"] = option(
        "best_effort",
        help="QoS of the subscription; best_effort hears every publisher, reliable loses no large "
        "cloud on the way but does not hear best-effort publishers",
    )
    intensity_field: str = option("intensity", help="PointCloud2 field that holds the intensity, such as reflectivity")
    transform_timeout_s: float = option(
        0.1,
        help="wait at most this long for the TF of a cloud when preprocess.model_frame is set, s",
        minimum=0.0,
        maximum=10.0,
        live=True,
    )


@dataclass(frozen=True)
class MarkersConfig:
    """Markers for RViz; they are only built while somebody subscribes."""

    enabled: bool = option(True, help="publish ~/output/markers", live=True)
    lifetime_s: float = option(
        0.5,
        help="markers vanish after this time, s; 0: they stay until the next cloud",
        minimum=0.0,
        maximum=3600.0,
        live=True,
    )


@dataclass(frozen=True)
class DiagnosticsConfig:
    """What /diagnostics warns about."""

    period_s: float = option(1.0, help="time between two messages on /diagnostics, s", minimum=0.1, maximum=60.0)
    max_allowed_processing_time_ms: float = option(
        200.0,
        help="warn when the 95th percentile of the processing time exceeds this, ms",
        minimum=0.0,
        live=True,
    )
    max_input_gap_s: float = option(2.0, help="warn when no cloud arrived for this long, s", minimum=0.0, live=True)


@dataclass(frozen=True)
class NodeConfig:
    """What only the node has; everything else is `DetectorConfig`."""

    model: str = option("demo", help="name of an embedded model, or path of a model folder")
    weights: str = option("", help="weights file in place of the model's own: .safetensors or .pth")
    backend: Literal["auto", "torch", "triton", "onnxruntime", "tensorrt"] = option(
        "auto", help="who runs the networks; auto takes the fastest that works here"
    )
    device: str = option("auto", help="auto, cpu, cuda or cuda:N")
    autostart: bool = option(True, help="configure and activate at once; false: wait for a lifecycle manager")
    input: InputConfig = field(default_factory=InputConfig)
    markers: MarkersConfig = field(default_factory=MarkersConfig)
    diagnostics: DiagnosticsConfig = field(default_factory=DiagnosticsConfig)


@dataclass(frozen=True)
class Settings:
    """All parameters of the node."""

    node: NodeConfig
    detector: DetectorConfig

    def changed(self, values: Mapping[str, Any]) -> Settings:
        """A copy with these parameters replaced.

        Raises:
            ConfigError: An unknown name, or a value that is not allowed.
        """
        check_names(values, [*dict(flatten(self.node)), *dict(flatten(self.detector))])
        node_keys = dict(flatten(self.node))
        of_node = {key: value for key, value in values.items() if key in node_keys}
        of_detector = {key: value for key, value in values.items() if key not in node_keys}
        return Settings(
            node=with_overrides(self.node, of_node),
            detector=with_overrides(self.detector, of_detector),
        )


def check_names(names: Iterable[str], known: list[str]) -> None:
    """Raise `ConfigError` for a name that is not known, with the closest one that is."""
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise ConfigError(f"unknown parameter {name}; did you mean {close[0]}? Known: {', '.join(known)}")


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


def node_config_from_overrides(overrides: Mapping[str, Any]) -> NodeConfig:
    """The node's own settings; those of the detector are passed over: they need the model first.

    Raises:
        ConfigError: A value that is not allowed, or a name that belongs to nobody.
    """
    default = NodeConfig()
    own = dict(flatten(default))
    check_names(overrides, [*own, *dict(flatten(DetectorConfig()))])
    return with_overrides(default, {k: v for k, v in overrides.items() if k in own})


def declare(node: Node, settings: Settings) -> None:
    """Declare every parameter with its value, description and range."""
    for config in (settings.node, settings.detector):
        for name, described, value in leaves(config):
            hint = _hint(config, name)
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


def _hint(config: object, key: str) -> Any:
    """The type annotation of a dotted key."""
    *groups, leaf = key.split(".")
    for group in groups:
        config = getattr(config, group)
    return typing.get_type_hints(type(config))[leaf]
