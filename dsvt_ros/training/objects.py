"""Parametric cars, pedestrians and cyclists, and the things that are none of them.

Each builder returns a `Body`: heading along +x, standing on z = 0, metres. Sizes are drawn around
those of real European, American and Asian traffic.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dsvt_ros.training.shapes import Body, Material, PartList

CAR, PEDESTRIAN, CYCLIST, UNLABELLED = 0, 1, 2, -1
"""Labels, in the class order of the embedded model."""

CLASS_NAMES = ("car", "pedestrian", "cyclist")

TYRE = Material(0.06, absorption=0.15)
CHROME = Material(0.5, absorption=0.2)
PLATE = Material(2.5)
WOOD = Material(0.35, depth_m=0.01)
SKIN = Material(0.45)
SPOKES = Material(0.2, transparency=0.7)


def _paint(rng: np.random.Generator) -> Material:
    """Car paint: dark paint swallows or mirrors away much of the light."""
    reflectance = float(rng.choice([0.06, 0.12, 0.3, 0.5, 0.75])) * float(rng.uniform(0.7, 1.3))
    return Material(reflectance, absorption=float(rng.uniform(0.0, 0.3)) * (reflectance < 0.15))


def _glass(rng: np.random.Generator) -> Material:
    """Car windows: most rays pass or are mirrored away, dirt and tint give some back."""
    return Material(0.12, transparency=float(rng.uniform(0.3, 0.8)), absorption=float(rng.uniform(0.6, 0.97)))


def _cloth(rng: np.random.Generator) -> Material:
    return Material(float(rng.uniform(0.1, 0.7)), depth_m=0.008)


_CAR_KINDS = ("hatchback", "sedan", "estate", "suv", "van", "pickup")
_CAR_KIND_SHARES = (0.34, 0.2, 0.12, 0.2, 0.11, 0.03)
_CAR_SIZES_M = {
    "hatchback": ((3.4, 4.35), (1.57, 1.82), (1.40, 1.60)),
    "sedan": ((4.1, 5.05), (1.66, 1.92), (1.36, 1.50)),
    "estate": ((4.1, 4.9), (1.66, 1.9), (1.42, 1.56)),
    "suv": ((3.9, 5.1), (1.70, 2.05), (1.55, 1.90)),
    "van": ((4.0, 5.3), (1.68, 2.05), (1.68, 2.00)),
    "pickup": ((4.9, 5.3), (1.78, 2.05), (1.68, 1.92)),
}


def make_car(rng: np.random.Generator) -> Body:
    r"""Makes a hatchback, sedan, estate, SUV, van or pickup of at most 5.3 m.

    ::

         rear_top ____________ screen_top          height
                / |  |       \ \
         rear _/__|__|________\_\ screen           belt
             |                     ---___ nose      bonnet
             |__   ________________   ___|          clearance
                (_)                (_)
    """
    kind = str(rng.choice(_CAR_KINDS, p=_CAR_KIND_SHARES))
    length, width, height = (float(rng.uniform(*span)) for span in _CAR_SIZES_M[kind])
    is_tall = kind in ("suv", "pickup", "van")
    paint, glass = _paint(rng), _glass(rng)
    half, side = length / 2, width / 2

    clearance = float(rng.uniform(0.18, 0.28) if is_tall else rng.uniform(0.1, 0.2))
    belt = height * float(rng.uniform(0.58, 0.66))
    bonnet = belt - float(rng.uniform(0.1, 0.32))
    nose_length = length * float(rng.uniform(0.1, 0.2) if kind == "van" else rng.uniform(0.22, 0.3))
    screen = half - nose_length
    rise = height - belt
    screen_angle = np.radians(rng.uniform(36.0, 58.0) if is_tall else rng.uniform(26.0, 38.0))
    screen_top = screen - rise / float(np.tan(screen_angle))
    boot_length, rear_angle_deg = {
        "hatchback": (rng.uniform(0.02, 0.2), rng.uniform(42.0, 75.0)),
        "sedan": (rng.uniform(0.35, 0.75), rng.uniform(24.0, 40.0)),
        "estate": (rng.uniform(0.02, 0.1), rng.uniform(48.0, 78.0)),
        "suv": (rng.uniform(0.02, 0.15), rng.uniform(55.0, 82.0)),
        "van": (rng.uniform(0.0, 0.06), rng.uniform(76.0, 88.0)),
        "pickup": (rng.uniform(1.4, 1.7), rng.uniform(75.0, 88.0)),
    }[kind]
    rear = -half + float(boot_length)
    rear_top = min(rear + rise / float(np.tan(np.radians(rear_angle_deg))), screen_top - 0.5)
    belt_side = side - float(rng.uniform(0.02, 0.07))
    roof_side = belt_side - rise * float(rng.uniform(0.2, 0.42))

    parts = PartList()
    cut = (float(rng.uniform(0.12, 0.32)), float(rng.uniform(0.06, 0.22)))
    tuck = float(rng.uniform(0.02, 0.12))
    sill = (-half + tuck, half - tuck, side - 0.05)
    waist = (-half, half, side)
    parts.frustum(paint, (clearance, clearance + 0.3), sill, waist, cut=cut)
    deck = (-half + 0.03, screen + 0.12, belt_side)
    shoulder = (-half, half - 0.02, side - 0.005)
    parts.frustum(paint, (clearance + 0.3, bonnet), waist, shoulder, cut=cut)
    if kind == "pickup":
        _add_pickup_bed(parts, paint, half, belt_side, bonnet, belt, rear)
        deck = (rear, screen + 0.12, belt_side)
        shoulder = (rear, half - 0.02, side - 0.005)
    parts.frustum(paint, (bonnet, belt), shoulder, deck, cut=(cut[0], cut[1]))
    base = (rear, screen, belt_side - 0.01)
    crown = (rear_top, screen_top, roof_side)
    is_panel_van = kind == "van" and rng.random() < 0.5
    _add_cabin(parts, rng, paint, glass, (belt, height), base, crown, is_panel_van)
    _add_wheels(parts, rng, half, side, is_tall)
    _add_trim(parts, rng, paint, half, side, belt, screen)
    return parts.body(CAR, (length, width, height))


def _add_pickup_bed(
    parts: PartList,
    paint: Material,
    half: float,
    side: float,
    bonnet: float,
    belt: float,
    rear: float,
) -> None:
    """Three low walls around an open bed between the tailgate and the cabin."""
    middle, depth, tall = (rear - half) / 2, rear + half, belt - bonnet
    z = (bonnet + belt) / 2
    parts.box(paint, (-half + 0.05, 0.0, z), (0.08, 2 * side, tall))
    for sign in (-1.0, 1.0):
        parts.box(paint, (middle, sign * (side - 0.05), z), (depth, 0.08, tall))


def _add_cabin(
    parts: PartList,
    rng: np.random.Generator,
    paint: Material,
    glass: Material,
    z: tuple[float, float],
    base: tuple[float, float, float],
    crown: tuple[float, float, float],
    is_panel_van: bool,
) -> None:
    """Glass house with roof, pillars, seats and sometimes a driver."""
    belt, height = z
    parts.frustum(glass, (belt, height - 0.06), base, crown)
    # A flat sheet alone would be missed by beams that graze it: real roofs are domed.
    eave = (crown[0] - 0.03, crown[1] + 0.05, crown[2] + 0.02)
    ridge = (crown[0] + 0.03, crown[1] - 0.03, crown[2] - 0.04)
    parts.frustum(paint, (height - 0.1, height - 0.04), eave, ridge)
    middle = ((crown[0] + crown[1]) / 2, 0.0, height - 0.1)
    parts.ellipsoid(paint, middle, (0.52 * (crown[1] - crown[0]), 0.95 * crown[2], 0.1))

    def slab(material: Material, where: float, thickness: float, top: float) -> None:
        """A cross-section of the cabin, slightly proud of the glass."""
        share = (top - belt) / (height - belt)
        half_width = base[2] + 0.01 + share * (crown[2] - base[2])
        rectangle = (where - thickness / 2, where + thickness / 2, half_width)
        parts.frustum(material, (belt, top), (rectangle[0], rectangle[1], base[2] + 0.01), rectangle)

    if is_panel_van:
        # Everything behind the front doors is sheet metal.
        split = crown[1] - 0.5
        bottom = (base[0] - 0.01, split, base[2] + 0.01)
        parts.frustum(paint, (belt, height - 0.05), bottom, (crown[0] - 0.01, split, crown[2] + 0.01))
    else:
        see_through = Material(paint.reflectance, transparency=float(rng.uniform(0.2, 0.6)))
        door = 0.5 * (crown[0] + crown[1]) + float(rng.uniform(-0.1, 0.25))
        slab(see_through, door, float(rng.uniform(0.08, 0.16)), height - 0.05)
        quarter = max(crown[0] + 0.08, base[0] + 0.12)
        slab(see_through, quarter, float(rng.uniform(0.1, 0.35)), height - 0.05)
        # Window frames along the rear edge.
        for sign in (-1.0, 1.0):
            parts.limb(
                paint,
                (base[0] + 0.03, sign * base[2], belt),
                (crown[0], sign * crown[2], height - 0.07),
                0.05,
            )
    for sign in (-1.0, 1.0):
        parts.limb(
            paint,
            (base[1] - 0.03, sign * base[2], belt),
            (crown[1], sign * crown[2], height - 0.07),
            0.045,
        )
        seat_x = crown[1] - 0.45
        cover = Material(0.2, depth_m=0.01)
        parts.box(cover, (seat_x, sign * 0.38, belt + 0.05), (0.15, 0.45, 0.4))
        parts.box(cover, (seat_x, sign * 0.38, belt + 0.32), (0.1, 0.25, 0.16))
    if rng.random() < 0.4:
        parts.ellipsoid(SKIN, (crown[1] - 0.2, 0.38, height - 0.3), (0.11, 0.1, 0.13))
        parts.ellipsoid(_cloth(rng), (crown[1] - 0.25, 0.38, belt), (0.15, 0.24, 0.3))


def _add_wheels(parts: PartList, rng: np.random.Generator, half: float, side: float, is_tall: bool) -> None:
    """Four wheels whose outer faces end just inside the body's width."""
    radius = float(rng.uniform(0.33, 0.39) if is_tall else rng.uniform(0.28, 0.34))
    rim = Material(float(rng.uniform(0.1, 0.5)), absorption=0.2)
    front = half - float(rng.uniform(0.7, 0.95))
    rear = -half + float(rng.uniform(0.65, 1.0))
    for x in (front, rear):
        for sign in (-1.0, 1.0):
            outside = sign * (side - 0.1)
            parts.cylinder(TYRE, (x, outside, radius), radius, 0.19, roll=np.pi / 2)
            parts.cylinder(rim, (x, outside, radius), 0.62 * radius, 0.195, roll=np.pi / 2)


