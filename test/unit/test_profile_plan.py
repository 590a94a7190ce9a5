"""The proposed engines, for any clouds."""

import functools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsvt_ros.capacity import Capacity, StageCapacity, capacity_for, default_voxels
from dsvt_ros.config import ProfileConfig
from dsvt_ros.model.folder import open_model
from dsvt_ros.profile_plan import HEADROOM, MIN_SAVING, STEP, plan_profile, work


@functools.cache
def model():
    return open_model("demo").model


def cloud(voxels, fullness=0.5):
    """As few sets as so many voxels can make, or as many, or something between."""
    if not voxels:
        return Capacity((StageCapacity(0, (0, 0)),))
    (room,) = capacity_for(model(), voxels).stages
    fewest = math.ceil(voxels / model().backbone_3d.stages[0].set_size)
    first, second = (fewest + round(fullness * (count - fewest)) for count in room.sets)
    return Capacity((StageCapacity(voxels, (first, second)),))


CELLS = 320 * 320
CLOUDS = st.lists(st.builds(cloud, st.integers(0, CELLS), st.floats(0, 1)), min_size=1, max_size=60).filter(
    lambda clouds: any(cloud.voxels for cloud in clouds)
)


@settings(max_examples=150, deadline=None)
@given(CLOUDS)
def test_the_proposal_suits_every_cloud(clouds):
    plan = plan_profile(clouds, model())
    voxels = [cloud.voxels for cloud in clouds if cloud.voxels]
    proposed = plan.proposed
    assert plan.clouds == len(voxels) == sum(proposed.clouds) == sum(plan.default.clouds)
    assert proposed.cut == 0
    assert 0 <= proposed.padding < 1
    assert 0 <= plan.default.padding < 1
    assert ProfileConfig(voxels=proposed.voxels).voxels == tuple(sorted(set(proposed.voxels)))
    assert 1 <= len(proposed.voxels) <= 3
    assert min(proposed.clouds) > 0, "no engine that nobody takes"
    assert proposed.voxels[0] >= min(voxels)
    assert proposed.voxels[-1] >= min((1 + HEADROOM) * max(voxels), CELLS)
    assert all(size % STEP == 0 for size in proposed.voxels)
    assert proposed.voxels[-1] <= max(CELLS, (1 + HEADROOM) * max(voxels) + STEP)


@settings(max_examples=150, deadline=None)
@given(CLOUDS)
def test_the_range_covers_every_cloud(clouds):
    plan = plan_profile(clouds, model())
    low, usual, high = ProfileConfig(voxels=plan.dynamic, dynamic=True).voxels
    assert 1 <= low < usual < high == plan.proposed.voxels[-1]
    assert low <= max(plan.voxels.minimum, 1)
    assert plan.voxels.maximum <= high


@settings(max_examples=60, deadline=None)
@given(CLOUDS)
def test_one_more_engine_saves_its_share(clouds):
    """Against the same engines without their smallest one, or only the largest."""
    proposed = plan_profile(clouds, model()).proposed
    seen = [cloud for cloud in clouds if cloud.voxels]

    def spent(sizes):
        rooms = [min(size for size in sizes if size >= cloud.voxels) for cloud in seen]
        return sum(work(model(), capacity_for(model(), room)) for room in rooms)

    for count in range(1, len(proposed.voxels)):
        fewer = proposed.voxels[count:]
        assert spent(proposed.voxels) <= (1 - MIN_SAVING) * spent(fewer)
    needed = sum(work(model(), cloud) for cloud in seen)
    assert proposed.padding == pytest.approx(1 - needed / spent(proposed.voxels))


def test_two_kinds_of_clouds_get_two_engines():
    plan = plan_profile([cloud(4000)] * 5 + [cloud(15000)] * 5, model())
    assert (plan.proposed.voxels, plan.proposed.clouds) == ((4096, 17408), (5, 5))
    assert plan.dynamic == (3072, 15360, 17408)
    assert plan.voxels.minimum == 4000
    assert plan.voxels.median == plan.voxels.p95 == plan.voxels.maximum == 15000


def test_much_the_same_clouds_get_one():
    plan = plan_profile([cloud(size) for size in range(9000, 10000, 50)], model())
    assert plan.proposed.voxels == (11264,)
    assert plan.proposed.padding < plan.default.padding


def test_clouds_beyond_the_default_are_cut():
    room = default_voxels(model())
    plan = plan_profile([cloud(room), cloud(room + 1), cloud(3 * room), cloud(0)], model())
    assert (plan.clouds, plan.default.clouds, plan.default.cut) == (3, (3,), 2)
    assert plan.default.voxels == (room,)
    assert plan.proposed.cut == 0


def test_a_single_voxel():
    plan = plan_profile([cloud(1)], model())
    assert plan.proposed.voxels == (1024,)
    assert plan.dynamic == (1, 1023, 1024)


def test_no_voxels_at_all():
    with pytest.raises(ValueError, match="no cloud has voxels"):
        plan_profile([cloud(0)], model())


def test_work_counts_the_layers_of_the_network():
    """By hand: width 64, hidden width 128, sets of 36."""
    backbone = model().backbone_3d
    (stage,) = backbone.stages
    assert (backbone.channels, backbone.ffn_channels, stage.num_blocks, stage.set_size) == (64, 128, 2, 36)
    counts = Capacity((StageCapacity(10, (2, 1)),))
    assert work(model(), counts) == 2 * 10 * (4 * 64 * 64 + 2 * 64 * 128) + 3 * 2 * 36 * 36 * 64
