# SPDX-License-Identifier: Apache-2.0
"""The file format of every index: named arrays and a JSON description in one file.

Layout, little-endian throughout:

    bytes 0..7     magic "PENTAD\\r\\n" (the line end shows text-mode damage)
    8..11          format version, uint32
    12..15         crc32 of the header text
    16..23         length of the header text, uint64
    24..           header: JSON {kind, meta, sections: [{name, dtype, shape, offset, crc32}], size}
    ...            sections, each on a 64-byte boundary

A file is written beside its target, flushed to the disk and renamed over it, so that a save cut
short leaves the old file whole. It is read by mapping: sections are views of the file.
"""

import contextlib
import json
import math
import os
import secrets
import struct
import zlib
from pathlib import Path

import numpy as np

from pentad._errors import FormatError

_MAGIC = b"PENTAD\r\n"
_VERSION = 1
_PREFIX = struct.Struct("<8sIIQ")
_ALIGN = 64
_DTYPES = frozenset(
    ["bool", "float16", "float32", "float64"]
    + [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
)


def _aligned(n: int) -> int:
    return -(-n // _ALIGN) * _ALIGN


def _bytes(array: np.ndarray) -> memoryview:
    return memoryview(array.reshape(-1).view(np.uint8)) if array.size else memoryview(b"")


def write(path, kind: str, meta: dict, arrays: dict[str, np.ndarray]) -> None:
    """Write `arrays` and the JSON values of `meta` to `path`, atomically.

    Raises
    ------
    TypeError
        For an array of a type outside bool, integers and floats.
    OSError
        When the folder cannot be written; an existing file is left as it was.
    """
    path = Path(os.path.realpath(path))  # a link keeps pointing at the file
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent}")
    sections, payload, offset = [], [], 0
    for name, array in arrays.items():
        dtype = array.dtype.newbyteorder("<")
        if dtype.name not in _DTYPES:
            raise TypeError(f"[save] section {name} has dtype {array.dtype}")
        array = np.asarray(array, dtype=dtype, order="C")
        sections.append(
            {
                "name": name,
                "dtype": dtype.name,
                "shape": list(array.shape),
                "offset": offset,
                "crc32": zlib.crc32(_bytes(array)),
            }
        )
        payload.append((offset, array))
        offset = _aligned(offset + array.nbytes)
    text = json.dumps({"kind": kind, "meta": meta, "sections": sections, "size": offset}).encode()
    prefix = _PREFIX.pack(_MAGIC, _VERSION, zlib.crc32(text), len(text))
    start = _aligned(len(prefix) + len(text))

    temporary = path.parent / f".{path.name[:100]}.{secrets.token_hex(6)}"
    new = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)  # which Windows has
    handle = os.open(temporary, new, 0o666)  # less the umask
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(prefix + text)
            for offset_of, array in payload:
                file.seek(start + offset_of)
                file.write(_bytes(array))
            file.truncate(start + offset)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            os.chmod(temporary, path.stat().st_mode & 0o777)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where folders can be opened."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read(path, kind: str, *, mmap: bool = True, verify: bool = True):
    """Read a file written by `write`.

    Parameters
    ----------
    path : str or path-like
    kind : str
        What the file must hold.
    mmap : bool
        Map the file rather than read it; the arrays are read-only either way.
    verify : bool
        Compare every section with its checksum, which reads the whole file once. Structure, bounds
        and the header are always checked.

    Returns
    -------
    meta : dict
    arrays : dict of str to read-only numpy.ndarray

    Raises
    ------
    FormatError
        If the file is truncated, altered, no file of this package, or of another kind or version.
    FileNotFoundError
    """
    path = Path(path)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        header, start = _read_header(path, file, size)
        if mmap:
            buffer = np.memmap(file, dtype=np.uint8, mode="r")
        else:
            file.seek(0)
            buffer = np.frombuffer(file.read(), dtype=np.uint8)
    arrays = {}
    try:
        if header["kind"] != kind:
            raise FormatError(f"{path} holds '{header['kind']}', expected '{kind}'")
        if start + header["size"] != size:
            raise FormatError(
                f"{path} has {size} bytes, expected {start + header['size']}: truncated?"
            )
        for section in header["sections"]:
            arrays[section["name"]] = _section(path, buffer, start, section, verify)
        return header["meta"], arrays
    except FormatError:
        raise
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise FormatError(f"{path} has a malformed header: {error!r}") from error


def _read_header(path: Path, file, size: int) -> tuple[dict, int]:
    prefix = file.read(_PREFIX.size)
    if len(prefix) < _PREFIX.size or not prefix.startswith(_MAGIC):
        raise FormatError(f"{path} is not a pentad file")
    _, version, checksum, length = _PREFIX.unpack(prefix)
    if version != _VERSION:
        raise FormatError(f"{path} has format version {version}, this release reads {_VERSION}")
    if length > size:
        raise FormatError(f"{path} is truncated or its header is damaged")
    text = file.read(length)
    if len(text) != length or zlib.crc32(text) != checksum:
        raise FormatError(f"{path} has a damaged header")
    try:
        return json.loads(text), _aligned(_PREFIX.size + length)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} has a header that is not JSON") from error


def _section(path: Path, buffer, start: int, section: dict, verify: bool) -> np.ndarray:
    name, shape = section["name"], tuple(section["shape"])
    if section["dtype"] not in _DTYPES or any(not isinstance(n, int) or n < 0 for n in shape):
        raise FormatError(f"{path}: section {name} is malformed")
    dtype = np.dtype(section["dtype"]).newbyteorder("<")
    first = start + section["offset"]
    data = buffer[first : first + math.prod(shape) * dtype.itemsize]
    if section["offset"] % _ALIGN:
        raise FormatError(f"{path}: section {name} is not on a {_ALIGN}-byte boundary")
    if len(data) != math.prod(shape) * dtype.itemsize or section["offset"] < 0:
        raise FormatError(f"{path}: section {name} reaches past the end of the file")
    if verify and zlib.crc32(data) != section["crc32"]:
        raise FormatError(f"{path}: section {name} does not match its checksum")
    array = np.ndarray(shape, dtype, buffer=data) if len(data) else np.zeros(shape, dtype)
    array.flags.writeable = False
    return array
