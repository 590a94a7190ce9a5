"""Random streets, crossings, car parks, country roads and squares.

A road has its own frame: u along its axis, v to the left of it. The main road's axis is the x axis
of the world frame. Side +1 is the left one (v > 0), side -1 the right one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from dsvt_ros.training import objects
from dsvt_ros.training.scene import Road, Scene, Terrain, World, scene_from_world
from dsvt_ros.training.shapes import Body

FloatArray = npt.NDArray[np.float64]

KINDS = ("street", "crossing", "avenue", "car_park", "country", "square")


@dataclass(frozen=True)
class SceneConfig:
    """What scenes are made.

    Attributes:
        kinds: Names out of `KINDS` that are drawn from.
        kind_shares: Share of each.
        reach_m: Half length of the roads that are filled.
        density: Factor on the numbers of cars, pedestrians and cyclists.
        turn_share: Share of scenes seen under any heading; in the others the ego vehicle is
            roughly parallel to its road.
    """

    kinds: tuple[str, ...] = KINDS
    kind_shares: tuple[float, ...] = (0.34, 0.22, 0.12, 0.14, 0.08, 0.10)
    reach_m: float = 75.0
    density: float = 1.0
    turn_share: float = 0.3

    def __post_init__(self) -> None:
        """Check that there is one share for each known kind."""
        unknown = sorted(set(self.kinds) - set(KINDS))
        if unknown or len(self.kinds) != len(self.kind_shares):
            raise ValueError(
                f"Expected kinds out of {KINDS} with one share each, got {self.kinds} and {self.kind_shares}."
            )


@dataclass(frozen=True)
class _Side:
    """One side of a road, outwards: parking strip, kerb, pavement, front yard, buildings."""

    parking: str
    parking_depth: float
    pavement: float
    yard: float
    built_share: float
    green_share: float = 0.4


@dataclass(frozen=True)
class _Plan:
    """Cross-section of a road and how busy it is."""

    num_lanes: int
    lane_width: float
    left: _Side
    right: _Side
    kerb_height: float
    traffic_gap: float
    parked_share: float
    pedestrians: float
    cyclists: float
    clutter: float
    trees: float

    @property
    def carriageway(self) -> float:
        """Half width of the lanes."""
        return self.num_lanes * self.lane_width

    def side(self, sign: int) -> _Side:
        """The left side for +1, the right side for -1."""
        return self.left if sign > 0 else self.right

    def kerb(self, sign: int) -> float:
        """Distance of a side's kerb from the axis."""
        return self.carriageway + self.side(sign).parking_depth


class _Builder:
    """Places bodies so that no two footprints overlap."""

    def __init__(self, rng: np.random.Generator, reach_m: float) -> None:
        self.rng = rng
        self.reach_m = reach_m
        self.bodies: list[Body] = []
        self.poses: list[tuple[float, float, float]] = []
        self.speeds: list[float] = []
        self._rectangles = np.zeros((64, 6))
        self._num_rectangles = 0
        self._roads: list[Road] = []

    def add_road(self, road: Road) -> None:
        """Announces a road; bodies that are added beside another road will keep off it."""
        self._roads.append(road)

    def reserve(self, x: float, y: float, yaw: float, length: float, width: float) -> None:
        """Keeps a rectangle free."""
        if self._num_rectangles == len(self._rectangles):
            self._rectangles = np.concatenate([self._rectangles, np.zeros_like(self._rectangles)])
        row = (x, y, np.cos(yaw), np.sin(yaw), length / 2, width / 2)
        self._rectangles[self._num_rectangles] = row
        self._num_rectangles += 1

    def add(
        self,
        body: Body,
        road: Road,
        u: float,
        v: float,
        heading: float,
        *,
        speed: float = 0.0,
        margin: float = 0.15,
        crosses: bool = False,
    ) -> bool:
        """Places a body at (u, v) of a road if there is room.

        Args:
            body: What to place.
            road: Whose frame u, v and heading refer to.
            u: Along the road, metres.
            v: To the left of the road's axis, metres.
            heading: Yaw relative to the road, radians.
            speed: Along the heading, m/s.
            margin: Room kept around the body on each side.
            crosses: Whether the body may stand on the other roads.

        Returns:
            Whether it was placed.
        """
        cos, sin = np.cos(road.yaw), np.sin(road.yaw)
        x, y = road.x + u * cos - v * sin, road.y + u * sin + v * cos
        yaw = road.yaw + heading
        length, width = body.size[0] + 2 * margin, body.size[1] + 2 * margin
        here = np.array([x, y, np.cos(yaw), np.sin(yaw), length / 2, width / 2])
        if self._num_rectangles and bool(rectangles_overlap(here, self._rectangles[: self._num_rectangles]).any()):
            return False
        if not crosses:
            others = [other for other in self._roads if other is not road]
            strips = np.array(
                [(r.x, r.y, np.cos(r.yaw), np.sin(r.yaw), 2 * self.reach_m, r.half_width) for r in others]
            ).reshape(-1, 6)
            if bool(rectangles_overlap(here, strips).any()):
                return False
        # The margin counts once between two bodies.
        self.reserve(x, y, yaw, length - margin, width - margin)
        self.bodies.append(body)
        self.poses.append((float(x), float(y), float(yaw)))
        self.speeds.append(speed)
        return True

    def gaps(self, mean_gap: float) -> Iterator[float]:
        """Random positions along a road whose distances are exponential."""
        u = -self.reach_m + float(self.rng.exponential(mean_gap))
        while u < self.reach_m:
            yield u
            u += float(self.rng.exponential(mean_gap)) + 0.2