def _add_trim(
    parts: PartList,
    rng: np.random.Generator,
    paint: Material,
    half: float,
    side: float,
    belt: float,
    screen: float,
) -> None:
    """Mirrors outside the box's width, and number plates that saturate the receiver."""
    for sign in (-1.0, 1.0):
        parts.box(paint, (screen - 0.3, sign * (side + 0.06), belt + 0.08), (0.1, 0.18, 0.13))
    plate_z = float(rng.uniform(0.45, 0.85))
    parts.box(PLATE, (-half + 0.01, 0.0, plate_z), (0.03, 0.5, 0.12))
    if rng.random() < 0.7:
        parts.box(PLATE, (half - 0.01, 0.0, 0.45), (0.03, 0.5, 0.12))


def make_pedestrian(rng: np.random.Generator) -> Body:
    """Makes a standing or walking adult or child, with or without a bag."""
    is_child = rng.random() < 0.12
    adult_height = np.clip(rng.normal(1.72, 0.09), 1.5, 1.97)
    height = float(rng.uniform(1.05, 1.5) if is_child else adult_height)
    build = float(rng.uniform(0.88, 1.2)) * (0.5 + 0.5 * height / 1.72)
    is_walking = rng.random() < 0.7
    swing = float(rng.uniform(0.15, 0.6)) if is_walking else float(rng.uniform(0.0, 0.1))
    lean = float(rng.normal(0.06 if is_walking else 0.0, 0.04))
    top, trousers = _cloth(rng), _cloth(rng)
    parts = PartList()
    hip, shoulder = 0.5 * height, 0.82 * height
    shoulder_x = (shoulder - hip) * lean
    _add_torso(parts, rng, top, (hip, shoulder), shoulder_x, build)
    head_z = height - 0.115
    parts.ellipsoid(SKIN, (shoulder_x * 1.3, 0.0, head_z), (0.1, 0.085, 0.115))
    for sign in (-1.0, 1.0):
        step = sign * swing
        foot = (hip * float(np.sin(step)), sign * 0.1 * build, 0.06)
        knee = (foot[0] * 0.5 + 0.05 * is_walking, sign * 0.1 * build, 0.5 * hip)
        parts.limb(trousers, (0.0, sign * 0.09 * build, hip), knee, 0.098 * build)
        parts.limb(trousers, knee, foot, 0.075 * build)
        parts.ellipsoid(TYRE, (foot[0] + 0.05, foot[1], 0.05), (0.13, 0.05, 0.05))
        _add_arm(parts, rng, top, (shoulder_x, sign * 0.215 * build, shoulder), -step, height)
    if rng.random() < 0.15:
        # A skirt or a long coat hides the legs.
        parts.frustum(top, (0.25 * height, hip + 0.05), (-0.2, 0.2, 0.22 * build), (-0.12, 0.12, 0.17))
    _add_bag(parts, rng, height, build)
    return parts.body(PEDESTRIAN)


