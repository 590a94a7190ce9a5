"""Clouds in files, among them broken ones."""

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsvt_ros.errors import DataError
from dsvt_ros.io.point_files import (
    lzf_decompress,
    parse_columns,
    points_from_bin,
    points_from_npy,
    points_from_pcd,
)

POINTS = np.array([[1, -2, 0.5, 100], [np.nan, 0, 0, 0], [3, 4, -5, 255]], dtype=np.float32)


def lzf_compress(data):
    """Greedy LZF: a reference wherever the last position of the next three bytes allows one."""
    out, literals, last_seen, position = bytearray(), bytearray(), {}, 0

    def flush():
        for start in range(0, len(literals), 32):
            run = literals[start : start + 32]
            out.append(len(run) - 1)
            out.extend(run)
        literals.clear()

    while position < len(data):
        key = data[position : position + 3]
        candidate = last_seen.get(key)
        last_seen[key] = position
        if len(key) < 3 or candidate is None or position - candidate > 8192:
            literals.append(data[position])
            position += 1
            continue
        length = 3
        while length < 264 and position + length < len(data) and data[candidate + length] == data[position + length]:
            length += 1
        flush()
        distance = position - candidate - 1
        high = distance >> 8
        if length - 2 < 7:
            out.append((length - 2) << 5 | high)
        else:
            out += bytes([7 << 5 | high, length - 9])
        out.append(distance & 255)
        position += length
    flush()
    return bytes(out)


def pcd(header, body=b""):
    return ("\n".join(header) + "\n").encode() + body


def xyzi_header(encoding, num_points=3, **changes):
    lines = {
        "VERSION": "0.7", "FIELDS": "x y z intensity", "SIZE": "4 4 4 4", "TYPE": "F F F F",
        "COUNT": "1 1 1 1", "WIDTH": str(num_points), "HEIGHT": "1",
        "VIEWPOINT": "0 0 0 1 0 0 0", "POINTS": str(num_points), "DATA": encoding,
    } | changes  # fmt: skip
    return ["# .PCD v0.7", *(f"{k} {v}" for k, v in lines.items() if v is not None)]


def compressed_body(columns):
    plain = b"".join(column.tobytes() for column in columns)
    packed = lzf_compress(plain)
    return np.array([len(packed), len(plain)], "<u4").tobytes() + packed


@pytest.fixture
def write(tmp_path):
    def write_file(name, content):
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write_file


class TestColumns:
    def test_names(self):
        assert parse_columns("x, y,z,time") == ("x", "y", "z", "time")

    @pytest.mark.parametrize("text", ["", "x,y", "x,y,z,", "x,y,z,x"])
    def test_refused(self, text):
        with pytest.raises(DataError, match="expected different names with x, y and z"):
            parse_columns(text)


class TestNpy:
    @pytest.mark.parametrize("dtype", ["<f4", ">f4", "f8", "i2", "u1"])
    def test_any_number_type(self, tmp_path, dtype):
        values = np.arange(8).reshape(2, 4).astype(dtype)
        np.save(tmp_path / "a.npy", values)
        points = points_from_npy(tmp_path / "a.npy")
        assert points.dtype == np.dtype(np.float32)
        assert points.tolist() == values.tolist()

    def test_column_major(self, tmp_path):
        np.save(tmp_path / "a.npy", np.asfortranarray(POINTS))
        points = points_from_npy(tmp_path / "a.npy")
        assert points.flags.c_contiguous
        np.testing.assert_array_equal(points, POINTS)

    def test_empty(self, tmp_path):
        np.save(tmp_path / "a.npy", np.empty((0, 4)))
        assert points_from_npy(tmp_path / "a.npy").shape == (0, 4)

    @pytest.mark.parametrize("values", [np.zeros(4), np.zeros((1, 2, 3)), np.array([["a"]])])
    def test_other_arrays(self, tmp_path, values):
        np.save(tmp_path / "a.npy", values)
        with pytest.raises(DataError, match=r"shape \(.*expected numbers of shape"):
            points_from_npy(tmp_path / "a.npy")

    @pytest.mark.parametrize(
        "content", [b"", b"hello", b"PK\x03\x04", b"\x93NUMPY\x01\x00\xff", b"\x93NUMPY\x01\x00\x01\x00("]
    )
    def test_other_contents(self, write, content):
        with pytest.raises(DataError, match="not a NumPy array"):
            points_from_npy(write("a.npy", content))

    def test_cut_short(self, tmp_path, write):
        np.save(tmp_path / "a.npy", POINTS)
        with pytest.raises(DataError, match="not a NumPy array"):
            points_from_npy(write("b.npy", (tmp_path / "a.npy").read_bytes()[:-4]))

    def test_objects_are_not_unpickled(self, tmp_path):
        np.save(tmp_path / "a.npy", np.array([[{}]], dtype=object), allow_pickle=True)
        with pytest.raises(DataError, match="not a NumPy array"):
            points_from_npy(tmp_path / "a.npy")

    def test_missing(self, tmp_path):
        with pytest.raises(DataError, match="cannot be read: No such file"):
            points_from_npy(tmp_path / "a.npy")