def rectangles_overlap(one: FloatArray, many: FloatArray) -> npt.NDArray[np.bool_]:
    """Which of many rectangles overlap one (separating axes).

    Args:
        one: (6,) of [x, y, cos yaw, sin yaw, half length, half width].
        many: (N, 6) of the same.

    Returns:
        (N,) bool; rectangles that only touch do not overlap.
    """
    dx, dy = many[:, 0] - one[0], many[:, 1] - one[1]
    cos, sin = many[:, 2], many[:, 3]
    aligned = np.abs(cos * one[2] + sin * one[3])
    crossed = np.abs(sin * one[2] - cos * one[3])
    length, width = many[:, 4], many[:, 5]
    overlap: npt.NDArray[np.bool_] = (
        (np.abs(dx * one[2] + dy * one[3]) < one[4] + length * aligned + width * crossed)
        & (np.abs(dy * one[2] - dx * one[3]) < one[5] + length * crossed + width * aligned)
        & (np.abs(dx * cos + dy * sin) < length + one[4] * aligned + one[5] * crossed)
        & (np.abs(dy * cos - dx * sin) < width + one[4] * crossed + one[5] * aligned)
    )
    return overlap


def make_scene(rng: np.random.Generator, config: SceneConfig | None = None) -> Scene:
    """Makes a random scene as seen from a random ego pose."""
    world, ego_pose = make_world(rng, config or SceneConfig())
    return scene_from_world(world, ego_pose)


def make_world(rng: np.random.Generator, config: SceneConfig) -> tuple[World, tuple[float, float, float]]:
    """Makes a random world and an ego pose on its main road.

    Returns:
        The world and x, y, yaw of the ego vehicle in the world frame; the ego vehicle itself is
        not part of the world, but its place is kept free.
    """
    shares = np.asarray(config.kind_shares)
    kind = str(rng.choice(config.kinds, p=shares / shares.sum()))
    plan = _draw_plan(rng, kind, config.density)
    builder = _Builder(rng, config.reach_m)
    main = Road(0.0, 0.0, 0.0, max(plan.kerb(1), plan.kerb(-1)))
    # Roads are symmetric strips: the narrower side's pavement starts at the wider side's kerb.
    plan = _with_equal_kerbs(plan, main.half_width)
    builder.add_road(main)
    roads = [(main, plan)]
    if kind == "crossing" or (kind in ("street", "avenue") and rng.random() < 0.25):
        roads.append(_draw_crossing(rng, config.density, plan.kerb_height))
        builder.add_road(roads[1][0])

    lane = int(rng.integers(plan.num_lanes))
    ego_v = -(lane + 0.5) * plan.lane_width + float(rng.normal(0.0, 0.25))
    ego_yaw = float(rng.normal(0.0, np.radians(2.5)))
    if rng.random() < config.turn_share:
        ego_yaw = float(rng.uniform(-np.pi, np.pi))
    builder.reserve(0.0, ego_v, ego_yaw, 5.4, 2.6)

    for road, road_plan in roads:
        _fill_lanes(builder, road, road_plan)
        for sign in (-1, 1):
            _fill_parking(builder, road, road_plan, sign)
    if kind == "car_park":
        _fill_car_park(builder, main, plan)
    for road, road_plan in roads:
        _add_pedestrians(builder, road, road_plan)
        _add_cyclists(builder, road, road_plan)
    for road, road_plan in roads:
        for sign in (-1, 1):
            _fill_pavement(builder, road, road_plan, sign)
            _fill_yard(builder, road, road_plan, sign)
    terrain = _draw_terrain(rng, [road for road, _ in roads], plan.kerb_height)
    world = World(terrain, builder.bodies, np.array(builder.poses), np.array(builder.speeds))
    world.poses = world.poses.reshape(-1, 3)
    return world, (0.0, ego_v, ego_yaw)


