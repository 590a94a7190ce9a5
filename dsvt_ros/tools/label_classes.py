"""Which labels of a data set the classes of a model stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dsvt_ros.config import ModelConfig
from dsvt_ros.errors import ModelError
from dsvt_ros.io.nuscenes_results import ALIASES, DETECTION_NAMES


@dataclass(frozen=True)
class LabelClasses:
    """The classes of a data set's labels.

    Attributes:
        aliases: Names that models have for them, in lower case, to their own names.
        groups: Names that look alike. Where a model does not tell two of them apart, objects of the one need not be
            found, and a box of the other's class on them is no false alarm: a truck found as a car.
    """

    aliases: Mapping[str, str]
    groups: tuple[frozenset[str], ...]

    def label_of(self, class_name: str) -> str | None:
        """The label that a model's class stands for; None if the data set has none."""
        return self.aliases.get(class_name.lower())

    def evaluated(self, model: ModelConfig) -> list[str]:
        """Labels that a model's classes stand for, in the order of its classes.

        Raises:
            ModelError: There are none.
        """
        labels = list(dict.fromkeys(filter(None, map(self.label_of, model.class_names))))
        if not labels:
            raise ModelError(
                f"model {model.name} has the classes {', '.join(model.class_names)}; "
                f"expected one of {', '.join(self.aliases)}"
            )
        return labels

    def ignored(self, label: str, evaluated: Sequence[str]) -> frozenset[str]:
        """Labels whose objects do not count for `label`: those that look alike and have no class of their own."""
        alike = frozenset[str]().union(*(group for group in self.groups if label in group))
        return alike - set(evaluated)


# Objects with the label `ignore` belong to no class of the detection task (a stroller, say).
NUSCENES = LabelClasses(
    aliases={name: name for name in DETECTION_NAMES} | ALIASES,
    groups=(
        frozenset({"car", "truck", "bus", "trailer", "construction_vehicle", "ignore"}),
        frozenset({"bicycle", "motorcycle", "ignore"}),
        frozenset({"pedestrian", "ignore"}),
    ),
)

_ARGOVERSE2_VEHICLES = (
    "REGULAR_VEHICLE",
    "LARGE_VEHICLE",
    "BOX_TRUCK",
    "TRUCK",
    "TRUCK_CAB",
    "BUS",
    "SCHOOL_BUS",
    "ARTICULATED_BUS",
    "RAILED_VEHICLE",
    "VEHICULAR_TRAILER",
    "MESSAGE_BOARD_TRAILER",
    "TRAFFIC_LIGHT_TRAILER",
)
# A rider and what is ridden have a box each.
_ARGOVERSE2_CYCLES = ("BICYCLIST", "BICYCLE", "MOTORCYCLIST", "MOTORCYCLE", "WHEELED_RIDER", "WHEELED_DEVICE")
_ARGOVERSE2_PEOPLE = ("PEDESTRIAN", "OFFICIAL_SIGNALER", "STROLLER", "WHEELCHAIR")

ARGOVERSE2 = LabelClasses(
    aliases={name.lower(): name for name in (*_ARGOVERSE2_VEHICLES, *_ARGOVERSE2_CYCLES, *_ARGOVERSE2_PEOPLE)}
    | {"car": "REGULAR_VEHICLE", "vehicle": "REGULAR_VEHICLE", "cyclist": "BICYCLIST", "trailer": "VEHICULAR_TRAILER"},
    groups=(frozenset(_ARGOVERSE2_VEHICLES), frozenset(_ARGOVERSE2_CYCLES), frozenset(_ARGOVERSE2_PEOPLE)),
)