class TestBin:
    def test_default_columns(self, write):
        points = points_from_bin(write("a.bin", POINTS.tobytes()))
        np.testing.assert_array_equal(points, POINTS)
        assert points.flags.writeable

    def test_five_columns(self, write):
        values = np.arange(10, dtype="<f4")
        points = points_from_bin(write("a.bin", values.tobytes()), ("x", "y", "z", "i", "time"))
        assert points.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]

    def test_empty(self, write):
        assert points_from_bin(write("a.bin", b"")).shape == (0, 4)

    def test_size_is_no_multiple(self, write):
        path = write("a.bin", bytes(50))
        with pytest.raises(DataError, match=r"50 bytes.*multiple of 16: 4 columns \(x,y,z,int"):
            points_from_bin(path)


class TestPcd:
    def test_ascii(self, write):
        body = b"1 -2 0.5 1e2\nnan 0 0 0\n3 4 -5 255\n"
        points, columns = points_from_pcd(write("a.pcd", pcd(xyzi_header("ascii"), body)))
        assert columns == ("x", "y", "z", "intensity")
        np.testing.assert_array_equal(points, POINTS)

    def test_binary(self, write):
        path = write("a.pcd", pcd(xyzi_header("binary"), POINTS.tobytes()))
        np.testing.assert_array_equal(points_from_pcd(path)[0], POINTS)

    def test_binary_compressed(self, write):
        body = compressed_body(list(POINTS.T.copy()))
        path = write("a.pcd", pcd(xyzi_header("binary_compressed"), body))
        np.testing.assert_array_equal(points_from_pcd(path)[0], POINTS)

    @pytest.mark.parametrize("encoding", ["binary", "binary_compressed"])
    def test_mixed_types_counts_and_padding(self, write, encoding):
        dtype = np.dtype(
            [("ring", "<u2"), ("_", "u1", 3), ("x", "<f8"), ("n", "<f4", 2), ("y", "i1"),
             ("z", "<i8"), ("_2", "u1")]
        )  # fmt: skip
        table = np.zeros(4, dtype)
        table["ring"], table["x"], table["y"] = [1, 2, 3, 65535], [0.1, -1, 2, 1e300], -7
        table["z"], table["n"] = 2**40, [[1, 2]] * 4
        header = xyzi_header(
            encoding, 4, FIELDS="ring _ x n y z _", SIZE="2 1 8 4 1 8 1", TYPE="U U F F I I U",
            COUNT="1 3 1 2 1 1 1", WIDTH="2", HEIGHT="2",
        )  # fmt: skip
        columns = [np.ascontiguousarray(table[name]) for name in dtype.names]
        body = table.tobytes() if encoding == "binary" else compressed_body(columns)
        points, names = points_from_pcd(write("a.pcd", pcd(header, body)))
        assert names == ("ring", "x", "n", "y", "z")
        assert points[3].tolist() == [65535, np.inf, 1, -7, 2**40]
        assert points[:, 0].tolist() == [1, 2, 3, 65535]

    @pytest.mark.parametrize("encoding", ["ascii", "binary", "binary_compressed"])
    def test_no_points(self, write, encoding):
        points, columns = points_from_pcd(write("a.pcd", pcd(xyzi_header(encoding, 0))))
        assert points.shape == (0, 4)
        assert len(columns) == 4

    def test_lines_that_may_lack(self, write):
        header = xyzi_header("ascii", 1, COUNT=None, POINTS=None, VERSION=None, HEIGHT=None)
        points, _ = points_from_pcd(write("a.pcd", pcd(header, b"1 2 3 4")))
        assert points.tolist() == [[1, 2, 3, 4]]

    def test_line_ends_of_windows(self, write):
        content = pcd(xyzi_header("ascii", 1), b"1 2 3 4\n").replace(b"\n", b"\r\n")
        assert points_from_pcd(write("a.pcd", content))[0].tolist() == [[1, 2, 3, 4]]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"SIZE": "4 4 4"}, "SIZE is 4 4 4; expected 4 whole numbers"),
            ({"SIZE": None}, "SIZE is missing"),
            ({"SIZE": "4 4 4 2"}, "'intensity' has TYPE F, SIZE 2 and COUNT 1"),
            ({"TYPE": "F F F X"}, "'intensity' has TYPE X"),
            ({"TYPE": "F"}, "4 FIELDS and 1 in TYPE"),
            ({"COUNT": "1 1 1 0"}, "COUNT 0"),
            ({"FIELDS": ""}, "SIZE is 4 4 4 4; expected 0"),
            ({"FIELDS": "_ _ _ _"}, "one that is not padding"),
            ({"WIDTH": "many"}, "WIDTH is many"),
            ({"POINTS": "7"}, "POINTS 7 is not WIDTH 3 x HEIGHT 1"),
            ({"WIDTH": "-3", "POINTS": "-3"}, "POINTS -3"),
            ({"DATA": "zip"}, "DATA is 'zip'; expected ascii, binary, binary_compressed"),
        ],
    )
    def test_wrong_headers(self, write, changes, message):
        path = write("a.pcd", pcd(xyzi_header("binary", **changes), POINTS.tobytes()))
        with pytest.raises(DataError, match=message):
            points_from_pcd(path)

    @pytest.mark.parametrize("content", [b"", b"hello\n", b"\x00\xff" * 50, b"# only\n" * 3])
    def test_other_contents(self, write, content):
        with pytest.raises(DataError, match="no PCD file"):
            points_from_pcd(write("a.pcd", content))

    @pytest.mark.parametrize(
        ("encoding", "body", "message"),
        [
            ("ascii", b"1 2 3 4\n5 6", "has 6 numbers; expected 12"),
            ("ascii", b"1 2 three 4\n" * 3, "something else than numbers"),
            ("binary", bytes(47), "47 bytes of points; expected 48"),
            ("binary_compressed", bytes(7), "ends after its header"),
            ("binary_compressed", np.array([9, 47], "<u4").tobytes(), "expected 48"),
            ("binary_compressed", np.array([9, 48], "<u4").tobytes(), "0 compressed bytes"),
            ("binary_compressed", np.array([2, 48], "<u4").tobytes() + b"\x00a", "got 1 bytes"),
        ],
    )
    def test_wrong_bodies(self, write, encoding, body, message):
        with pytest.raises(DataError, match=message):
            points_from_pcd(write("a.pcd", pcd(xyzi_header(encoding), body)))

    def test_impossible_size_is_refused_before_memory_is_taken(self, write):
        header = xyzi_header("binary", 10**15)
        with pytest.raises(DataError, match="48 bytes of points; expected 16000000000000000"):
            points_from_pcd(write("a.pcd", pcd(header, POINTS.tobytes())))