def _draw_side(rng: np.random.Generator, kind: str) -> _Side:
    if kind == "country":
        return _Side("none", 0.0, float(rng.uniform(0.5, 2.0)), float(rng.uniform(2, 25)), 0.12, 0.8)
    if kind == "car_park":
        return _Side("perpendicular", 5.2, 1.0, float(rng.uniform(20.0, 30.0)), 0.4)
    if kind == "square":
        return _Side("none", 0.0, float(rng.uniform(4, 15)), float(rng.uniform(0, 5)), 0.7)
    if kind == "avenue":
        parking = str(rng.choice(["none", "parallel"], p=[0.6, 0.4]))
        yard = float(rng.uniform(2.0, 20.0))
        pavement = float(rng.uniform(2.0, 7.0))
    else:
        choices = ["none", "parallel", "perpendicular", "slanted"]
        parking = str(rng.choice(choices, p=[0.28, 0.52, 0.12, 0.08]))
        yard = float(rng.choice([0.0, rng.uniform(0.5, 10.0)], p=[0.35, 0.65]))
        pavement = float(rng.uniform(1.5, 5.0))
    depth = {"none": 0.0, "parallel": 2.3, "perpendicular": 5.3, "slanted": 4.9}[parking]
    return _Side(parking, depth, pavement, yard, float(rng.uniform(0.3, 1.0)))


def _draw_plan(rng: np.random.Generator, kind: str, density: float) -> _Plan:
    """Draws a cross-section; busyness is log-normal, so that some scenes are all but empty."""

    def busy(spread: float = 0.7) -> float:
        return float(density * np.exp(rng.normal(-0.5 * spread**2, spread)))

    left, right = _draw_side(rng, kind), _draw_side(rng, kind)
    num_lanes = int(rng.integers(2, 4)) if kind == "avenue" else 1 + (rng.random() < 0.25)
    # Means for the whole stretch of road: metres between cars, then numbers of bodies.
    gap, pedestrians, cyclists, clutter, trees = {
        "street": (55.0, 15.0, 8.0, 40.0, 14.0),
        "crossing": (55.0, 12.0, 6.0, 30.0, 10.0),
        "avenue": (48.0, 9.0, 6.0, 34.0, 18.0),
        "car_park": (80.0, 12.0, 4.0, 24.0, 12.0),
        "country": (70.0, 1.5, 3.0, 30.0, 50.0),
        "square": (120.0, 28.0, 12.0, 40.0, 14.0),
    }[kind]
    return _Plan(
        num_lanes=num_lanes,
        lane_width=float(rng.uniform(2.8, 3.7)),
        left=left,
        right=right,
        kerb_height=0.0 if kind in ("country", "car_park") else float(rng.choice([0.0, 0.06, 0.12, 0.16])),
        traffic_gap=gap / max(busy(), 0.05),
        parked_share=float(np.clip(rng.beta(0.9, 1.7) * density, 0.0, 1.0)),
        pedestrians=pedestrians * busy(0.9),
        cyclists=cyclists * busy(0.9),
        clutter=clutter * busy(0.6) / density,
        trees=trees * busy(0.8) / density,
    )


def _with_equal_kerbs(plan: _Plan, kerb: float) -> _Plan:
    depth = kerb - plan.carriageway
    return replace(
        plan,
        left=replace(plan.left, parking_depth=depth),
        right=replace(plan.right, parking_depth=depth),
    )


def _draw_crossing(rng: np.random.Generator, density: float, kerb_height: float) -> tuple[Road, _Plan]:
    plan = _draw_plan(rng, "crossing", density)
    plan = replace(
        plan,
        kerb_height=kerb_height,
        pedestrians=0.6 * plan.pedestrians,
        cyclists=0.6 * plan.cyclists,
    )
    kerb = max(plan.kerb(1), plan.kerb(-1))
    yaw = float(rng.choice([-1.0, 1.0])) * np.pi / 2 + float(rng.normal(0.0, np.radians(12.0)))
    road = Road(float(rng.uniform(-25.0, 40.0)), 0.0, float(yaw), kerb)
    return road, _with_equal_kerbs(plan, kerb)