def _add_torso(
    parts: PartList,
    rng: np.random.Generator,
    cloth: Material,
    z: tuple[float, float],
    shoulder_x: float,
    build: float,
) -> None:
    hip, shoulder = z
    semi_z = 0.5 * (shoulder - hip) + 0.08
    depth = float(rng.uniform(0.13, 0.19)) * build
    parts.ellipsoid(
        cloth,
        (0.5 * shoulder_x, 0.0, 0.5 * (hip + shoulder)),
        (depth, 0.2 * build, semi_z),
        pitch=float(np.arctan2(shoulder_x, shoulder - hip)),
    )
    # Shoulders are wide and square: the ellipsoid alone is too narrow up there.
    parts.ellipsoid(cloth, (shoulder_x, 0.0, shoulder - 0.03), (0.75 * depth, 0.23 * build, 0.085))


def _add_arm(
    parts: PartList,
    rng: np.random.Generator,
    cloth: Material,
    shoulder: tuple[float, float, float],
    swing: float,
    height: float,
) -> None:
    x, y, z = shoulder
    upper, lower = 0.17 * height, 0.17 * height
    out = 1.15 if y > 0 else -1.15
    elbow = (x + upper * float(np.sin(swing)), y * 1.2, z - upper * float(np.cos(swing)))
    bend = swing + float(rng.choice([0.25, 1.5], p=[0.85, 0.15]))
    hand = (
        elbow[0] + lower * float(np.sin(bend)),
        elbow[1] * abs(out),
        elbow[2] - lower * float(np.cos(bend)),
    )
    parts.limb(cloth, shoulder, elbow, 0.063)
    parts.limb(cloth, elbow, hand, 0.053)


