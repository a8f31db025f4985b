"""Test array files: exchange with the safetensors library in both directions, and errors for damaged files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from twotower.errors import DataError
from twotower.utils.array_files import arrays_of, open_arrays, write_arrays

ARRAYS: dict[str, Any] = {
    "flags": np.array([True, False, True]),
    "b": np.array([-3, 7], np.int8),
    "rows": np.arange(5),
    "grid": np.arange(6, dtype=np.float32).reshape(2, 3),
    "turned": np.arange(6, dtype=np.int32).reshape(2, 3).T,
    "none": np.zeros((0, 4), np.float64),
}


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    kinds = [{name: (array.dtype, array.shape) for name, array in arrays.items()} for arrays in (left, right)]
    return kinds[0] == kinds[1] and all(np.array_equal(left[name], right[name]) for name in left)


def test_the_library_reads_what_is_written_and_the_other_way(tmp_path: Path) -> None:
    write_arrays(tmp_path / "ours", ARRAYS)
    assert same(load_file(tmp_path / "ours"), ARRAYS) and same(open_arrays(tmp_path / "ours"), ARRAYS)
    contiguous = {name: np.ascontiguousarray(array) for name, array in ARRAYS.items()}
    (tmp_path / "theirs").write_bytes(save(contiguous, metadata={"made": "elsewhere"}))
    assert same(open_arrays(tmp_path / "theirs"), ARRAYS)
    write_arrays(tmp_path / "empty", {})
    assert open_arrays(tmp_path / "empty") == {}


def test_bytes_do_not_depend_on_the_order_of_the_names(tmp_path: Path) -> None:
    write_arrays(tmp_path / "one", ARRAYS)
    write_arrays(tmp_path / "two", dict(reversed(ARRAYS.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_what_is_opened_is_the_file_itself_aligned_and_not_to_be_written(tmp_path: Path) -> None:
    write_arrays(tmp_path / "file", ARRAYS)
    opened = open_arrays(tmp_path / "file")
    assert all(array.flags.aligned and not array.flags.writeable and not array.flags.owndata for array in opened.values())
    content = (tmp_path / "file").read_bytes()
    with (tmp_path / "file").open("r+b") as file:  # the map follows the file: nothing was copied
        file.seek(content.index(np.arange(5).tobytes()))
        file.write(np.int64(99).tobytes())
    assert opened["rows"].tolist() == [99, 1, 2, 3, 4]


def test_changes_of_what_is_opened_to_be_written_stay_in_memory(tmp_path: Path) -> None:
    write_arrays(tmp_path / "file", ARRAYS)
    opened = open_arrays(tmp_path / "file", writable=True)
    opened["rows"][0] = 99
    assert opened["rows"].tolist() == [99, 1, 2, 3, 4]
    assert same(open_arrays(tmp_path / "file"), ARRAYS)


def header(**entry: Any) -> bytes:
    text = json.dumps({"x": entry}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(16)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PAR1",
        b"\xff" * 64,
        (2).to_bytes(8, "little") + b"[]",
        save({"x": np.arange(9)})[:-1],
        save({"x": np.arange(9)}) + b"\0",
        header(dtype="I64", shape=[3], data_offsets=[0, 16]),
        header(dtype="F128", shape=[1], data_offsets=[0, 16]),
        header(dtype="I64", shape=[2]),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(DataError, match=r"complete safetensors file: .*Create it again") as error:
        open_arrays(tmp_path / "file")
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="missing"):
        open_arrays(tmp_path / "missing")


@dataclass(frozen=True)
class Pair:
    rows: Any
    stars: Any = None


def test_the_arrays_of_a_record_are_not_copied() -> None:
    rows, stars = ARRAYS["rows"], ARRAYS["grid"]
    assert {name: id(array) for name, array in arrays_of(Pair(rows, stars)).items()} == {"rows": id(rows), "stars": id(stars)}
    assert arrays_of(Pair(rows)).keys() == {"rows"}