def _draw_terrain(rng: np.random.Generator, roads: list[Road], kerb_height: float) -> Terrain:
    """Long waves and a slope; together up to about 1 m within 50 m."""
    scale = float(rng.choice([0.15, 0.5, 1.0], p=[0.4, 0.4, 0.2]))
    num_waves = 4
    length = rng.uniform(30.0, 140.0, num_waves)
    direction = rng.uniform(0.0, 2 * np.pi, num_waves)
    waves = np.stack(
        [
            2 * np.pi / length * np.cos(direction),
            2 * np.pi / length * np.sin(direction),
            rng.uniform(0.0, 2 * np.pi, num_waves),
            scale * 0.0022 * length * rng.normal(0.0, 1.0, num_waves),
        ],
        axis=1,
    )
    # Short, shallow bumps roughen the far ground, which beams only graze.
    short = rng.uniform(2.0, 12.0, 2)
    direction = rng.uniform(0.0, 2 * np.pi, 2)
    bumps = np.stack(
        [
            2 * np.pi / short * np.cos(direction),
            2 * np.pi / short * np.sin(direction),
            rng.uniform(0.0, 2 * np.pi, 2),
            rng.uniform(0.0, 0.012, 2),
        ],
        axis=1,
    )
    strips = [(road.x, road.y, np.cos(road.yaw), np.sin(road.yaw), road.half_width) for road in roads]
    return Terrain(
        slope=scale * rng.normal(0.0, 0.01, 2),
        waves=np.concatenate([waves, bumps]),
        roads=np.array(strips, dtype=np.float64).reshape(-1, 5),
        kerb_height=kerb_height,
    )


def _fill_lanes(builder: _Builder, road: Road, plan: _Plan) -> None:
    """Moving and queueing traffic, with a few lorries and buses among it."""
    rng = builder.rng
    for lane in range(plan.num_lanes):
        for sign in (-1, 1):
            v_lane = sign * (lane + 0.5) * plan.lane_width
            heading = 0.0 if sign < 0 else np.pi
            cruise = float(rng.uniform(4.0, 14.0)) * (rng.random() < 0.75)
            headway = 6.5 if cruise < 1.0 else 9.0
            u = -builder.reach_m + float(rng.exponential(plan.traffic_gap))
            while u < builder.reach_m:
                kind = rng.random()
                make = objects.make_car
                if kind > 0.93:
                    make = objects.make_truck if kind < 0.97 else objects.make_bus
                body = make(rng)
                turn = float(rng.normal(0.0, np.radians(2.0)))
                if rng.random() < 0.04:
                    turn = float(rng.normal(0.0, np.radians(25.0)))
                v = v_lane + float(rng.normal(0.0, 0.2))
                builder.add(body, road, u, v, heading + turn, speed=cruise, crosses=True)
                u += max(headway, body.size[0] + 3.0) + float(rng.exponential(plan.traffic_gap))


def _fill_parking(builder: _Builder, road: Road, plan: _Plan, sign: int) -> None:
    """A row of parked cars between the lanes and the kerb."""
    side = plan.side(sign)
    if side.parking == "none":
        return
    _fill_row(
        builder,
        road,
        side.parking,
        sign * (plan.kerb(sign) - 0.5 * _DEPTHS[side.parking]),
        sign,
        plan.parked_share,
    )


_DEPTHS = {"parallel": 2.2, "perpendicular": 5.2, "slanted": 4.9}


def _fill_row(builder: _Builder, road: Road, parking: str, v: float, sign: int, share: float) -> None:
    """Parked cars side by side, nose to tail or slanted, at a distance v from the axis."""
    rng = builder.rng
    pitch, turn = {
        "parallel": (6.0, 0.0),
        "perpendicular": (2.6, np.pi / 2),
        "slanted": (3.3, np.radians(55.0)),
    }[parking]
    # Free stretches are driveways and crossings: occupancy varies along the row.
    phase, wave = rng.uniform(0.0, 2 * np.pi), rng.uniform(10.0, 40.0)
    # Cars side by side fill a street much faster than nose to tail: keep such rows short.
    stretch = 2 * builder.reach_m if parking == "parallel" else min(float(rng.uniform(15.0, 75.0)), builder.reach_m)
    start = float(rng.uniform(-builder.reach_m, builder.reach_m - stretch))
    for slot in np.arange(start, start + stretch, pitch):
        local = share * (0.8 + 0.6 * np.sin(2 * np.pi * slot / wave + phase))
        if rng.random() > local:
            continue
        body = objects.make_car(rng) if rng.random() < 0.97 else objects.make_trailer(rng)
        backwards = np.pi * (rng.random() < (0.08 if parking == "parallel" else 0.45))
        along = 0.0 if sign < 0 else np.pi
        heading = along + turn + backwards + float(rng.normal(0.0, 0.035))
        u = float(slot) + float(rng.normal(0.0, 0.15 if parking != "parallel" else 0.35))
        builder.add(body, road, u, v + float(rng.normal(0.0, 0.12)), heading, margin=0.1)


