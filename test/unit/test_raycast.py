from dataclasses import replace

import numpy as np
import pytest
import torch

from dsvt_ros.training.layout import SceneConfig, make_scene
from dsvt_ros.training.lidar import HDL64, VLP16, LidarModel, Sensor
from dsvt_ros.training.raycast import GROUND, cast_rays, ground_distances, make_rays, parts_from_scenes
from dsvt_ros.training.scene import Scene, Terrain, World, scene_from_world
from dsvt_ros.training.shapes import Material, PartList

FLAT = Terrain(np.zeros(2), np.zeros((0, 4)), np.zeros((0, 5)), 0.0)
HARD = Material(0.5)
SMALL = LidarModel("small", tuple(np.linspace(-24.0, 15.0, 24)), 300, 100.0)


def level_lidar(*elevations_deg: float) -> Sensor:
    """Columns of one degree: column 180 looks along +x, column 270 along +y."""
    return Sensor(LidarModel("level", elevations_deg, 360, 200.0), height_m=1.0)


def cast(scenes, sensors, jitter_rad=0.0, max_num_pairs=10_000):
    device = torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    rays = make_rays(sensors, jitter_rad, generator, device)
    parts = parts_from_scenes(scenes, device)
    hits = cast_rays(
        scenes, sensors, rays, parts, jitter_rad=jitter_rad, generator=generator, max_num_pairs=max_num_pairs
    )
    return rays, parts, hits


def scene_of(parts: PartList, x=0.0, y=0.0, yaw=0.0, label=-1) -> Scene:
    # An explicit size keeps the parts where the test put them.
    return scene_from_world(World(FLAT, [parts.body(label, (1.0, 1.0, 1.0))], np.array([[x, y, yaw]]), np.zeros(1)))


def test_box_is_met_at_its_near_face():
    parts = PartList()
    parts.box(HARD, (0.0, 0.0, 1.0), (4.0, 2.0, 2.0))
    _, _, hits = cast([scene_of(parts, x=10.0)], [level_lidar(0.0)])
    assert hits.distances[180] == pytest.approx(8.0, abs=1e-5)
    # 7 degrees to the left the ray passes the near face (y = 0.98) and still meets it.
    assert hits.distances[187] == pytest.approx(8.0 / np.cos(np.radians(7)), abs=1e-4)
    assert torch.isinf(hits.distances[188])
    assert int(torch.isfinite(hits.distances).sum()) == 15


def test_turned_box_is_met_at_its_corner():
    parts = PartList()
    parts.box(HARD, (0.0, 0.0, 1.0), (2.0, 2.0, 2.0))
    _, _, hits = cast([scene_of(parts, y=5.0, yaw=np.pi / 4)], [level_lidar(0.0)])
    assert hits.distances[270] == pytest.approx(5.0 - np.sqrt(2.0), abs=2e-4)


def test_slanted_front_of_a_frustum():
    parts = PartList()
    parts.frustum(HARD, (0.0, 2.0), (-2.0, 2.0, 1.0), (0.0, 2.0, 1.0))
    # At the sensor's height of 1 m the rear slant, facing the sensor, is halfway: x = 10 - 1.
    _, _, hits = cast([scene_of(parts, x=10.0)], [level_lidar(0.0)])
    assert hits.distances[180] == pytest.approx(9.0, abs=1e-5)


def test_cut_corner_of_a_frustum():
    parts = PartList()
    outline = (-1.0, 1.0, 1.0)
    parts.frustum(HARD, (0.0, 2.0), outline, outline, cut=(0.0, 0.5))
    # Turned by 45 degrees, the cut corner at the rear right faces the sensor: the cut runs through
    # (-1, -0.5) and (-0.5, -1), 1.5 / sqrt(2) from the centre.
    _, _, hits = cast([scene_of(parts, x=10.0, yaw=-np.pi / 4)], [level_lidar(0.0)])
    assert hits.distances[180] == pytest.approx(10.0 - 1.5 / np.sqrt(2.0), abs=1e-4)