def _add_bag(parts: PartList, rng: np.random.Generator, height: float, build: float) -> None:
    kind = rng.random()
    if kind < 0.18:
        bag = Material(float(rng.uniform(0.1, 0.5)), depth_m=0.01)
        depth = float(rng.uniform(0.12, 0.25))
        parts.box(bag, (-0.12 * build - depth / 2, 0.0, 0.68 * height), (depth, 0.3, 0.27 * height))
    elif kind < 0.3:
        side = float(rng.choice([-1.0, 1.0])) * (0.32 * build + 0.03)
        parts.box(_cloth(rng), (0.0, side, 0.36 * height), (0.35, 0.12, 0.3))


def make_cyclist(rng: np.random.Generator) -> Body:
    """Makes a bicycle with a rider on it."""
    parts = PartList()
    wheel_base = float(rng.uniform(0.98, 1.14))
    radius = float(rng.uniform(0.31, 0.35))
    _add_bicycle(parts, rng, wheel_base, radius)
    size = float(rng.uniform(0.92, 1.08))
    lean = np.radians(rng.uniform(5.0, 40.0))
    cloth, trousers = _cloth(rng), _cloth(rng)
    hip_x, hip_z = -0.2, 0.95 * size
    torso = 0.52 * size
    shoulder_x = hip_x + torso * float(np.sin(lean))
    shoulder_z = hip_z + torso * float(np.cos(lean))
    parts.ellipsoid(
        cloth,
        ((hip_x + shoulder_x) / 2, 0.0, (hip_z + shoulder_z) / 2),
        (0.15, 0.2 * size, torso / 2 + 0.08),
        pitch=float(lean),
    )
    parts.ellipsoid(cloth, (shoulder_x, 0.0, shoulder_z - 0.02), (0.12, 0.225 * size, 0.085))
    helmet = Material(float(rng.uniform(0.2, 0.8)))
    parts.ellipsoid(helmet, (shoulder_x + 0.1, 0.0, shoulder_z + 0.18), (0.12, 0.09, 0.13))
    grip_x, grip_z = 0.5 * wheel_base - 0.14, 1.0
    pedal = float(rng.uniform(0.0, 2 * np.pi))
    for sign in (-1.0, 1.0):
        y = sign * 0.19 * size
        elbow = (0.5 * (shoulder_x + grip_x), sign * 0.27, 0.5 * (shoulder_z + grip_z) - 0.06)
        parts.limb(cloth, (shoulder_x, y, shoulder_z - 0.04), elbow, 0.055)
        parts.limb(cloth, elbow, (grip_x, sign * 0.26, grip_z), 0.045)
        turn = pedal + (np.pi if sign > 0 else 0.0)
        foot = (0.02 + 0.17 * float(np.cos(turn)), sign * 0.11, 0.3 + 0.17 * float(np.sin(turn)))
        knee = (0.5 * (hip_x + foot[0]) + 0.25, sign * 0.12, 0.5 * (hip_z + foot[2]) + 0.08)
        parts.limb(trousers, (hip_x, sign * 0.1, hip_z), knee, 0.095)
        parts.limb(trousers, knee, foot, 0.07)
    if rng.random() < 0.2:
        parts.box(_cloth(rng), (shoulder_x - 0.25, 0.0, shoulder_z - 0.2), (0.2, 0.3, 0.4))
    return parts.body(CYCLIST)