def _fill_car_park(builder: _Builder, road: Road, plan: _Plan) -> None:
    """More rows of parked cars behind those along the aisle."""
    rng = builder.rng
    for sign in (-1, 1):
        v = plan.kerb(sign) + 0.6
        for _ in range(int(rng.integers(0, 3))):
            parking = str(rng.choice(["perpendicular", "slanted"], p=[0.8, 0.2]))
            share = float(np.clip(plan.parked_share * rng.uniform(0.2, 1.2), 0.0, 1.0))
            _fill_row(builder, road, parking, sign * (v + 2.6), sign, share)
            v += 5.4 if rng.random() < 0.5 else 11.4


def _draw_v(rng: np.random.Generator, plan: _Plan, sign: int) -> float:
    """A place on one side's pavement."""
    kerb, side = plan.kerb(sign), plan.side(sign)
    return sign * (kerb + float(rng.uniform(0.3, max(0.6, side.pavement - 0.3))))


def _draw_u(builder: _Builder) -> float:
    """A place along the road, denser near the ego vehicle, where labels count."""
    rng = builder.rng
    spread = 0.35 * builder.reach_m
    u = rng.normal(0.0, spread) if rng.random() < 0.5 else rng.uniform(-1, 1) * builder.reach_m
    return float(np.clip(u, -builder.reach_m, builder.reach_m))


def _add_pedestrians(builder: _Builder, road: Road, plan: _Plan) -> None:
    """Singles and groups: walking along the pavement, crossing the road, standing about."""
    rng = builder.rng
    remaining = int(rng.poisson(plan.pedestrians))
    while remaining > 0:
        size = min(remaining, int(rng.choice([1, 2, 3, 4, 5], p=[0.6, 0.22, 0.1, 0.05, 0.03])))
        remaining -= size
        u, sign = _draw_u(builder), int(rng.choice([-1, 1]))
        activity = rng.random()
        heading = float(rng.choice([0.0, np.pi])) + float(rng.normal(0.0, 0.15))
        v, speed = _draw_v(rng, plan, sign), float(rng.uniform(0.8, 1.7))
        if activity < 0.18:
            v, heading = float(rng.uniform(-1, 1)) * plan.kerb(sign), heading + np.pi / 2
        elif activity < 0.4:
            heading, speed = float(rng.uniform(-np.pi, np.pi)), 0.0
        for _ in range(size):
            own = heading if speed else float(rng.uniform(-np.pi, np.pi))
            du, dv = (float(d) for d in rng.normal(0.0, 0.55, 2)) if size > 1 else (0.0, 0.0)
            builder.add(
                objects.make_pedestrian(rng),
                road,
                u + du,
                v + dv,
                own + float(rng.normal(0, 0.1)),
                speed=speed,
                margin=0.04,
                crosses=True,
            )


def _add_cyclists(builder: _Builder, road: Road, plan: _Plan) -> None:
    """Riders at the edge of the lanes, some on the pavement or turning."""
    rng = builder.rng
    for _ in range(int(rng.poisson(plan.cyclists))):
        u, sign = _draw_u(builder), int(rng.choice([-1, 1]))
        v = sign * (plan.carriageway - float(rng.uniform(0.3, 1.2)))
        heading = 0.0 if sign < 0 else np.pi
        if rng.random() < 0.3:
            v = _draw_v(rng, plan, sign)
            heading += float(rng.choice([0.0, np.pi]))
        if rng.random() < 0.15:
            heading = float(rng.uniform(-np.pi, np.pi))
        heading += float(rng.normal(0.0, 0.08))
        body, speed = objects.make_cyclist(rng), float(rng.uniform(2.0, 6.0))
        builder.add(body, road, u, v, heading, speed=speed, margin=0.08, crosses=True)


