"""The sweeps and tables of a made-up Argoverse 2 log."""

import sys

import numpy as np
import pytest
from made_up_argoverse2 import BUS, CAR, STAMPS_NS, annotation_rows, make_log, write_table

from dsvt_ros.errors import DataError
from dsvt_ros.io.argoverse2 import EGO_HEIGHT_M, labelled_sweeps, open_argoverse2, read_table


@pytest.fixture(params=[".csv", ".feather"])
def log(tmp_path, request):
    pytest.importorskip("pyarrow")
    return make_log(tmp_path / "val" / "log", suffix=request.param, beside=request.param == ".csv")


def test_labelled_sweeps(log):
    (opened,) = open_argoverse2(log.parent)
    assert opened == open_argoverse2(log)[0]
    # Stamps have more digits than float64.
    assert (opened.stamps_ns, opened.labelled_ns) == (STAMPS_NS, STAMPS_NS[1:])
    first, second = labelled_sweeps([opened])
    assert [len(sweep.scans) for sweep in (first, second)] == [1, 1]
    scan = first.scans[0].scan
    assert (scan.columns, scan.stamp_ns) == (("x", "y", "z", "intensity"), STAMPS_NS[1])
    assert (scan.points.shape, scan.points.dtype) == ((301, 4), np.float32)
    assert scan.points[-1].tolist() == [14.5, 2, 1, 255]
    assert first.class_names == ("BUS", "REGULAR_VEHICLE")
    assert (first.num_points.tolist(), second.num_points.tolist()) == ([90, 25], [25, 0])
    for box, (_, *size, yaw, x, y, z, _) in zip(first.boxes, (BUS, CAR), strict=True):
        np.testing.assert_allclose(box, [x, y, z, *size, yaw], atol=1e-12)


def test_the_ground_is_at_zero_in_the_level_frame(log):
    sweep = next(labelled_sweeps(open_argoverse2(log)))
    expected = np.eye(4)
    expected[2, 3] = EGO_HEIGHT_M
    assert sweep.axes == "x_forward"
    np.testing.assert_array_equal(sweep.T_level_sensor, expected)


def test_earlier_sweeps_are_newest_first_and_in_place(log):
    (opened,) = open_argoverse2(log)
    sweep = opened.sweep(STAMPS_NS[2], count=10)
    assert [posed.scan.stamp_ns for posed in sweep.scans] == list(STAMPS_NS[::-1])
    assert len(opened.sweep(STAMPS_NS[2], count=2).scans) == 2
    for posed in sweep.scans:
        post = posed.T_fixed_sensor @ [*posed.scan.points[-1, :3].astype(np.float64), 1]
        np.testing.assert_allclose(post[:3], [1466, 226, 14], atol=1e-9)


def test_poses_are_needed_for_several_sweeps_only(log):
    for path in log.glob("city_SE3_egovehicle.*"):
        path.unlink()
    (opened,) = open_argoverse2(log)
    assert len(opened.sweep(STAMPS_NS[1]).scans) == 1
    with pytest.raises(DataError, match=r"city_SE3_egovehicle.feather cannot be read: No such file"):
        opened.sweep(STAMPS_NS[1], count=2)


def test_a_sweep_that_is_missing(log):
    (opened,) = open_argoverse2(log)
    next(log.rglob(f"{STAMPS_NS[1]}.feather")).unlink()
    with pytest.raises(DataError, match=rf"{STAMPS_NS[1]}.feather cannot be read: No such file"):
        opened.sweep(STAMPS_NS[1])


def test_files_that_are_something_else(log):
    (opened,) = open_argoverse2(log)
    next(log.rglob(f"{STAMPS_NS[1]}.feather")).write_bytes(b"ARROW2 or not")
    with pytest.raises(DataError, match=r"is no feather table"):
        opened.sweep(STAMPS_NS[1])


def test_folders_without_a_log(tmp_path):
    with pytest.raises(DataError, match=r"nowhere is no folder; expected an Argoverse 2 log"):
        open_argoverse2(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"have no annotations.feather or .csv"):
        open_argoverse2(tmp_path)
    write_table(tmp_path / "annotations.csv", annotation_rows())
    with pytest.raises(DataError, match=r"has no sweeps: expected sensors/lidar/TIMESTAMP.feather"):
        open_argoverse2(tmp_path)


def test_tables_of_text(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("stamp,size,name\n315973157959879001,1.5,BUS\n315973157959879002,2,SIGN\n")
    table = read_table(path, ("stamp", "name"))
    assert table["stamp"].tolist() == [315973157959879001, 315973157959879002]
    assert (table["size"].tolist(), table["name"].tolist()) == ([1.5, 2.0], ["BUS", "SIGN"])
    with pytest.raises(DataError, match=r"table.csv has no column yaw, only stamp, size, name"):
        read_table(path, ("stamp", "yaw"))
    path.write_text("stamp,size\n1\n")
    with pytest.raises(DataError, match=r"table.csv is no csv table: line 2 has another number of columns"):
        read_table(path, ("stamp",))


def test_without_pyarrow_feather_files_are_explained(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"needs pyarrow; install it with pip install pyarrow"):
        read_table(tmp_path / "table.feather", ())