def _add_bicycle(parts: PartList, rng: np.random.Generator, wheel_base: float, radius: float) -> None:
    """Wheels with spokes, frame, handlebar and sometimes a basket; between the wheels is x = 0."""
    metal = Material(float(rng.uniform(0.1, 0.6)))
    half = wheel_base / 2
    for x in (-half, half):
        parts.cylinder(SPOKES, (x, 0.0, radius), radius, 0.04, roll=np.pi / 2)
    saddle = (-0.2, 0.0, 0.9)
    steering = (half - 0.18, 0.0, 0.85)
    crank = (0.0, 0.0, 0.3)
    for start, end in (
        (crank, saddle),
        (crank, steering),
        (saddle, steering),
        (steering, (half, 0.0, radius)),
        (crank, (-half, 0.0, radius)),
    ):
        parts.limb(metal, start, end, 0.025)
    grip = (half - 0.14, 0.0, 1.0)
    parts.cylinder(metal, grip, 0.02, float(rng.uniform(0.48, 0.65)), roll=np.pi / 2)
    if rng.random() < 0.2:
        basket = Material(0.3, transparency=0.5)
        parts.box(basket, (half + 0.1, 0.0, 0.85), (0.3, 0.35, 0.25))


def make_parked_bicycle(rng: np.random.Generator) -> Body:
    """Makes a bicycle without a rider, which has no label."""
    parts = PartList()
    _add_bicycle(parts, rng, float(rng.uniform(0.98, 1.14)), float(rng.uniform(0.31, 0.35)))
    return parts.body()


def make_truck(rng: np.random.Generator) -> Body:
    """Makes a lorry or a large box van: cab, load and wheels."""
    parts = PartList()
    length, width = float(rng.uniform(6.0, 12.5)), float(rng.uniform(2.1, 2.55))
    height = float(rng.uniform(2.5, 3.8))
    half, side = length / 2, width / 2
    cab = half - float(rng.uniform(1.7, 2.2))
    cab_height = min(height, float(rng.uniform(2.3, 3.0)))
    paint, load = _paint(rng), _paint(rng)
    floor = float(rng.uniform(0.8, 1.2))
    parts.frustum(paint, (0.4, cab_height * 0.6), (cab, half, side), (cab, half, side), cut=(0.15, 0))
    parts.frustum(
        Material(0.2, transparency=0.3, absorption=0.4),
        (cab_height * 0.6, cab_height - 0.1),
        (cab, half, side - 0.02),
        (cab, half - 0.15, side - 0.08),
    )
    parts.frustum(paint, (cab_height - 0.1, cab_height), (cab, half - 0.1, side), (cab, half - 0.2, side))
    back = (-half, cab - 0.15, side)
    parts.frustum(load, (floor, height), back, back)
    parts.box(TYRE, (-0.3, 0.0, floor - 0.15), (length - 1.0, 0.9, 0.3))
    for x in (half - 1.2, -half + 1.2, -half + 2.4):
        for sign in (-1.0, 1.0):
            parts.cylinder(TYRE, (x, sign * (side - 0.18), 0.48), 0.48, 0.32, roll=np.pi / 2)
    return parts.body()