def _fill_pavement(builder: _Builder, road: Road, plan: _Plan, sign: int) -> None:
    """Trees and clutter along the kerb and along the walls."""
    rng = builder.rng
    makers = [make for make, _ in objects.CLUTTER]
    shares = np.array([share for _, share in objects.CLUTTER])
    kerb, side = plan.kerb(sign), plan.side(sign)
    depth = side.pavement + min(side.yard, 6.0)
    for u in builder.gaps(4 * builder.reach_m / max(plan.clutter, 0.5)):
        body = makers[int(rng.choice(len(makers), p=shares / shares.sum()))](rng)
        at_kerb = rng.random() < 0.5
        away = float(rng.uniform(0.3, 0.9) if at_kerb else rng.uniform(0.3, depth))
        heading = float(rng.choice([0.0, np.pi / 2, np.pi, -np.pi / 2])) + float(rng.normal(0.0, 0.1))
        v = sign * (kerb + away + 0.5 * min(body.size[0], body.size[1]))
        builder.add(body, road, u, v, heading, margin=0.05)
    for u in builder.gaps(4 * builder.reach_m / max(plan.trees, 0.5)):
        away = float(rng.uniform(0.7, max(1.0, depth)))
        builder.add(objects.make_tree(rng), road, u, sign * (kerb + away), 0.0)


def _fill_yard(builder: _Builder, road: Road, plan: _Plan, sign: int) -> None:
    """Fences, cars in drives, and the row of buildings behind them."""
    rng = builder.rng
    side = plan.side(sign)
    edge = plan.kerb(sign) + side.pavement
    if side.yard > 2.5:
        for u in builder.gaps(60.0):
            if side.yard > 6.0:
                heading = float(rng.choice([1.0, -1.0])) * np.pi / 2 + float(rng.normal(0.0, 0.1))
                builder.add(objects.make_car(rng), road, u, sign * (edge + 3.2), heading)
        if rng.random() < 0.6:
            for u in np.arange(-builder.reach_m, builder.reach_m, 9.0):
                if rng.random() < 0.7:
                    fence = objects.make_fence(rng, float(rng.uniform(4.0, 8.5)))
                    builder.add(fence, road, float(u), sign * (edge + 0.4), 0.0, margin=0.02)
    u = -builder.reach_m + float(rng.uniform(0.0, 10.0))
    while u < builder.reach_m:
        length, depth = float(rng.uniform(5.0, 26.0)), float(rng.uniform(5.0, 14.0))
        if rng.random() < side.built_share:
            house = objects.make_building(rng, length, depth)
            setback = edge + side.yard + float(rng.choice([0.0, rng.uniform(0.0, 1.5)]))
            v = sign * (setback + house.size[1] / 2)
            # A building that would cut into a tree or a side road is shortened once.
            if not builder.add(house, road, u + length / 2, v, 0.0 if sign > 0 else np.pi, margin=0.02):
                house = objects.make_building(rng, 4.0, 6.0)
                v = sign * (setback + house.size[1] / 2)
                builder.add(house, road, u + 2.0, v, 0.0 if sign > 0 else np.pi, margin=0.02)
        u += length + float(rng.choice([0.05, rng.uniform(0.5, 8.0)], p=[0.5, 0.5]))
    if rng.random() < side.green_share:
        _add_greenery(builder, road, sign * (edge + 0.5), sign * max(side.yard - 1.0, 2.0))
    for u in builder.gaps(12.0):
        beyond = edge + side.yard + float(rng.uniform(2.0, 25.0))
        make = objects.make_tree if rng.random() < 0.5 else objects.make_thicket
        builder.add(make(rng), road, u, sign * beyond, 0.0)


def _add_greenery(builder: _Builder, road: Road, v: float, depth: float) -> None:
    """A belt of bushes, hedges and trees from v outwards: the ragged edge of many real streets."""
    rng = builder.rng
    start = float(rng.uniform(-1.0, 0.3)) * builder.reach_m
    stretch = float(rng.uniform(15.0, 80.0))
    makers = (objects.make_thicket, objects.make_bush, objects.make_tree, objects.make_hedge)
    for u in builder.gaps(float(rng.uniform(0.6, 3.0))):
        if not start < u < start + stretch:
            continue
        make = makers[int(rng.choice(len(makers), p=(0.5, 0.25, 0.15, 0.1)))]
        away = v + depth * float(rng.beta(1.0, 1.6))
        # Plants grow into each other.
        builder.add(make(rng), road, u, away, float(rng.normal(0.0, 0.3)), margin=-0.2)
