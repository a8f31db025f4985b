"""Read JSON in any usual form: lines, one array, objects over several lines, and lines of Python dicts.

The engine reads JSON lines in UTF-8. A file in another form is first written as such lines, beside the engine's other temporary
files; the rows keep the line numbers of the original.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any

from twotower.data.sources.python_values import python_value
from twotower.data.sources.text_files import (
    BLOCK_BYTES,
    BOMS,
    COMPRESSED,
    MAX_LINE_BYTES,
    compression_of,
    count_lines,
    numbered_lines,
    open_bytes,
    text_blocks,
)
from twotower.errors import DataError

SAMPLED_LINES = 1000  # lines that are read to find the keys
GLOB = set("*?[]{}=")  # characters of a path that an engine takes for a pattern, or for a partition
NEXT_OBJECT = re.compile(r"\n\{|\}, ?\{")
PIECE_CHARS = 1 << 16
CUT_CHARS = 12  # of a literal or an escape that the end of a block cuts
_names = count()


@dataclass
class JsonFile:
    """A JSON file as lines that an engine can read.

    Attributes
    ----------
    path
        File of JSON lines: the original, a link to it, or a copy.
    numbers
        Line number of each row in the original; None where the lines are those of `path`.
    form
        "lines", "array", "objects" or "python".
    size
        Number of lines of `path`, if they were counted.
    """

    path: Path
    encoding: str | None = None
    form: str = "lines"
    numbers: array[int] | None = field(default=None, repr=False)
    size: int | None = None

    def keys(self, names: Sequence[str]) -> list[str]:
        """Return the keys of the first objects; the search goes on while one of `names` is not among them."""
        found: dict[str, None] = {}
        left = set(names)
        for position, (_, line) in enumerate(numbered_lines(self.path)):
            if position >= SAMPLED_LINES and not left:
                break
            if position < SAMPLED_LINES or any(json.dumps(name).encode() in line for name in left):
                row = _object(line)
                found |= dict.fromkeys(row or ())
                left -= found.keys()
        return list(found)

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield line number and JSON of each row."""
        for position, (number, line) in enumerate(numbered_lines(self.path)):
            yield (number if self.numbers is None else self.numbers[position]), line

    def rows(self, found: int = -1) -> int:
        """Return the number of rows: lines that are not blank. Blank ones are looked for only if all lines are not `found`."""
        if self.numbers is not None:
            return len(self.numbers)
        size = count_lines(self.path) if self.size is None else self.size
        return found if size == found else sum(1 for _ in numbered_lines(self.path))

    def locate(self, rows: Sequence[int]) -> Iterator[tuple[int, str]]:
        """Yield line number (from 1) and text of the rows at ascending positions."""
        wanted = iter(rows)
        row = next(wanted, None)
        for position, (number, line) in enumerate(self.lines()):
            while position == row:  # a row may have several errors
                yield number, line.decode("utf-8", "replace")
                row = next(wanted, None)
            if row is None:
                return


def open_json(file: Path, spill: Path, encoding: str | None = None) -> JsonFile:
    """Return a JSON file as lines; `spill` is the folder of copies.

    Raises
    ------
    DataError
        The file is empty or in another encoding.
    """
    with open_bytes(file) as source:
        head = source.read(BLOCK_BYTES >> 3)
    form, found = _form(file, encoding)
    plain = form == "lines" and encoding in (None, "utf-8") and not any(head.startswith(mark) for mark, _ in BOMS)
    plain &= compression_of(file) == COMPRESSED.get(file.suffix.lower())  # the engine goes by the suffix
    if plain and (b"\n" in head or b"\r" not in head[:-1]) and file.suffix.lower() in ("", ".gz", *_plain_suffixes()):
        if compression_of(file):  # before the engine unpacks it, which knows no bound
            found.size = count_lines(file)
        if not GLOB & set(str(file)):
            return found
        spill.mkdir(parents=True, exist_ok=True)
        link = spill / f"link-{next(_names)}.json{'.gz' if file.suffix.lower() == '.gz' else ''}"
        link.symlink_to(file.resolve())
        return JsonFile(link, size=found.size)
    spill.mkdir(parents=True, exist_ok=True)
    copy = spill / f"copy-{next(_names)}.json"
    numbers = array("q")
    with copy.open("wb") as target:
        for number, line in _lines(file, encoding, form):
            numbers.append(number)
            target.write(line + b"\n")
    return JsonFile(copy, encoding, form, numbers)