def make_bus(rng: np.random.Generator) -> Body:
    """Makes a city bus or a tram-like long box with a band of windows."""
    parts = PartList()
    half, side = float(rng.uniform(4.5, 9.0)), float(rng.uniform(1.2, 1.28))
    height = float(rng.uniform(2.9, 3.3))
    paint, glass = _paint(rng), _glass(rng)
    outline = (-half, half, side)
    parts.frustum(paint, (0.3, 1.1), outline, outline, cut=(0.2, 0.1))
    parts.frustum(glass, (1.1, 2.3), outline, (-half + 0.05, half - 0.1, side - 0.03))
    parts.frustum(paint, (2.3, height), outline, (-half + 0.1, half - 0.2, side - 0.1))
    for x in np.arange(-half + 1.0, half - 1.0, 1.5):
        parts.box(Material(0.2, depth_m=0.02), (float(x), 0.0, 1.4), (0.2, 2.2 * side * 0.8, 0.8))
    for x in (-half + 2.5, half - 2.3):
        for sign in (-1.0, 1.0):
            parts.cylinder(TYRE, (x, sign * (side - 0.14), 0.48), 0.48, 0.28, roll=np.pi / 2)
    return parts.body()


def make_motorcycle(rng: np.random.Generator) -> Body:
    """Makes a parked motorcycle or scooter."""
    parts = PartList()
    paint = _paint(rng)
    for x in (-0.65, 0.65):
        parts.cylinder(TYRE, (x, 0.0, 0.3), 0.3, 0.12, roll=np.pi / 2)
    parts.box(paint, (0.0, 0.0, 0.55), (1.0, 0.3, 0.4))
    parts.ellipsoid(paint, (-0.3, 0.0, 0.8), (0.4, 0.14, 0.1))
    parts.limb(CHROME, (0.65, 0.0, 0.3), (0.4, 0.0, 1.05), 0.05)
    parts.cylinder(CHROME, (0.38, 0.0, 1.05), 0.02, 0.7, roll=np.pi / 2)
    return parts.body()


def make_pole(rng: np.random.Generator) -> Body:
    """Makes a lamp post, sign post or traffic light."""
    parts = PartList()
    height, radius = float(rng.uniform(2.2, 8.0)), float(rng.uniform(0.03, 0.16))
    metal = Material(float(rng.uniform(0.2, 0.6)))
    parts.cylinder(metal, (0.0, 0.0, height / 2), radius, height)
    if rng.random() < 0.5:
        sign_z = float(rng.uniform(1.9, 2.6))
        width, tall = float(rng.uniform(0.4, 0.9)), float(rng.uniform(0.4, 0.9))
        parts.box(PLATE, (radius + 0.02, 0.0, sign_z), (0.03, width, tall))
    elif rng.random() < 0.3:
        parts.box(metal, (radius + 0.1, 0.0, 2.5), (0.25, 0.3, 0.9))
    return parts.body(size=(2 * radius + 0.1, 2 * radius + 0.1, height))


def _leaves(rng: np.random.Generator) -> Material:
    return Material(
        float(rng.uniform(0.25, 0.6)),
        depth_m=float(rng.uniform(0.15, 0.7)),
        transparency=float(rng.uniform(0.0, 0.3)),
        absorption=0.05,
    )


def make_tree(rng: np.random.Generator) -> Body:
    """Makes a trunk below a crown of a few porous ellipsoids."""
    parts = PartList()
    trunk_top, radius = float(rng.uniform(2.2, 4.0)), float(rng.uniform(0.08, 0.35))
    bark, leaves = Material(float(rng.uniform(0.2, 0.5))), _leaves(rng)
    lean = rng.normal(0.0, 0.03, 2)
    parts.cylinder(
        bark,
        (0.0, 0.0, trunk_top / 2 - 0.2),
        radius,
        trunk_top + 1.4,
        pitch=float(lean[0]),
        roll=float(lean[1]),
    )
    spread = float(rng.uniform(0.9, 2.6))
    for _ in range(int(rng.integers(2, 5))):
        dx, dy = (float(v) for v in rng.normal(0.0, 0.4 * spread, 2))
        tall = spread * float(rng.uniform(0.5, 1.1))
        z = trunk_top + tall * 0.9 + float(rng.uniform(0.0, 1.5))
        wide = spread * float(rng.uniform(0.6, 1.0))
        parts.ellipsoid(leaves, (dx, dy, z), (wide, wide, tall))
    return parts.body(size=(2 * radius + 0.2, 2 * radius + 0.2, trunk_top + 3.0))