def test_ellipsoid_and_cylinders():
    parts = PartList()
    parts.ellipsoid(HARD, (10.0, 0.0, 1.0), (3.0, 1.0, 2.0))
    parts.cylinder(HARD, (0.0, 8.0, 1.0), 0.5, 4.0)
    # A wheel-like cylinder along y: the ray along -x meets its round side.
    parts.cylinder(HARD, (-6.0, 0.0, 1.0), 0.7, 0.3, roll=np.pi / 2)
    # The same along x: the ray along -y meets it from the side, too.
    parts.cylinder(HARD, (0.0, -6.0, 1.0), 0.7, 2.0, pitch=np.pi / 2)
    _, _, hits = cast([scene_of(parts)], [level_lidar(0.0)])
    assert hits.distances[180] == pytest.approx(7.0, abs=1e-4)
    assert hits.distances[270] == pytest.approx(7.5, abs=1e-4)
    assert hits.distances[0] == pytest.approx(5.3, abs=1e-4)
    assert hits.distances[90] == pytest.approx(5.3, abs=1e-4)


def test_cylinder_cap_from_above():
    parts = PartList()
    parts.cylinder(HARD, (5.0, 0.0, 0.25), 1.0, 0.5)
    sensor = replace(level_lidar(-6.0), height_m=1.0)
    _, _, hits = cast([scene_of(parts)], [sensor])
    assert hits.distances[180] == pytest.approx(0.5 / np.sin(np.radians(6.0)), abs=1e-4)


def test_flat_ground():
    sensor = Sensor(SMALL, height_m=1.7)
    rays, _, hits = cast([scene_from_world(World(FLAT))], [sensor])
    down = rays.directions[:, 2] < -0.02
    torch.testing.assert_close(hits.distances[down], -1.7 / rays.directions[down, 2], rtol=1e-4, atol=1e-3)
    assert bool((hits.parts[down] == GROUND).all())
    assert bool(torch.isinf(hits.distances[rays.directions[:, 2] > 0]).all())
    assert bool((hits.parts[rays.directions[:, 2] > 0] == -1).all())


def rolling_terrain() -> Terrain:
    rng = np.random.default_rng(3)
    waves = np.concatenate([rng.normal(0.0, 0.1, (4, 2)), rng.uniform(0, 6, (4, 1)), rng.normal(0, 0.3, (4, 1))], 1)
    roads = np.array([[1.0, 2.0, np.cos(0.3), np.sin(0.3), 4.0], [9.0, 0.0, 0.0, 1.0, 3.0]])
    return Terrain(np.array([0.01, -0.02]), waves, roads, 0.15)


def test_points_on_rolling_ground_lie_on_it():
    ego = (3.0, -1.0, 0.7)
    scene = scene_from_world(World(rolling_terrain()), ego)
    rays = make_rays([Sensor(SMALL, roll_rad=0.02)], 1e-4, torch.Generator().manual_seed(1), torch.device("cpu"))
    distance = ground_distances([scene], rays).numpy()
    found = np.isfinite(distance)
    points = rays.origins.numpy()[0] + distance[found, None] * rays.directions.numpy()[found]
    cos, sin = np.cos(ego[2]), np.sin(ego[2])
    x, y = ego[0] + cos * points[:, 0] - sin * points[:, 1], ego[1] + sin * points[:, 0] + cos * points[:, 1]
    above = points[:, 2] + scene.ego_pose[2] - scene.terrain.height(x, y)
    assert np.quantile(np.abs(above), 0.98) < 0.01
    assert np.abs(above).max() < 0.16  # a kerb met just beside the edge found in the polar grid


def test_ground_agrees_with_marching():
    scene = scene_from_world(World(rolling_terrain()))
    rays = make_rays([Sensor(SMALL)], 0.0, torch.Generator(), torch.device("cpu"))
    found = ground_distances([scene], rays).numpy()
    steps = np.arange(0.3, 60.0, 0.01)
    for index in range(0, len(found), 97):
        direction = rays.directions[index].numpy().astype(float)
        x, y, z = direction[:, None] * steps
        ground = scene.terrain.height(x, y) - scene.ego_pose[2]
        below = np.flatnonzero(1.73 + z < ground)
        if len(below):
            # Grazing rays shift far for little height; compare the height instead.
            expected = steps[below[0]]
            assert abs(found[index] - expected) < 0.03 + 0.02 * expected
        else:
            assert found[index] > 59.0


