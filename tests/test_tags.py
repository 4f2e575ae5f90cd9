"""The annotations, the synonyms and the most frequent tags."""

import gzip
import json

import numpy as np
import pytest

from lib.common import InputError
from conftest import ROOT
from tags import SYNONYMS, clip_info_of, merge_synonyms, read_annotations, select_tags, top_tags

TABLE = (
    '"clip_id"\t"guitar"\t"no beat"\t"guitars"\t"mp3_path"\r\n'
    '"7"\t"0"\t"1"\t"0"\t"a/7.mp3"\r\n"3"\t"0"\t"0"\t"1"\t"b/3.mp3"\r\n'
)


def written(folder, text):
    path = folder / "tags.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_reads_magnatagatunes_format(tmp_path):
    ids, labels, names, paths = read_annotations(written(tmp_path, TABLE))
    assert ids.tolist() == [7, 3] and ids.dtype == np.int64
    assert labels.tolist() == [[0, 1, 0], [0, 0, 1]]
    assert names == ["guitar", "no beat", "guitars"]
    assert paths == ["a/7.mp3", "b/3.mp3"]


def test_quotes_line_ends_and_a_byte_order_mark_are_optional(tmp_path):
    expected = read_annotations(written(tmp_path, TABLE))
    found = read_annotations(written(tmp_path, "\ufeff" + TABLE.replace("\r\n", "\n").replace('"', "") + "\n"))
    assert all(np.array_equal(a, b) for a, b in zip(expected, found))


@pytest.mark.parametrize(
    "text, said",
    [
        (TABLE.replace('"1"\t"0"\t"a/7', '"0"\t"a/7'), "line 2: 4 columns, but the header has 5"),
        (TABLE.replace('"0"\t"0"\t"1"', '"0"\t"0"\t"2"'), "line 3: 'guitars' is '2'"),
        (TABLE.replace('"3"', '"7"'), "line 3: clip 7 already appears on line 2"),
        (TABLE.replace('"3"', '"x"'), "line 3: clip_id is 'x'"),
        (TABLE.replace('"b/3.mp3"', '""'), "line 3: clip 3 has no mp3_path"),
        (TABLE.split("\r\n", 1)[1], "line 1: no header"),
        (TABLE.replace('"guitars"', '"guitar"'), "line 1: every column needs a unique name ('guitar')"),
        (TABLE.encode() + b'"\xff\xfe"', "not a tab-separated text table"),
        (TABLE.replace("\t", ",").replace(chr(34), ""), "line 1: no tabs between columns"),
        ("", "contains no clips"),
    ],
)
def test_names_the_line_of_what_is_wrong(tmp_path, text, said):
    path = written(tmp_path, text)
    with pytest.raises(InputError) as error:
        read_annotations(path)
    assert str(error.value).startswith(str(path)) and said in str(error.value)


def test_merging_is_the_or_of_the_group_under_its_first_name():
    names = ["violins", "no beat", "guitars", "female vocal", "no drums", "guitar", "violin", "metal"]
    labels = np.array([[1, 0, 0, 1, 1, 0, 0, 1], [0, 0, 1, 0, 0, 1, 0, 0], [0, 1, 1, 0, 0, 0, 1, 0]], np.uint8)
    merged, merged_names = merge_synonyms(labels, names)
    assert merged_names == ["violin", "no beat", "guitar", "female vocal", "metal"], "alone, metal is not heavy"
    assert merged.tolist() == [[1, 1, 0, 1, 1], [0, 0, 1, 0, 0], [1, 1, 1, 0, 0]]
    again, names_again = merge_synonyms(merged, merged_names)
    assert names_again == merged_names and (again == merged).all()


def test_top_tags_fall_in_count_and_keep_the_order_of_equals():
    labels = np.array([[0, 1, 1, 0, 1], [0, 1, 1, 1, 1], [1, 0, 1, 0, 0]], np.uint8)  # counts 1 2 3 1 2
    kept, names = top_tags(labels, ["a", "b", "c", "d", "e"], 4)
    assert names == ["c", "b", "e", "a"]
    assert kept.sum(axis=0).tolist() == [3, 2, 2, 1]
    assert top_tags(labels, ["a", "b", "c", "d", "e"], 50)[1] == ["c", "b", "e", "a", "d"]


def test_there_are_29_groups_and_no_tag_in_two():
    names = [name for group in SYNONYMS for name in group]
    assert len(SYNONYMS) == 29 and len(set(names)) == len(names) == 82
    assert "female vocal" not in names and "instrumental" in names


def test_the_real_annotations_give_the_originals_50_tags(shared, tmp_path):
    path = written(tmp_path, gzip.decompress((shared / "mtat/annotations_final.csv.gz").read_bytes()))
    annotations = read_annotations(path)
    assert annotations.labels.shape == (25863, 188) and annotations.labels.sum() == 89395
    assert len(merge_synonyms(annotations.labels, annotations.tag_names)[1]) == 135
    labels, names = select_tags(annotations.labels, annotations.tag_names, 51, merge=True)
    recorded = json.loads((ROOT / "tests/original.json").read_text())["top50_after_merging"]
    found = [[name, int(count)] for name, count in zip(names, labels.sum(axis=0, dtype=int))]
    assert found == [*recorded, ["no beat", 242]]
    assert (~labels[:, :50].any(axis=1)).sum() == 4511


def test_clip_info_is_found_by_id(tmp_path):
    columns = "clip_id track_number title artist album url segmentStart segmentEnd original_url mp3_path".split()
    rows = [["3", "1", "Song", "A", "X", "", "0", "29", "", "p"], ["7", "1", "Song", "A", "Y", "", "0", "29", "", "q"]]
    (tmp_path / "clip_info_final.csv").write_text("\n".join("\t".join(row) for row in [columns, *rows]))
    seven, three = clip_info_of(tmp_path, np.array([7, 3]))
    assert seven.artist == three.artist == "A"
    assert seven.track != three.track, "the same title on another album is another track"
    with pytest.raises(InputError, match="lacks 1 of the 1 clips, the first of them 8"):
        clip_info_of(tmp_path, np.array([8]))


def test_the_script_prints_the_tags(run_script, tmp_path):
    """Of annotations_final.csv only as long as there is no tags.csv."""
    table = written(tmp_path, TABLE + "8\t1\t0\t1\tc/8.mp3\n9\t0\t0\t0\td/9.mp3\n")
    table.rename(tmp_path / "annotations_final.csv")
    first, *tags, last = run_script("tags.py", "--data", tmp_path).stdout.splitlines()
    assert "4 clips, 3 tags" in first and last.startswith("1 clips have none")
    assert [line.split() for line in tags] == [["1", "guitar", "2", "50.0%"], ["2", "no", "beat", "1", "25.0%"]]
    written(tmp_path, TABLE)
    assert "2 clips, 3 tags" in run_script("tags.py", "--data", tmp_path).stdout
    error = run_script("tags.py", "--data", tmp_path / "nowhere", status=1).stderr
    assert "nowhere/tags.csv, or annotations_final.csv: not found" in error and error.count("\n") == 1