def make_bush(rng: np.random.Generator) -> Body:
    """Makes a bush, from a tuft of grass to the size of a car."""
    parts = PartList()
    leaves = _leaves(rng)
    leaves = leaves._replace(depth_m=0.5 * leaves.depth_m)
    radius = float(rng.uniform(0.25, 1.3))
    for _ in range(int(rng.integers(1, 4))):
        dx, dy = (float(v) for v in rng.normal(0.0, 0.35 * radius, 2))
        tall = float(rng.uniform(0.35, 1.0)) * min(1.5 * radius, 1.0)
        wide = float(rng.uniform(0.6, 1.0)) * radius
        parts.ellipsoid(leaves, (dx, dy, 0.7 * tall), (wide, wide * 0.9, tall))
    return parts.body()


def make_thicket(rng: np.random.Generator) -> Body:
    """Makes a tall shrub or a young tree whose ragged crown reaches down to the ground."""
    parts = PartList()
    leaves = _leaves(rng)
    spread, height = float(rng.uniform(0.5, 1.6)), float(rng.uniform(1.2, 4.5))
    for _ in range(int(rng.integers(4, 9))):
        dx, dy = (float(v) for v in rng.uniform(-0.7, 0.7, 2) * spread)
        z, radius = float(rng.uniform(0.1, 1.0)) * height, float(rng.uniform(0.25, 0.7)) * spread
        parts.ellipsoid(leaves, (dx, dy, z), (radius, radius, radius * float(rng.uniform(0.6, 1.6))))
    return parts.body()


def make_hedge(rng: np.random.Generator) -> Body:
    """Makes a stretch of hedge."""
    parts = PartList()
    length, width = float(rng.uniform(2.0, 12.0)), float(rng.uniform(0.4, 1.0))
    leaves = _leaves(rng)._replace(depth_m=float(rng.uniform(0.05, 0.2)))
    height = float(rng.uniform(0.6, 2.0))
    outline = (-length / 2, length / 2, width / 2)
    parts.frustum(leaves, (-0.5, height), outline, (*outline[:2], 0.8 * outline[2]))
    return parts.body()


def make_bollard(rng: np.random.Generator) -> Body:
    """Makes a bollard, a hydrant, a parking meter or a similar short post."""
    parts = PartList()
    radius, height = float(rng.uniform(0.05, 0.16)), float(rng.uniform(0.5, 1.4))
    metal = Material(float(rng.uniform(0.15, 0.7)))
    parts.cylinder(metal, (0.0, 0.0, height / 2), radius, height)
    if rng.random() < 0.6:
        wide = radius * float(rng.uniform(1.2, 2.2))
        parts.ellipsoid(metal, (0.0, 0.0, height), (wide, wide, radius * 1.5))
    return parts.body()


def make_bin(rng: np.random.Generator) -> Body:
    """Makes a dustbin, round or square."""
    parts = PartList()
    plastic = Material(float(rng.uniform(0.1, 0.6)))
    height, half = float(rng.uniform(0.7, 1.4)), float(rng.uniform(0.2, 0.4))
    if rng.random() < 0.4:
        parts.cylinder(plastic, (0.0, 0.0, height / 2), half, height)
    else:
        foot = (-half, half, 0.9 * half)
        parts.frustum(plastic, (0.03, height), (-0.8 * half, 0.8 * half, 0.75 * half), foot)
    return parts.body()


def make_cabinet(rng: np.random.Generator) -> Body:
    """Makes a box: switch cabinet, letter box, skip, vending machine, bench or stall."""
    parts = PartList()
    length, width = float(rng.uniform(0.4, 2.6)), float(rng.uniform(0.3, 1.4))
    height = float(rng.uniform(0.4, 2.1))
    outline = (-length / 2, length / 2, width / 2)
    top = (outline[0] * 0.97, outline[1] * 0.97, outline[2] * float(rng.uniform(0.8, 1.0)))
    parts.frustum(Material(float(rng.uniform(0.1, 0.7))), (-0.2, height), outline, top)
    return parts.body()


