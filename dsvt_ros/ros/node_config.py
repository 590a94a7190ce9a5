"""Settings of the node, free of ROS: what only the node has, and all parameters together."""

from __future__ import annotations

import difflib
import json
import textwrap
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dsvt_ros.backends import Backend
from dsvt_ros.config import DetectorConfig, flatten, leaves, option, with_overrides
from dsvt_ros.errors import ConfigError


@dataclass(frozen=True)
class QosConfig:
    """Quality of service of the subscription; its depth is always 1."""

    reliability: Literal["best_effort", "reliable"] = option(
        "best_effort",
        help="best_effort hears every publisher, reliable loses no large "
        "cloud on the way but does not hear best-effort publishers",
    )


@dataclass(frozen=True)
class InputConfig:
    """What is expected of the clouds."""

    intensity_field: str = option("intensity", help="PointCloud2 field that holds the intensity, such as reflectivity")
    transform_timeout_s: float = option(
        0.1,
        help="wait at most this long for the TF of a cloud when preprocess.model_frame is set, s",
        minimum=0.0,
        maximum=10.0,
        live=True,
    )


@dataclass(frozen=True)
class MotionConfig:
    """Where the sensor's motion is known from, for models of several sweeps and preprocess.motion_compensation."""

    source: Literal["auto", "tf", "odometry", "stationary"] = option(
        "auto",
        help="tf, odometry (~/input/odometry), stationary: the sensor does not move; auto: odometry as soon as any "
        "arrives, tf before",
    )
    fixed_frame: str = option(
        "odom", help="TF frame that does not move and never jumps, so not map, which localization corrects"
    )
    wait_s: float = option(
        0.1,
        help="wait at most this long for the pose of a cloud's newest point, s",
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

    model: str = option("demo", help="name of an embedded model, or path of a model folder or of an OpenPCDet YAML")
    weights: str = option("", help="weights file in place of the model's own: .safetensors or .pth")
    backend: Backend = option("auto", help="who runs the networks; auto takes the fastest that works here")
    device: str = option("auto", help="auto, cpu, cuda or cuda:N")
    autostart: bool = option(True, help="configure and activate at once; false: wait for a lifecycle manager")
    build_only: bool = option(False, help="build the model's TensorRT engines into the cache, then end")
    qos: QosConfig = field(default_factory=QosConfig)
    input: InputConfig = field(default_factory=InputConfig)
    motion: MotionConfig = field(default_factory=MotionConfig)
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


def node_config_from_overrides(overrides: Mapping[str, Any]) -> NodeConfig:
    """The node's own settings; those of the detector are passed over: they need the model first.

    Raises:
        ConfigError: A value that is not allowed, or a name that belongs to nobody.
    """
    default = NodeConfig()
    own = dict(flatten(default))
    check_names(overrides, [*own, *dict(flatten(DetectorConfig()))])
    return with_overrides(default, {k: v for k, v in overrides.items() if k in own})


def type_of_key(config: object, key: str) -> Any:
    """The type annotation of a dotted key."""
    *groups, leaf = key.split(".")
    for group in groups:
        config = getattr(config, group)
    return typing.get_type_hints(type(config))[leaf]


def parameter_file() -> str:
    """The text of ``config/detector.yaml``: every parameter with its default and what it means.

    Those of the detector are commented out, since each model brings its own defaults for them.
    """
    lines = [
        "# All parameters of the node dsvt_detector, with their defaults. Made by: python -m dsvt_ros.ros.node_config",
        "# [live] may be changed while the node runs (ros2 param set), the others only here or with -p.",
        "# Numbers in a list must be of one kind: [0.0, 0.0, 1.7], not [0, 0, 1.7].",
        "/**:",
        "  ros__parameters:",
    ]
    lines += _entries(NodeConfig(), "")
    lines += [
        "",
        "    # What follows has defaults that come with the model (ros2 param dump shows those in force);",
        "    # the values here hold where the model does not say otherwise. Remove the # to set one.",
    ]
    return "\n".join([*lines, *_entries(DetectorConfig(), "#")]) + "\n"


def _entries(config: object, mark: str) -> list[str]:
    lines: list[str] = []
    for name, described, value in leaves(config):
        text = described.metadata["help"] + _limits(config, name, described.metadata)
        text += " [live]" if described.metadata["live"] else ""
        lines += ["", *textwrap.wrap(text, 115, initial_indent="    # ", subsequent_indent="    # ")]
        lines.append(f"    {mark}{name}: {json.dumps(value)}")
    return lines


def _limits(config: object, name: str, metadata: Mapping[str, Any]) -> str:
    hint = type_of_key(config, name)
    if typing.get_origin(hint) is Literal:
        return f" ({', '.join(map(str, typing.get_args(hint)))})"
    minimum, maximum = metadata["minimum"], metadata["maximum"]
    if minimum is None and maximum is None:
        return ""
    if maximum is None:
        return f" (at least {minimum:g})"
    return f" ({minimum:g} to {maximum:g})"


if __name__ == "__main__":
    print(parameter_file(), end="")
