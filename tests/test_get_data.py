"""get_data.py as a person runs it, against servers that misbehave in the ways servers do."""

import hashlib
import io
import random
import re
import resource
import shutil
import zipfile
from collections import Counter, namedtuple
from functools import partial

import pytest
from http_server import SELF_SIGNED, Server, answer, behave, ignore_range, redirect, stop_after, trickle

import get_data
from lib import download
from lib.common import InputError

CHUNK = download.CHUNK
RNG = random.Random(0)
CLIPS = {f"{folder}/clip{number}.mp3": RNG.randbytes(70_000) for folder in "09f" for number in range(3)}
CLIPS["6/silent.mp3"] = b""  # as three of MagnaTagATune's are
TABLES = {"annotations_final.csv": b"clip_id\ttag\n1\t0\n", "clip_info_final.csv": b"clip_id\ttitle\n1\tx\n"}
NOBODY = "http://127.0.0.1:9/"  # refuses connections


def make_zip(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)  # the same bytes at any time
    return buffer.getvalue()


def stand_in_for(files):
    """Return what to replace get_data.py's constants with, so that it fetches these files: {name: content}."""

    def piece(name, begin=0):
        return download.Piece(name, begin, begin + len(files[name]), hashlib.md5(files[name]).hexdigest())

    parts = []
    for name in sorted(name for name in files if name.startswith("mp3.zip.")):
        parts.append(piece(name, parts[-1].end if parts else 0))
    names = {"ANNOTATIONS": "annotations_final.csv", "CLIP_INFO": "clip_info_final.csv", "ARCHIVE": "mp3.zip"}
    return {constant: piece(name) for constant, name in names.items()} | {"ARCHIVE_PARTS": tuple(parts)}


ARCHIVE = make_zip(CLIPS)
ENDS = len(ARCHIVE) // 2, len(ARCHIVE) * 9 // 10, len(ARCHIVE)  # of the parts; the cuts go through clips
PARTS = {f"mp3.zip.00{n + 1}": ARCHIVE[begin:end] for n, (begin, end) in enumerate(zip((0, *ENDS), ENDS))}
IN_PARTS, WHOLE = TABLES | PARTS, TABLES | {"mp3.zip": ARCHIVE}  # what the two kinds of hosts have
PART, PART_2, PART_3 = PARTS


def span(first, last):
    return f"{first}-{last - 1}"


ALL_OF_THE_OTHERS = {name: [span(0, len(PARTS[name]))] for name in (PART_2, PART_3)}