def make_trailer(rng: np.random.Generator) -> Body:
    """Makes a car-sized trailer or container: flat walls, no cabin, no label."""
    parts = PartList()
    half, side = float(rng.uniform(1.0, 3.0)), float(rng.uniform(0.7, 1.2))
    floor, height = float(rng.uniform(0.0, 0.6)), float(rng.uniform(1.0, 2.6))
    outline = (-half, half, side)
    parts.frustum(_paint(rng), (floor, height), outline, outline)
    if floor > 0.3:
        for sign in (-1.0, 1.0):
            parts.cylinder(TYRE, (0.0, sign * side * 0.9, 0.3), 0.3, 0.18, roll=np.pi / 2)
        parts.box(CHROME, (half + 0.6, 0.0, 0.45), (1.2, 0.08, 0.08))
    return parts.body()


def make_shelter(rng: np.random.Generator) -> Body:
    """Makes a bus shelter: a roof on posts with a glass back."""
    parts = PartList()
    half = float(rng.uniform(1.5, 2.5))
    metal = Material(0.4)
    parts.box(metal, (0.0, 0.0, 2.4), (2 * half, 1.5, 0.1))
    parts.box(Material(0.2, transparency=0.6, absorption=0.4), (0.0, 0.7, 1.3), (2 * half, 0.03, 2))
    parts.box(WOOD, (0.0, 0.5, 0.45), (1.6 * half, 0.35, 0.06))
    for x in (-half + 0.05, half - 0.05):
        parts.cylinder(metal, (x, 0.7, 1.2), 0.05, 2.4)
    return parts.body()


def make_fence(rng: np.random.Generator, length: float) -> Body:
    """Makes a stretch of fence, railing, guard rail or garden wall of a given length."""
    parts = PartList()
    kind = rng.random()
    half, material = length / 2, Material(float(rng.uniform(0.2, 0.6)))
    if kind < 0.35:
        height = float(rng.uniform(0.5, 2.2))
        outline = (-half, half, float(rng.uniform(0.08, 0.2)))
        parts.frustum(material, (-1.0, height), outline, outline)
    elif kind < 0.75:
        height = float(rng.uniform(0.9, 2.0))
        mesh = material._replace(transparency=float(rng.uniform(0.35, 0.85)))
        parts.frustum(mesh, (-0.5, height), (-half, half, 0.02), (-half, half, 0.02))
        for x in np.arange(-half, half + 0.1, 2.5):
            parts.cylinder(material, (float(x), 0.0, height / 2 - 0.2), 0.04, height + 0.4)
    else:
        parts.box(material, (0.0, 0.0, 0.6), (length, 0.08, 0.3))
        for x in np.arange(-half, half + 0.1, 4.0):
            parts.box(material, (float(x), 0.0, 0.2), (0.1, 0.12, 1.0))
    return parts.body()


def make_building(rng: np.random.Generator, length: float, depth: float) -> Body:
    """Makes a block with its front at the right (-y), with bays, ledges and a doorway."""
    parts = PartList()
    wall = Material(float(rng.uniform(0.2, 0.6)), absorption=0.03)
    height = float(rng.uniform(3.0, 15.0))
    half, front = length / 2, -depth / 2
    parts.frustum(wall, (-1.5, height), (-half, half, depth / 2), (-half, half, depth / 2))
    window = Material(0.15, absorption=0.6)
    spacing = float(rng.uniform(1.8, 4.0))
    rows = np.arange(1.6, min(height - 0.8, 9.0), 3.0)
    if rng.random() < 0.7:
        for x in np.arange(-half + spacing / 2, half - 0.5, spacing):
            for z in rows:
                size = (spacing * 0.5, 0.04, 1.3)
                parts.box(window, (float(x), front, float(z)), size)
    for _ in range(int(rng.integers(0, 3))):
        x = float(rng.uniform(-half + 1.0, half - 1.0))
        bay = (float(rng.uniform(0.8, 3.0)), float(rng.uniform(0.2, 0.7)))
        tall = float(rng.uniform(2.2, height))
        parts.box(wall, (x, front, tall / 2), (bay[0], 2 * bay[1], tall))
    return parts.body()


CLUTTER: tuple[tuple[Callable[[np.random.Generator], Body], float], ...] = (
    (make_pole, 0.26),
    (make_bollard, 0.17),
    (make_bush, 0.2),
    (make_bin, 0.11),
    (make_cabinet, 0.11),
    (make_parked_bicycle, 0.06),
    (make_motorcycle, 0.02),
    (make_trailer, 0.025),
    (make_shelter, 0.015),
    (make_hedge, 0.03),
)
"""What stands about on a pavement, with the share of each."""
