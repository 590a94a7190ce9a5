"""Clouds in files: NumPy arrays, raw float32 and the Point Cloud Data format (PCD).

NaN and (0, 0, 0) stay: point i of the file is row i of the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dsvt_ros.errors import DataError

DEFAULT_COLUMNS = ("x", "y", "z", "intensity")

# PCD: sizes in bytes of each TYPE
_PCD_SIZES = {"I": (1, 2, 4, 8), "U": (1, 2, 4, 8), "F": (4, 8)}
_PCD_KEYS = (
    "VERSION",
    "FIELDS",
    "SIZE",
    "TYPE",
    "COUNT",
    "WIDTH",
    "HEIGHT",
    "VIEWPOINT",
    "POINTS",
)
_MAX_HEADER_BYTES = 1 << 16


def parse_columns(text: str) -> tuple[str, ...]:
    """Column names from ``x,y,z,intensity``.

    Raises:
        DataError: An empty or repeated name, or no x, y and z.
    """
    columns = tuple(name.strip() for name in text.split(","))
    missing = [name for name in ("x", "y", "z") if name not in columns]
    if "" in columns or len(set(columns)) < len(columns) or missing:
        raise DataError(
            f"got columns {text!r}; expected different names with x, y and z among them, "
            f"such as {','.join(DEFAULT_COLUMNS)}"
        )
    return columns


def points_from_npy(path: Path) -> NDArray[np.float32]:
    """(N, C) float32 from an ``.npy`` file of any number type; pickled objects are refused.

    Raises:
        DataError: The file cannot be read, or holds something else.
    """
    try:
        with path.open("rb") as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # the header is Python text: its parser raises what it meets
        raise DataError(f"{path} is not a NumPy array of numbers: {error}; write it with numpy.save") from error
    if array.ndim != 2 or array.dtype.kind not in "fiu":
        raise DataError(
            f"{path} holds an array of shape {array.shape} and type {array.dtype}; "
            "expected numbers of shape (points, columns)"
        )
    return _float32(array)


def points_from_bin(path: Path, columns: Sequence[str] = DEFAULT_COLUMNS) -> NDArray[np.float32]:
    """(N, C) float32 from raw little-endian float32, point after point, as KITTI stores it.

    Raises:
        DataError: The file cannot be read, or is no whole number of points.
    """
    data = _read(path)
    point_bytes = 4 * len(columns)
    if len(data) % point_bytes:
        raise DataError(
            f"{path} has {len(data)} bytes, which is no multiple of {point_bytes}: {len(columns)} "
            f"columns ({','.join(columns)}) of 4 bytes; name the columns it has with --columns"
        )
    values = np.frombuffer(data, dtype="<f4").astype(np.float32)
    return values.reshape(-1, len(columns))


def points_from_pcd(path: Path) -> tuple[NDArray[np.float32], tuple[str, ...]]:
    """Points and column names of a PCD file, version 0.6 or later, in any of its encodings.

    Of fields with several elements the first is taken; padding (fields named ``_``) and repeated
    names are left out. VIEWPOINT is not applied: points stay in the frame they were stored in.

    Returns:
        (N, C) float32, organised clouds row by row, and C names.

    Raises:
        DataError: The file cannot be read, is cut short or contradicts its header.
    """
    data = _read(path)
    header = _pcd_header(path, data)
    wanted = [index for index, name in enumerate(header.names) if name != "_" and name not in header.names[:index]]
    names = tuple(header.names[index] for index in wanted)
    if header.num_points == 0:
        return np.empty((0, len(wanted)), dtype=np.float32), names
    decode = _PCD_DECODERS[header.encoding]
    fields = decode(path, header, memoryview(data)[header.num_bytes :])
    return np.stack([_float32(fields[index]) for index in wanted], axis=1), names


def lzf_decompress(data: bytes | memoryview, num_bytes: int) -> bytes:
    """Decompress LZF, the compression inside PCD files.

    The stream is a sequence of literal runs (a control byte below 32: length - 1, then the bytes)
    and back references (three bits length - 2, 13 bits distance - 1; a length of 9 and more has
    its excess in a byte of its own between the two bytes of the distance).

    Args:
        data: Compressed bytes.
        num_bytes: Size of what they hold.

    Raises:
        ValueError: The stream is broken or of another size.
    """
    out = bytearray()
    position = 0
    end = len(data)
    while position < end and len(out) <= num_bytes:
        control = data[position]
        position += 1
        if control < 32:
            stop = position + control + 1
            if stop > end:
                raise ValueError(f"a literal run ends {stop - end} bytes behind the data")
            out += data[position:stop]
            position = stop
            continue
        length = control >> 5
        extra = 1 if length == 7 else 0
        if position + extra >= end:
            raise ValueError("the data ends inside a back reference")
        if extra:
            length += data[position]
        distance = ((control & 31) << 8) + data[position + extra] + 1
        position += extra + 1
        length += 2
        start = len(out) - distance
        if start < 0:
            raise ValueError(f"a back reference points {-start} bytes before the start")
        pattern = out[start : start + length]
        if distance < length:  # the reference reaches into what it writes: the pattern repeats
            pattern = (pattern * (length // distance + 1))[:length]
        out += pattern
    if len(out) != num_bytes:
        raise ValueError(f"got {len(out)} bytes, expected {num_bytes}")
    return bytes(out)


@dataclass(frozen=True)
class _PcdHeader:
    """What a PCD header says; `num_bytes` is its own size."""

    names: tuple[str, ...]
    dtypes: tuple[np.dtype[np.generic], ...]
    counts: tuple[int, ...]
    num_points: int
    encoding: str
    num_bytes: int

    @property
    def point_bytes(self) -> int:
        """Bytes of one point in the binary encodings."""
        return sum(d.itemsize * n for d, n in zip(self.dtypes, self.counts, strict=True))


def _pcd_header(path: Path, data: bytes) -> _PcdHeader:
    """The header, checked."""
    entries: dict[str, list[str]] = {}
    position = 0
    while "DATA" not in entries:
        end = data.find(b"\n", position, _MAX_HEADER_BYTES)
        if end < 0:
            raise DataError(f"{path} is no PCD file: its header has no DATA line")
        words = data[position:end].decode("ascii", "replace").split()
        position = end + 1
        if not words or words[0].startswith("#"):
            continue
        key = "FIELDS" if words[0] == "COLUMNS" else words[0]
        if key != "DATA" and key not in _PCD_KEYS:
            raise DataError(f"{path} is no PCD file: its header has a line {key[:40]!r}")
        entries[key] = words[1:]

    names = tuple(entries.get("FIELDS", ()))
    sizes = _integers(path, entries, "SIZE", len(names))
    counts = _integers(path, entries, "COUNT", len(names), default=[1] * len(names))
    types = entries.get("TYPE", [])
    if not set(names) - {"_"} or len(types) != len(names):
        raise DataError(
            f"{path}: the header has {len(names)} FIELDS and {len(types)} in TYPE; "
            "expected as many, and one that is not padding"
        )
    for name, letter, size, count in zip(names, types, sizes, counts, strict=True):
        if size not in _PCD_SIZES.get(letter, ()) or count < 1:
            raise DataError(
                f"{path}: field {name!r} has TYPE {letter}, SIZE {size} and COUNT {count}; "
                "expected I or U with 1, 2, 4 or 8, or F with 4 or 8, and a COUNT from 1"
            )

    (width,) = _integers(path, entries, "WIDTH", 1)
    (height,) = _integers(path, entries, "HEIGHT", 1, default=[1])
    (num_points,) = _integers(path, entries, "POINTS", 1, default=[width * height])
    if min(width, height) < 0 or num_points != width * height:
        raise DataError(
            f"{path}: POINTS {num_points} is not WIDTH {width} x HEIGHT {height}; the header contradicts itself"
        )
    encoding = " ".join(entries["DATA"])
    if encoding not in _PCD_DECODERS:
        raise DataError(f"{path}: DATA is {encoding!r}; expected {', '.join(_PCD_DECODERS)}")
    dtypes = tuple(np.dtype(f"<{t.lower()}{s}") for t, s in zip(types, sizes, strict=True))
    return _PcdHeader(names, dtypes, tuple(counts), num_points, encoding, position)


def _integers(
    path: Path,
    entries: dict[str, list[str]],
    key: str,
    length: int,
    default: list[int] | None = None,
) -> list[int]:
    """Integers of a header line."""
    if key not in entries and default is not None:
        return default
    words = entries.get(key, [])
    try:
        values = [int(word) for word in words]
    except ValueError:
        values = []
    if len(values) != length:
        raise DataError(
            f"{path}: the header's {key} is {' '.join(words) or 'missing'}; "
            f"expected {length} whole number{'s' if length > 1 else ''}"
        )
    return values


def _pcd_ascii(path: Path, header: _PcdHeader, body: memoryview) -> list[NDArray[np.generic]]:
    """First element of each field, from words between white space."""
    words = bytes(body).split()
    num_columns = sum(header.counts)
    expected = header.num_points * num_columns
    if len(words) < expected:
        raise DataError(
            f"{path} has {len(words)} numbers; expected {expected}: {header.num_points} points "
            f"of {num_columns}. It is cut short or its header is wrong"
        )
    try:
        table = np.array(words[:expected], dtype=np.float64).reshape(-1, num_columns)
    except ValueError as error:
        raise DataError(f"{path} has something else than numbers in it: {error}") from error
    firsts = np.cumsum((0, *header.counts[:-1]))
    return [table[:, first] for first in firsts]


def _pcd_binary(path: Path, header: _PcdHeader, body: memoryview) -> list[NDArray[np.generic]]:
    """First element of each field, from packed points."""
    _check_size(path, header, len(body))
    offsets = np.cumsum([0, *(d.itemsize * n for d, n in zip(header.dtypes, header.counts, strict=True))])
    shape, strides = (header.num_points,), (header.point_bytes,)
    return [
        np.ndarray(shape, dtype, body, int(offset), strides)
        for dtype, offset in zip(header.dtypes, offsets, strict=False)
    ]


def _pcd_compressed(path: Path, header: _PcdHeader, body: memoryview) -> list[NDArray[np.generic]]:
    """Two uint32 sizes, then LZF of all points' first field, all points' second field, ..."""
    if len(body) < 8:
        raise DataError(f"{path} ends after its header; expected two sizes and compressed points")
    compressed, uncompressed = (int(size) for size in np.frombuffer(body[:8], dtype="<u4"))
    _check_size(path, header, uncompressed)
    if len(body) - 8 < compressed:
        raise DataError(f"{path} has {len(body) - 8} compressed bytes; expected {compressed}: it is cut short")
    try:
        data = lzf_decompress(body[8 : 8 + compressed], uncompressed)
    except ValueError as error:
        raise DataError(f"{path}: its compressed points are broken: {error}") from error
    fields: list[NDArray[np.generic]] = []
    offset = 0
    for dtype, count in zip(header.dtypes, header.counts, strict=True):
        stride = dtype.itemsize * count
        fields.append(np.ndarray((header.num_points,), dtype, data, offset, (stride,)))
        offset += stride * header.num_points
    return fields


_PCD_DECODERS = {
    "ascii": _pcd_ascii,
    "binary": _pcd_binary,
    "binary_compressed": _pcd_compressed,
}


def _check_size(path: Path, header: _PcdHeader, num_bytes: int) -> None:
    expected = header.num_points * header.point_bytes
    if num_bytes < expected:
        raise DataError(
            f"{path} has {num_bytes} bytes of points; expected {expected}: {header.num_points} "
            f"points of {header.point_bytes}. It is cut short or its header is wrong"
        )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _float32(values: NDArray[np.generic]) -> NDArray[np.float32]:
    """Nearest float32; doubles beyond its range become ±Inf."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.ascontiguousarray(values, dtype=np.float32)
