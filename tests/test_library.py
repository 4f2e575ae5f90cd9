"""A library's table: continued wherever it was cut off, and refused where it is another's."""

import os
from types import SimpleNamespace

import numpy as np
import pytest

from lib.audio import load
from lib.common import InputError
from lib.library import tag_library


def fill(table, files, tags=("slow",), checkpoint="0a1b2c3d"):
    """Complete the table of a library of files that are no music; return how many it lacked."""
    return tag_library(table, SimpleNamespace(tag_names=list(tags), samples=load), checkpoint, files)


def test_a_librarys_table_goes_on_wherever_it_was_cut_off(tmp_path):
    files = [tmp_path / f"song {number}, \n\udce9.mp3" for number in range(4)]
    for file in files:
        file.write_bytes(b"no music")
    table = tmp_path / "tags.csv"
    assert fill(table, files) == 4 and fill(table, files) == 0
    whole = table.read_bytes()
    header = whole.index(b"\r\n") + 2
    for length in np.linspace(header, len(whole) - 1, 10).astype(int):
        table.write_bytes(whole[:length])
        assert fill(table, files) == 5 - whole[:length].count(b"\r\n")
        assert table.read_bytes() == whole


def test_a_file_that_changed_is_tagged_again_and_another_table_is_refused(tmp_path):
    files = [tmp_path / "one.mp3", tmp_path / "two.mp3", tmp_path / "missing.mp3"]
    for file in files[:2]:
        file.write_bytes(b"no music")
    table = tmp_path / "tags.csv"
    assert fill(table, files) == 3
    files[0].write_bytes(b"other bytes")
    os.utime(files[1], (1, 1))
    assert fill(table, files) == 2
    before = table.read_bytes()
    for other in ({"tags": ["slow", "fast"]}, {"checkpoint": "4e5f6071"}):
        with pytest.raises(InputError, match="not a table of this checkpoint"):
            fill(table, files, **other)
    assert table.read_bytes() == before
    for content in (b"", b"no table", b"no table\r\n"):
        files[0].write_bytes(content)
        with pytest.raises(InputError, match="not a table of this checkpoint"):
            fill(files[0], files)