def joined(sources: Sequence[JsonFile], spill: Path) -> tuple[Path, list[int]]:
    """Write the rows of several files to one file of JSON lines; return its path and the number of rows of each."""
    spill.mkdir(parents=True, exist_ok=True)
    path, sizes = spill / f"copy-{next(_names)}.json", list[int]()
    with path.open("wb") as target:
        for source in sources:
            size = 0
            for size, (_, line) in enumerate(numbered_lines(source.path), 1):  # noqa: B007
                target.write(line + b"\n")
            sizes.append(size)
    return path, sizes


def _plain_suffixes() -> tuple[str, ...]:
    return (".json", ".jsonl", ".ndjson")


def _form(file: Path, encoding: str | None) -> tuple[str, JsonFile]:
    """Return how a file is written, by its first lines."""
    lines = [line.strip() for _, line in islice(numbered_lines(file, encoding), 20)]
    found = JsonFile(file, encoding)
    if not lines:
        return "lines", found
    if lines[0].startswith(b"[") and not (len(lines) > 1 and all(map(_is_json, lines))):
        return "array", found
    votes = {"lines": sum(_object(line) is not None for line in lines), "python": sum(_python(line) is not None for line in lines)}
    if not any(votes.values()) and lines[0].startswith(b"{"):
        return "objects", found
    return ("python" if votes["python"] > 2 * votes["lines"] else "lines"), found


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _python(line: bytes) -> dict[Any, Any] | None:
    try:
        row = python_value(line.decode())
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _lines(file: Path, encoding: str | None, form: str) -> Iterator[tuple[int, bytes]]:
    """Yield (line number, JSON line) of every row; a row that cannot be read keeps its text, and is rejected later."""
    if form in ("array", "objects"):
        yield from _documents(file, encoding)
        return
    for number, line in numbered_lines(file, encoding):
        row = _python(line) if form == "python" else None
        yield number, line if row is None else _dumped(row)


def _dumped(row: Any) -> bytes:
    """Return a value as a JSON line; values that are nested too deeply become a line that is rejected."""
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False, default=str).encode("utf-8", "replace")
    except RecursionError:
        return b"nested too deeply"
    except ValueError:
        return json.dumps(json.loads(json.dumps(row, default=str), parse_constant=lambda _: None)).encode()


def _documents(file: Path, encoding: str | None) -> Iterator[tuple[int, bytes]]:
    """Yield the elements of an array, or objects one after another, which may go over several lines.

    After an element that cannot be read, reading goes on at the next line that begins an object: what is between is one bad row.
    """
    decoder, text, number = json.JSONDecoder(), "", 1
    pieces, size = _Pieces(text_blocks(file, encoding)), PIECE_CHARS
    while True:
        piece = pieces.take(size)
        final = not piece
        text += piece
        at = 0
        while True:
            start = _skip(text, at)
            number, at = number + text.count("\n", at, start), start
            if at >= len(text):
                break
            try:
                value, end = decoder.raw_decode(text, at)
            except (ValueError, RecursionError) as error:
                begin = _next_object(text, at)
                if not final and (begin is None or _is_cut(error, text)):
                    break  # its end may be in the next block
                end = len(text) if begin is None else begin
                yield number, text[at:end].replace("\n", " ").strip().encode() or b"?"
            else:
                yield number, _dumped(value) if isinstance(value, dict) else text[at:end].replace("\n", " ").encode()
            number, at = number + text.count("\n", at, end), end
        text, size = text[at:], PIECE_CHARS if at else 2 * size
        if final:
            return
        if len(text) > MAX_LINE_BYTES:
            raise DataError(f"{file}:{number} begins a JSON object of more than {MAX_LINE_BYTES >> 20} MiB. Restore the file.")


class _Pieces:
    """Text in pieces: an error in a text costs as much as the text before it, so that blocks of megabytes are too long."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks, self._block, self._at = blocks, "", 0

    def take(self, size: int) -> str:
        """Return at most `size` further characters; "" at the end."""
        if self._at >= len(self._block):
            self._block, self._at = next(self._blocks, b"").decode("utf-8", "replace"), 0
        self._at += size
        return self._block[self._at - size : self._at]


def _skip(text: str, at: int) -> int:
    while at < len(text) and (text[at].isspace() or text[at] in ",[]"):
        at += 1
    return at


def _is_cut(error: Exception, text: str) -> bool:
    """Return True if a text could not be read because it ends too early."""
    return isinstance(error, json.JSONDecodeError) and (error.msg.startswith("Unterminated") or error.pos + CUT_CHARS > len(text))


def _next_object(text: str, at: int) -> int | None:
    """Return the start of the next line that begins an object, or of the next object of a line; None without one."""
    found = NEXT_OBJECT.search(text, at + 1)
    return found.start() + 1 if found else None


__all__ = ["COMPRESSED", "JsonFile", "joined", "open_json"]