def brute_force(scene: Scene, origin: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """(N,) nearest distance over all parts of a scene, every ray against every part."""
    best = np.full(len(directions), np.inf)
    for planes in scene.planes.astype(np.float64):
        speed = directions @ planes[:, :3].T
        with np.errstate(divide="ignore"):
            crossing = (planes[:, 3] - planes[:, :3] @ origin) / speed
        enter = np.where(speed < 0, crossing, -np.inf).max(axis=1)
        leave = np.where(speed > 0, crossing, np.inf).min(axis=1)
        met = (enter < leave) & (enter > 0)
        best[met] = np.minimum(best[met], enter[met])
    for axes, centre, is_cylinder in zip(
        scene.round_axes.astype(np.float64), scene.round_centres, scene.round_is_cylinder, strict=True
    ):
        start, step = axes @ (origin - centre), directions @ axes.T
        n = 2 if is_cylinder else 3
        a, b, c = (step[:, :n] ** 2).sum(1), step[:, :n] @ start[:n], (start[:n] ** 2).sum() - 1.0
        with np.errstate(invalid="ignore", divide="ignore"):
            root = np.sqrt(b * b - a * c)
            enter, leave = (-b - root) / a, (-b + root) / a
            if is_cylinder:
                caps = (np.array([[-1.0], [1.0]]) - start[2]) / step[:, 2]
                enter, leave = np.maximum(enter, caps.min(0)), np.minimum(leave, caps.max(0))
            met = (enter < leave) & (enter > 0)
        best[met] = np.minimum(best[met], enter[met])
    return best


@pytest.mark.parametrize("sector_rad", [2 * np.pi, 1.9])
def test_culling_misses_nothing(sector_rad):
    scenes, sensors = [], []
    for seed in (1, 2):
        scene = make_scene(np.random.default_rng(seed), SceneConfig(reach_m=40.0))
        scenes.append(replace(scene, materials=np.zeros_like(scene.materials)))
        stagger = np.random.default_rng(0).random(SMALL.num_beams)
        sensors.append(Sensor(SMALL, 0.5 + seed, 0.03, -0.02, sector_rad, stagger=stagger))
    rays, _, hits = cast(scenes, sensors, jitter_rad=1e-3)
    for index, scene in enumerate(scenes):
        own = (rays.scene_index == index).numpy()
        directions = rays.directions[own].numpy().astype(np.float64)
        expected = brute_force(scene, rays.origins[index].numpy().astype(np.float64), directions)
        is_ground = (hits.parts[own] == GROUND).numpy()
        found = hits.distances[own].numpy()
        assert bool((found[is_ground] < expected[is_ground] + 1e-2).all())
        difference = np.abs(np.minimum(found[~is_ground], 1e3) - np.minimum(expected[~is_ground], 1e3))
        # Rays through an edge may fall to either side of it in single precision.
        assert (difference > 1e-2).sum() <= 2
        assert np.isfinite(found[~is_ground]).sum() > 500


def test_chunks_do_not_change_the_result():
    scene = make_scene(np.random.default_rng(4))
    scene = replace(scene, materials=np.zeros_like(scene.materials))
    first = cast([scene], [Sensor(VLP16)], max_num_pairs=3_000)[2]
    second = cast([scene], [Sensor(VLP16)], max_num_pairs=1_000_000)[2]
    assert torch.equal(first.distances, second.distances)
    assert torch.equal(first.parts, second.parts)
    assert torch.equal(first.num_alone, second.num_alone)


def test_transparent_and_porous_parts():
    parts = PartList()
    parts.box(Material(0.5, transparency=0.7), (5.0, 0.0, 0.0), (0.1, 100.0, 100.0))
    parts.box(Material(0.5, depth_m=0.5), (30.0, 0.0, 0.0), (20.0, 400.0, 400.0))
    sensor = Sensor(LidarModel("dense", tuple(np.linspace(-20, 20, 80)), 1440, 200.0), 1.0, sector_rad=1.0)
    rays, _, hits = cast([scene_of(parts)], [sensor])
    forward = hits.distances * rays.directions[:, 0]
    up = rays.directions[:, 2] > 0
    behind = forward[up] > 10.0
    assert float(behind.float().mean()) == pytest.approx(0.7, abs=0.02)
    assert float((hits.distances - 20.0 / rays.directions[:, 0])[up][behind].mean()) == pytest.approx(0.5, abs=0.03)


def test_no_parts_and_roads_only():
    terrain = Terrain(np.zeros(2), np.zeros((0, 4)), np.array([[0.0, 0.0, 1.0, 0.0, 3.0]]), 0.12)
    rays, _, hits = cast([scene_from_world(World(terrain))], [Sensor(HDL64)])
    ground = torch.isfinite(hits.distances)
    points = rays.origins[0] + hits.distances[ground, None] * rays.directions[ground]
    on_road = points[:, 1].abs() < 2.9
    assert float(points[on_road, 2].abs().max()) < 1e-3
    assert float((points[points[:, 1].abs() > 3.1, 2] - 0.12).abs().max()) < 1e-3