def put(folder, files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


@pytest.fixture
def whole():
    """A host that has the archive as one file."""
    with Server(WHOLE) as server:
        yield server


@pytest.fixture
def parts():
    """A host that has it cut into three parts."""
    with Server(IN_PARTS) as server:
        yield server


@pytest.fixture
def fetch(tmp_path, call_script, monkeypatch):
    """Return a function that runs get_data.py for the folder tmp_path/data: with status 0, it has to complete it."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name, value in {"BREATH": 0, "PAUSE": 0, "ATTEMPTS": 7}.items():
        monkeypatch.setattr(download, name, value)
    for name, value in stand_in_for(IN_PARTS | WHOLE).items():
        monkeypatch.setattr(get_data, name, value)
    data = tmp_path / "data"

    def fetch(*servers, status=0, timeout=10, deleted=()):
        monkeypatch.setattr(download, "TIMEOUT", timeout)
        hosts = [getattr(server, "url", server) for server in servers]
        printed = call_script("get_data.py", "--data", data, "--hosts", *hosts, status=status)
        if status == 0:
            there = {str(path.relative_to(data)): path.read_bytes() for path in data.rglob("[!.]*.*")}
            there["annotations_final.csv"] = there.pop("tags.csv", None) or there["annotations_final.csv"]
            whole = {name: content for name, content in (CLIPS | WHOLE).items() if name not in deleted}
            assert {name for name in there if name not in PARTS} == {*whole, get_data.UNPACKED}  # nothing half-written
            assert all(there[name] == content for name, content in whole.items())
        assert printed.stderr.count("\n") == status  # at most one line
        return printed.stdout + printed.stderr

    fetch.data = data
    return fetch


def test_the_real_parts_make_up_the_real_archive():
    archive, parts = get_data.ARCHIVE, get_data.ARCHIVE_PARTS
    assert [part.begin for part in parts] == [0, *(part.end for part in parts[:-1])]
    assert archive.end == parts[-1].end == 2_972_769_864 and len(parts) == 3


def test_fetches_everything_once_even_when_the_archive_is_deleted(fetch, whole):
    fetch(whole)
    asked = {name: [span(0, len(content))] for name, content in TABLES.items()}
    asked["mp3.zip"] = [span(0, ENDS[0]), span(ENDS[0], ENDS[1]), span(ENDS[1], ENDS[2])]
    assert whole.ranges == asked
    fetch(whole)
    (fetch.data / "mp3.zip").unlink()
    fetch(whole, deleted=["mp3.zip"])
    assert whole.ranges == asked
    (fetch.data / "f/clip1.mp3").write_bytes(b"cut off")
    fetch(whole)
    assert whole.ranges["mp3.zip"] == 2 * asked["mp3.zip"]
    (fetch.data / "mp3.zip").unlink()
    unpacked = fetch.data / get_data.UNPACKED
    unpacked.write_text(unpacked.read_text()[:-1] + "x")  # from another archive
    fetch(whole)
    assert whole.ranges["mp3.zip"] == 3 * asked["mp3.zip"]


def test_one_host_goes_on_where_another_of_the_other_kind_stopped(fetch, whole, parts):
    whole.tricks["mp3.zip"] = [stop_after(CHUNK + 9), stop_after(CHUNK + 9, hang=60), answer(500), answer(500)]
    parts.tricks[PART] = [stop_after(1000)]
    fetch(whole, parts, timeout=1)
    ours, theirs = 2 * CHUNK + 18, 2 * CHUNK + 1018
    assert whole.ranges["mp3.zip"][:4] == [span(begin, ENDS[0]) for begin in (0, CHUNK + 9, ours, ours)]
    assert parts.ranges[PART] == [span(ours, ENDS[0]), span(theirs, ENDS[0])]
    assert len(whole.ranges["mp3.zip"]) == 4 + 2  # it only failed, so it is the first again for the other parts


def test_a_host_may_break_off_ever_so_often_if_each_connection_brings_something(fetch, whole):
    whole.always = partial(behave, sent=CHUNK)
    fetch(whole)
    assert len(whole.ranges["mp3.zip"]) > 7 * 3  # attempts, parts


@pytest.mark.parametrize("kind", ["whole", "parts"])
def test_a_host_that_knows_no_ranges(fetch, kind, request):
    host = request.getfixturevalue(kind)
    host.tricks["mp3.zip"] = host.tricks[PART] = [partial(ignore_range, sent=3 * CHUNK)]
    host.always = ignore_range
    fetch(host)


def test_goes_on_with_what_a_killed_run_left(fetch, whole):
    """Of one table other bytes, of one everything but the name; a part and some of the next, or too much."""
    left = {
        "tags.csv": b"x",
        "clip_info_final.csv": TABLES["clip_info_final.csv"],
        "mp3.zip": ARCHIVE[: ENDS[0] + 1000],
    }
    put(fetch.data, {f"{name}.partial": content for name, content in left.items()})
    fetch(whole)
    table = len(TABLES["annotations_final.csv"])
    archive = [span(ENDS[0] + 1000, ENDS[1]), span(ENDS[1], ENDS[2])]
    assert whole.ranges == {"annotations_final.csv": [span(1, table), span(0, table)], "mp3.zip": archive}
    for name in ("mp3.zip", get_data.UNPACKED):
        (fetch.data / name).unlink()
    put(fetch.data, {"mp3.zip.partial": ARCHIVE + b"x"})
    fetch(NOBODY)


def test_a_bad_answer_costs_nothing(fetch, whole):
    put(fetch.data, {"mp3.zip.partial": ARCHIVE[:1000]})
    page = answer(200, b"<html>" * 1000, {"Content-Type": "text/html; charset=utf-8"})
    whole.tricks["mp3.zip"] = [page, answer(503), redirect("http://[::1"), answer(200), answer(416)]
    fetch(whole)
    assert whole.ranges["mp3.zip"][:6] == [span(1000, ENDS[0])] * 6


def test_a_wrong_part_is_found_at_its_end_and_fetched_again_from_the_next_host(fetch, parts):
    parts.tricks[PART_2] = [answer(206, bytes(len(PARTS[PART_2])))]
    with Server(IN_PARTS) as second:
        assert "wrong MD5" in fetch(parts, second)
    assert second.ranges == ALL_OF_THE_OTHERS
    assert parts.ranges[PART] == [span(0, ENDS[0])] and PART_3 not in parts.ranges


def test_another_archive_of_the_same_size_is_found_after_its_first_part(fetch, whole, parts):
    whole.files = WHOLE | {"mp3.zip": bytes(len(ARCHIVE))}
    fetch(whole, parts)
    assert whole.ranges["mp3.zip"] == [span(0, ENDS[0])]


def test_a_host_is_not_blamed_for_the_wrong_bytes_of_another(fetch, whole, parts):
    whole.tricks["mp3.zip"] = [answer(206, bytes(1000)), answer(500), answer(500)]
    fetch(whole, parts)
    assert parts.ranges[PART] == [span(1000, ENDS[0]), span(0, ENDS[0])]
    assert whole.ranges["mp3.zip"][:3] == [span(0, ENDS[0])] + [span(1000, ENDS[0])] * 2


def test_a_slow_host_gives_way_to_an_untried_one_and_serves_when_there_is_none(fetch, whole, parts, monkeypatch):
    monkeypatch.setattr(download, "WINDOW", 0.05)
    monkeypatch.setattr(download, "SLOWEST", 10_000_000)
    whole.tricks["mp3.zip"] = [trickle, partial(trickle, n_bytes=20_000, seconds=0.02)]
    parts.tricks[PART] = [answer(404)] * 2
    printed = fetch(whole, parts)
    assert len(whole.ranges["mp3.zip"]) == 2  # of the first part; the host comes last for the others
    assert {name: parts.ranges[name] for name in (PART_2, PART_3)} == ALL_OF_THE_OTHERS
    assert re.search(r"mp3.zip from 127.0.0.1:\d+: 0%, [1-9]\d? KB/s, 00:\d\d left", printed)


def test_a_certificate_that_cannot_be_verified_is_one_line(fetch):
    with Server(WHOLE, SELF_SIGNED) as server:
        assert fetch(server).count("its certificate cannot be verified") == 1


def test_a_host_whose_redirects_expire_is_asked_again_before_another(fetch, whole, parts):
    """A signature is good for two requests, but the host gives each out three times."""
    used = Counter()

    def expire(handler, content):
        used[handler.query] += 1
        (stop_after(CHUNK) if used[handler.query] <= 2 else answer(403))(handler, content)

    def send_there(handler, content):
        redirect(f"{whole.url}{{}}?{sum(used.values()) // 3}")(handler, content)

    whole.always = expire
    with Server(WHOLE) as front:
        front.always = send_there
        fetch(front, parts)
    assert len(used) > 7 and not parts.ranges


def test_a_signature_is_never_printed(fetch, whole):
    for address, fault in ((NOBODY, "Connection refused"), ("ftp://127.0.0.1/", "ftp://127.0.0.1/")):
        whole.always = redirect(address + "{}?signature=secret")
        printed = fetch(whole, status=1)
        assert fault in printed and "secret" not in printed


def test_no_host_delivers(fetch, whole):
    whole.tricks["mp3.zip"] = [answer(500)] * 100
    line = fetch(NOBODY, "http://[::1/", whole, status=1).splitlines()[-1]
    for told in (
        "Connection refused",
        "mp3.zip: HTTP status 500",
        "mp3.zip.001: HTTP status 404",
        NOBODY,
        hashlib.md5(ARCHIVE).hexdigest(),
    ):
        assert told in line
    whole.tricks.clear()
    fetch(whole)  # as the line says: later


def test_what_a_person_has_put_there_is_used(fetch, whole):
    put(fetch.data, TABLES | {PART: PARTS[PART], PART_3: PARTS[PART_3], "mp3.zip.partial": b"x"})
    fetch(whole)
    assert whole.ranges == {"mp3.zip": [span(*ENDS[:2])]}
    assert not (fetch.data / "tags.csv").exists()  # other programs look for annotations_final.csv


def test_another_file_that_a_person_has_put_there_is_refused_and_kept(fetch, whole):
    for name in (PART_2, "mp3.zip", "tags.csv"):
        put(fetch.data, {name: b"mine"})
        assert f"{fetch.data / name} has MD5" in fetch(whole, status=1)
        assert (fetch.data / name).read_bytes() == b"mine"


def test_a_full_disk_is_one_line_and_the_next_run_goes_on(fetch, whole):
    """A limit on the size of files stands in for the end of the disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (CHUNK + 9, before[1]))
    try:
        assert fetch(whole, status=1).endswith(f"error: {fetch.data / 'mp3.zip.partial'}: File too large\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    fetch(whole)
    assert whole.ranges["mp3.zip"][:2] == [span(0, ENDS[0]), span(CHUNK + 9, ENDS[0])]


@pytest.mark.parametrize("there, missing", [("", 2), ("mp3.zip.partial", 1.75), ("0/clip.mp3", 1.75)])
def test_the_archive_and_the_clips_have_to_fit(fetch, whole, monkeypatch, there, missing):
    """Both are about as large; a quarter of either is there, or nothing."""
    if there:
        (fetch.data / there).parent.mkdir(parents=True)
        (fetch.data / there).write_bytes(ARCHIVE[: len(ARCHIVE) // 4])
    disk_usage = namedtuple("Usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk_usage(missing * len(ARCHIVE) - 10))
    assert "make room" in fetch(whole, status=1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk_usage(missing * len(ARCHIVE) + 10))
    if there != "0/clip.mp3":
        fetch(whole)


def test_unpacking_goes_on_after_a_kill(fetch):
    put(fetch.data, TABLES | {"mp3.zip": ARCHIVE})
    kept, written_anew = fetch.data / "0/clip0.mp3", {"clip1.mp3.partial": b"half", "clip2.mp3": bytes(70_000)}
    put(kept.parent, {"clip0.mp3": CLIPS["0/clip0.mp3"]} | written_anew)
    before = kept.stat().st_mtime_ns
    fetch(NOBODY)
    assert kept.stat().st_mtime_ns == before


BAD_ARCHIVES = {
    "clip": ARCHIVE[:5000] + bytes(100) + ARCHIVE[5100:],
    "cut off": ARCHIVE[:-100],
    "no zip": b"<html>",
    "parent": make_zip({"0/../../x.mp3": b"x"}),
    "absolute": make_zip({"/x.mp3": b"x"}),
}


@pytest.mark.parametrize("kind", BAD_ARCHIVES)
def test_a_bad_archive_is_refused_and_nothing_of_it_unpacked(tmp_path, kind):
    put(tmp_path / "data", {"mp3.zip": BAD_ARCHIVES[kind]})
    with pytest.raises(InputError, match="mp3.zip: damaged archive"):
        get_data.unpack(tmp_path / "data")
    assert {path.name for path in tmp_path.rglob("*")} == {"data", "mp3.zip"}
