"""Read the lines of a text file in any usual encoding, compression and form of line ends, in blocks of bounded memory."""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from twotower.errors import DataError

COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", **{b"BZh%d1AY&" % level: "bz2" for level in range(1, 10)}}
ARCHIVES = {
    b"PK\x03\x04": "a zip archive or a spreadsheet",
    b"\xfd7zXZ": "xz",
    b"SQLite": "an SQLite database",
    b"7z\xbc": "7-zip",
}
ENGINES = ("duckdb", "_duckdb", "pyspark", "py4j", "pyarrow")  # modules of the engines' errors
OUT_OF_MEMORY = "OutOfMemoryException"  # DuckDB's error
INTERRUPTED = "Query interrupted"  # the text of DuckDB's `RuntimeError` after Ctrl-C
BLOCK_BYTES = 1 << 23
MAX_LINE_BYTES = 1 << 25
FREE_BYTES, MAX_RATIO = 1 << 28, 200  # a larger file must not unpack to more than so many times its size
BOMS = (  # that of UTF-32 begins like that of UTF-16
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def base_suffix(file: Path) -> str:
    """Return the suffix of a file's name below that of its compression, in lower case.

    Examples
    --------
    >>> base_suffix(Path("orders.CSV.gz"))
    '.csv'
    """
    name = Path(file.stem) if file.suffix.lower() in COMPRESSED else file
    return name.suffix.lower()


def open_bytes(file: Path) -> Any:
    """Open a plain or compressed file for reading; its suffix names the compression."""
    compression = compression_of(file)
    source = pa.input_stream(str(file), compression=compression)
    return _Unpacked(file, source) if compression else source


class _Unpacked:
    """Content of a compressed file, of which no more is read than `check_ratio` allows."""

    def __init__(self, file: Path, source: Any) -> None:
        self._file, self._source, self._size = file, source, 0

    def __enter__(self) -> _Unpacked:
        return self

    def __exit__(self, *_: object) -> None:
        self._source.close()

    def read(self, size: int) -> bytes:
        """Return at most `size` further bytes."""
        data: bytes = self._source.read(size)
        self._count(len(data))
        return data

    def readinto(self, buffer: bytearray) -> int:
        """Read further bytes into a buffer, and return their number."""
        size: int = self._source.readinto(buffer)
        self._count(size)
        return size

    def _count(self, size: int) -> None:
        self._size += size
        check_ratio(self._file, self._size)


def check_ratio(file: Path, size: int) -> None:
    """Raise `DataError` if a file of which `size` bytes are unpacked expands beyond all proportion to what it takes on disk."""
    if size > FREE_BYTES and size > MAX_RATIO * file.stat().st_size:
        raise DataError(
            f"{file} of {file.stat().st_size:,} bytes unpacks to more than {size:,}. Allowed are {FREE_BYTES >> 20} MiB, or "
            f"{MAX_RATIO} times the size of the file. If its content is right, write it as plain text and name that file."
        )


def compression_of(file: Path) -> str | None:
    """Return how a file is compressed: as its suffix says, else as its first bytes do.

    Raises
    ------
    DataError
        The file is an archive of files, or Parquet.
    """
    if file.suffix.lower() in COMPRESSED:
        return COMPRESSED[file.suffix.lower()]
    with file.open("rb") as source:
        start = source.read(8)
    if start.startswith(b"PAR1"):
        raise DataError(f"{file} is a Parquet file. Its name must end with .parquet or .pq. Rename it.")
    for sign, what in ARCHIVES.items():
        if start.startswith(sign):
            raise DataError(f"{file} is {what}. Expected text, JSON or Parquet. Unpack it and name the file inside.")
    return next((name for sign, name in MAGIC.items() if start.startswith(sign)), None)


@contextmanager
def engine_errors() -> Iterator[None]:
    """Turn the engine's errors about too little memory and about Ctrl-C into `DataError` and `KeyboardInterrupt`."""
    try:
        yield
    except Exception as error:
        if type(error).__name__ == OUT_OF_MEMORY:
            raise DataError("Too little memory to read these data. Use a larger machine, or prepare.engine=spark.") from error
        if isinstance(error, RuntimeError) and str(error) == INTERRUPTED:
            raise KeyboardInterrupt from None
        raise


@contextmanager
def reading(file: Path, more: int = 0) -> Iterator[None]:
    """Turn an engine's error about an unreadable file into a `DataError` that names it, and the number of other files."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, (EOFError, OSError, UnicodeError)) and type(error).__module__.partition(".")[0] not in ENGINES:
            raise
        if type(error).__name__ == OUT_OF_MEMORY:
            raise
        names = f"{file} (or one of {more:,} files read with it)" if more else f"{file}"
        raise DataError(f"{names} is not readable to its end: {_one_line(error)} Restore or replace the file.") from None


def _one_line(error: Exception) -> str:
    """Return the first line of an error message, ending with a full stop."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return text if text.endswith(".") else f"{text}."


@contextmanager
def unchanged(files: Iterable[Path]) -> Iterator[None]:
    """Raise `DataError` if a file changes while it is read: rows read before and after would not fit together."""
    before = {file: os.stat(file) for file in files}
    yield
    for file, stat in before.items():
        _check_same(file, stat)


def _check_same(file: Path, before: os.stat_result) -> None:
    after = os.stat(file)
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise DataError(f"{file} changed while it was read. A file must stay as it is until the end. Read a finished copy.")


def text_blocks(file: Path, encoding: str | None = None) -> Iterator[bytes]:
    """Yield a text file in blocks of whole lines, as UTF-8 that ends its lines with line feeds.

    A byte order mark is left out. Without an encoding, bytes that are not UTF-8 are yielded as they are.

    Raises
    ------
    DataError
        The text is in another encoding, or a line is longer than `MAX_LINE_BYTES`.
    """
    rest, old_mac = b"", None
    for chunk in _utf8(file, encoding):
        block = rest + chunk
        if old_mac is None:
            old_mac = b"\r" in block.partition(b"\n")[0].removesuffix(b"\r")
        if old_mac:
            block = block.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        cut = block.rfind(b"\n") + 1
        rest = block[cut:]
        if cut:
            yield _line_feeds(block[:cut])
        if len(rest) > MAX_LINE_BYTES:
            raise DataError(
                f"{file} has a line of more than {MAX_LINE_BYTES >> 20} MiB that begins with {rest[:40]!r}. It is not a table of "
                "lines, or its line ends are missing. Convert the file."
            )
    if rest:
        yield _line_feeds(rest.rstrip(b"\r") + b"\n")


def _line_feeds(block: bytes) -> bytes:
    block = block.replace(b"\r\n", b"\n") if b"\r" in block else block
    if codecs.BOM_UTF8 in block:  # a mark inside the text is that of a file that was joined to another
        block = block.replace(b"\n" + codecs.BOM_UTF8, b"\n").removeprefix(codecs.BOM_UTF8)
    return block


def _utf8(file: Path, encoding: str | None) -> Iterator[bytes]:
    """Yield the content of a file as UTF-8, without a byte order mark."""
    before = os.stat(file)
    left = sys.maxsize if compression_of(file) else before.st_size
    with open_bytes(file) as source:
        chunk = source.read(min(BLOCK_BYTES, left))
        left -= len(chunk)
        mark, marked = next(((mark, name) for mark, name in BOMS if chunk.startswith(mark)), (b"", None))
        if encoding in (None, "utf-8", "utf-16", "utf-32", marked):
            chunk, encoding = chunk[len(mark) :], marked or encoding
        if encoding in (None, "utf-8"):
            _check_no_utf16(file, chunk)
        decoder = None if encoding in (None, "utf-8") else codecs.getincrementaldecoder(str(encoding))()
        try:
            while chunk:
                _check_same(file, before)
                yield decoder.decode(chunk).encode("utf-8", "surrogatepass") if decoder else chunk
                chunk = source.read(min(BLOCK_BYTES, left))
                left -= len(chunk)
            _check_same(file, before)
            if decoder:
                yield decoder.decode(b"", True).encode()
        except UnicodeError as error:
            raise DataError(
                f"{file} is not {encoding} text: {str(error)[:120]}. Set the table's encoding to that of the file, or restore it."
            ) from None


def _check_no_utf16(file: Path, chunk: bytes) -> None:
    start = chunk[:4096]
    if start.count(0) * 4 > len(start) >= 8:
        name = "utf-16-le" if start[1::2].count(0) > start[::2].count(0) else "utf-16-be"
        raise DataError(f"{file} is not UTF-8 text: every other byte is zero, as in UTF-16. Set the table's encoding: {name}.")


def count_lines(file: Path) -> int:
    """Return the number of lines of a UTF-8 file. The bytes are not copied: files of gigabytes are counted beside their parsing."""
    buffer, total, last = bytearray(BLOCK_BYTES), 0, b"\n"
    with open_bytes(file) as source:
        while size := source.readinto(buffer):
            total += buffer.count(b"\n", 0, size)
            last = bytes(buffer[size - 1 : size])
    return total + (last != b"\n")


def numbered_lines(file: Path, encoding: str | None = None) -> Iterator[tuple[int, bytes]]:
    """Yield number (from 1) and content of every line that is not blank."""
    number = 0
    for block in text_blocks(file, encoding):
        if not block.strip(b"\n"):
            number += len(block)
            continue
        for line in block[:-1].split(b"\n"):
            number += 1
            if line and not line.isspace():
                yield number, line