class TestLzf:
    def test_by_hand(self):
        literal = b"\x02abc"
        assert lzf_decompress(literal, 3) == b"abc"
        # length 3 + 2 from 3 bytes back: reaches into what it writes
        assert lzf_decompress(literal + bytes([3 << 5, 2]), 8) == b"abcabcab"
        # long form: 7 + 4 + 2 bytes from 1 byte back
        assert lzf_decompress(b"\x00a" + bytes([7 << 5, 4, 0]), 14) == b"a" * 14

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (b"\x02ab", "literal run ends 1 bytes behind"),
            (b"\x00a\x20", "inside a back reference"),
            (b"\x00a\xe0\x01", "inside a back reference"),
            (b"\x00a\x20\x01", "1 bytes before the start"),
            (b"\x01ab", "got 2 bytes, expected 5"),
            (b"\x00a" + bytes([7 << 5, 255, 0]) * 9, r"got \d+ bytes, expected 5"),
        ],
    )
    def test_broken(self, data, message):
        with pytest.raises(ValueError, match=message):
            lzf_decompress(data, 5)

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.sampled_from([b"a", b"bc", b"\x00" * 40, b"xyz" * 100]), max_size=60))
    def test_round_trip(self, pieces):
        data = b"".join(pieces)
        assert lzf_decompress(lzf_compress(data), len(data)) == data

    @settings(max_examples=200, deadline=None)
    @given(st.binary(max_size=60))
    def test_noise_gives_bytes_or_an_error(self, data):
        with contextlib.suppress(ValueError):
            assert len(lzf_decompress(data, 20)) == 20
