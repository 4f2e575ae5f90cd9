"""A library's table: continued wherever it was cut off, and refused where it is another's."""

import csv
import os
import re
import shutil
from pathlib import Path
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
    for length in (*np.linspace(header, len(whole) - 1, 10).astype(int), len(whole) - 4):
        table.write_bytes(whole[:length])
        assert fill(table, files) == 5 - whole[:length].count(b"\r")
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
    for content in (b"", b"no table", b"no table\r\n", b'path;"seconds', bytes(range(256)) * 999):
        files[0].write_bytes(content)
        with pytest.raises(InputError, match="not a table of this checkpoint"):
            fill(files[0], files)


def test_a_path_is_one_file_however_it_is_named_and_one_that_moved_is_known(tmp_path, monkeypatch, capsys):
    (tmp_path / "music/album").mkdir(parents=True)
    files = [tmp_path / "music/album" / name for name in ("1.mp3", "2.mp3", "3.mp3")]
    for number, file in enumerate(files):
        file.write_bytes(b"no music" * (1 + number))
    table = tmp_path / "tags.csv"
    assert fill(table, files) == 3
    before = table.read_bytes()
    monkeypatch.chdir(tmp_path / "music")
    assert fill(table, [Path("album/1.mp3"), Path("../music/album/2.mp3"), files[2]]) == 0
    assert table.read_bytes() == before

    files[0].rename(tmp_path / "1.mp3")
    files[1].rename(tmp_path / "2.mp3")
    (tmp_path / "2.mp3").write_bytes(b"other music")
    files[2].unlink()
    capsys.readouterr()
    assert fill(table, [tmp_path / "1.mp3", tmp_path / "2.mp3"]) == 1
    assert "already has 1 of 2 files; 1 moved; 2 in rows of files that are gone\n" in capsys.readouterr().out
    with open(table, encoding="utf-8-sig", newline="") as file:
        rows = [row["path"] for row in csv.DictReader(file)]
    assert rows == [*map(str, (tmp_path / "1.mp3", files[1], files[2], tmp_path / "2.mp3"))]


def test_one_row_serves_one_file(tmp_path):
    """Two copies; one has moved, and a third is new."""
    for folder in "abcd":
        (tmp_path / folder).mkdir()
    files = [tmp_path / folder / "1.mp3" for folder in "abcd"]
    for file in files[:2]:
        file.write_bytes(b"no music")
        os.utime(file, (1, 1))
    table = tmp_path / "tags.csv"
    assert fill(table, files[:2]) == 2
    files[0].rename(files[2])
    assert fill(table, files[1:3]) == 0
    shutil.copy2(files[1], files[3])
    assert fill(table, files[1:]) == 1


def test_files_that_moved_and_cannot_be_told_apart_are_tagged_again(tmp_path, capsys):
    files = [tmp_path / folder / "01.mp3" for folder in ("1", "2")]
    for number, file in enumerate(files):
        file.parent.mkdir()
        file.write_bytes(b"no music"[number:][:7])
        os.utime(file, (1, 1))
    assert fill(tmp_path / "tags.csv", files) == 2
    (tmp_path / "moved").mkdir()
    files = [file.parent.rename(tmp_path / "moved" / file.parent.name) / "01.mp3" for file in files]
    assert fill(tmp_path / "tags.csv", files) == 2
    os.utime(files[0], ns=(0, 10**9 + 2 * 10**6))
    capsys.readouterr()
    assert fill(tmp_path / "tags.csv", files) == 1
    assert "already has 1 of 2 files; 1 changed; 2 in rows of files that are gone\n" in capsys.readouterr().out


def test_a_table_is_one_however_it_and_its_files_are_reached(tmp_path):
    """A path through a link, whose folder's parent is another than it looks like; and a table that is a link."""
    for path in ("real/sub", "elsewhere"):
        (tmp_path / path).mkdir(parents=True)
    (tmp_path / "link").symlink_to("real/sub")
    song = tmp_path / "real/1.mp3"
    song.write_bytes(b"no music")
    assert fill(tmp_path / "tags.csv", [song, tmp_path / "link/../1.mp3"]) == 1
    assert fill(tmp_path / "tags.csv", [tmp_path / "real/sub/../1.mp3"]) == 0


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_a_table_that_a_spreadsheet_saved_goes_on(tmp_path, separator, end, quoting):
    files = [tmp_path / f'song {number}; ü, 😀 "live".mp3' for number in range(3)]
    for file in files:
        file.write_bytes(b"no music")
    table = tmp_path / "tags.csv"
    fill(table, files[:2])
    before = table.read_bytes()
    with open(table, encoding="utf-8-sig", newline="") as file:
        rows = [*csv.reader(file)]
    with open(table, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=separator, lineterminator=end, quoting=quoting).writerows([rows[0], *rows[:0:-1]])
    assert fill(table, files) == 1
    with open(table, encoding="utf-8-sig", newline="") as file:
        assert [*csv.reader(file)][:3] == [rows[0], *rows[:0:-1]]
    assert table.read_bytes()[:60] == before[:60] and table.read_bytes().count(b"\r\n") == 4


def test_what_a_spreadsheet_takes_for_a_number_stays_as_it_is(tmp_path):
    """A size has no more than eleven digits; a word keeps the time from being one; nor is the last column empty."""
    (tmp_path / "1.mp3").write_bytes(b"no music")
    fill(tmp_path / "tags.csv", [tmp_path / "1.mp3"])
    with open(tmp_path / "tags.csv", encoding="utf-8-sig", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["bytes"] == "8" and re.fullmatch(r"\d{13} ms", row["modified"]) and [*row][-1] == "checkpoint"


def test_a_table_in_another_encoding_is_refused(tmp_path):
    song, table = tmp_path / "ü.mp3", tmp_path / "tags.csv"
    song.write_bytes(b"no music")
    fill(table, [song])
    text = table.read_text(encoding="utf-8-sig")
    for encoding in ("cp1252", "utf-16"):
        table.write_bytes(before := text.encode(encoding))
        with pytest.raises(InputError, match="not a table of this checkpoint, in UTF-8"):
            fill(table, [song])
        assert table.read_bytes() == before
    table.write_text(text.replace("\n", f"\n{',' * 7}\n"), encoding="utf-8")  # rows that were emptied
    assert fill(table, [song]) == 0
