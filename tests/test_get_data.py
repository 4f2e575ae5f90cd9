"""get_data.py as a person runs it, against a server that misbehaves in the ways servers do."""

import hashlib
import io
import random
import resource
import zipfile
from functools import partial

import pytest
from http_server import Server, answer, stop_after

import get_data
from lib.common import InputError

PART, PART_2, PART_3 = get_data.PARTS
CHUNK = get_data.CHUNK
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


def make_files(archive):
    """Return {name: bytes} of what a host has; the cuts go through clips."""
    half, most = len(archive) // 2, len(archive) * 9 // 10
    return TABLES | dict(zip(get_data.PARTS, (archive[:half], archive[half:most], archive[most:])))


def md5(content):
    return hashlib.md5(content).hexdigest()


WHOLE = make_zip(CLIPS)
FILES = make_files(WHOLE)
FILE = FILES[PART]


def put(folder, files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


@pytest.fixture
def server():
    with Server(FILES) as server:
        yield server


@pytest.fixture
def fetch(tmp_path, run_script, monkeypatch):
    """Return a function that runs get_data.py for the folder tmp_path: with status 0, it has to complete it."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    (tmp_path / "md5sums").write_text("".join(f"{md5(content)}  {name}\n" for name, content in FILES.items()))

    def fetch(*hosts, status=0, timeout=10, preexec_fn=None):
        options = {"data": tmp_path, "md5sums": tmp_path / "md5sums", "attempts": 7, "pause": 0, "timeout": timeout}
        arguments = [f"--{name}={value}" for name, value in options.items()] + ["--hosts", *hosts]
        error = run_script("get_data.py", *arguments, status=status, timeout=30, preexec_fn=preexec_fn).stderr
        if status == 0:
            there = {str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.rglob("*.*")}
            there["annotations_final.csv"] = there.pop("tags.csv")
            assert there == CLIPS | FILES  # and nothing half-written
        assert error.count("\n") == status  # at most one line
        return error

    return fetch


def test_first_run_fetches_everything_and_the_second_nothing(fetch, server):
    for _ in range(2):
        fetch(server.url)
        assert server.ranges == {name: [None] for name in FILES}


def test_goes_on_after_connections_that_break_or_hang_and_with_another_host(fetch, server):
    server.tricks[PART] = [stop_after(CHUNK + 9), stop_after(CHUNK + 9, hang=60)]
    with Server(FILES) as second:
        second.tricks[PART] = [stop_after(CHUNK + 9)]
        fetch(server.url, second.url, timeout=1)
        assert second.ranges[PART] == [f"bytes={CHUNK}-", f"bytes={3 * CHUNK}-"]
    assert server.ranges[PART] == [None, f"bytes={2 * CHUNK}-"]


def test_goes_on_with_what_a_killed_run_left(fetch, server, tmp_path):
    """Of one part other bytes, of one everything but the name, and of one some that the server cannot go on with."""
    left = {PART: bytes(1000), PART_2: FILES[PART_2], PART_3: FILES[PART_3][:1000]}
    put(tmp_path, {f"{name}.partial": content for name, content in left.items()})
    server.tricks[PART_3] = [answer(200, FILES[PART_3])]
    fetch(server.url)
    assert server.ranges[PART] == ["bytes=1000-", None]
    assert server.ranges[PART_2] == [f"bytes={len(FILES[PART_2])}-"] and server.ranges[PART_3] == ["bytes=1000-"]


def test_a_bad_answer_costs_nothing_and_leaves_nothing(fetch, server, tmp_path):
    put(tmp_path, {f"{PART}.partial": FILE[:1000]})
    page = answer(200, b"<html>", {"Content-Type": "text/html; charset=utf-8"})
    server.tricks[PART] = [page, answer(503), answer(302, headers={"Location": "http://[::1"})]  # costs nothing
    server.tricks[PART] += [answer(200, wrong) for wrong in (b"", FILE[:-1], FILE + b"x")]  # leaves nothing
    server.tricks[PART] += [answer(302, headers={"Location": f"/moved/{PART}"})]  # two requests, one attempt
    fetch(server.url)
    assert server.ranges[PART] == ["bytes=1000-"] * 4 + [None] * 4


def test_no_host_delivers(fetch, server):
    server.tricks[PART] = [answer(500)] * 7
    line = fetch(NOBODY, server.url, status=1)
    for told in ("Connection refused", "500", NOBODY + PART, md5(FILE)):
        assert told in line
    fetch(server.url)  # as the line says: later


def test_another_file_put_there_by_hand_is_refused_and_kept(fetch, server, tmp_path):
    for name in (PART_2, "tags.csv"):
        put(tmp_path, {name: b"mine"})
        assert str(tmp_path / name) in fetch(server.url, status=1)
        assert (tmp_path / name).read_bytes() == b"mine"


def test_a_full_disk_is_one_line_and_the_next_run_goes_on(fetch, server, tmp_path):
    """A limit on the size of files stands in for the end of the disk; the second is enough for the parts."""
    for limit, full in ((CHUNK + 9, f"{tmp_path / PART}.partial"), (len(FILE), tmp_path)):
        limits = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))
        assert fetch(server.url, status=1, preexec_fn=limits) == f"error: {full}: File too large\n"
    fetch(server.url)
    assert server.ranges[PART] == [None, f"bytes={CHUNK + 9}-"]


def test_unpacking_goes_on_after_a_kill(fetch, tmp_path):
    put(tmp_path, FILES)  # by hand
    kept, written_anew = tmp_path / "0/clip0.mp3", {"clip1.mp3.partial": b"half", "clip2.mp3": bytes(70_000)}
    put(kept.parent, {"clip0.mp3": CLIPS["0/clip0.mp3"]} | written_anew)
    before = kept.stat().st_mtime_ns
    fetch(NOBODY)
    assert kept.stat().st_mtime_ns == before


BAD_ARCHIVES = {
    "clip": (WHOLE[:5000] + bytes(100) + WHOLE[5100:], "damaged archive"),
    "cut off": (WHOLE[:-100], "damaged archive"),
    "no zip": (b"<html>", "damaged archive"),
    "parent": (make_zip({"0/../../x": b"x"}), "would leave the folder"),
    "absolute": (make_zip({"/x": b"x"}), "would leave the folder"),
}


@pytest.mark.parametrize("kind", BAD_ARCHIVES)
def test_a_bad_archive_is_refused_and_nothing_of_it_unpacked(tmp_path, kind):
    archive, fault = BAD_ARCHIVES[kind]
    put(tmp_path / "data", make_files(archive))
    with pytest.raises(InputError, match=fault):
        get_data.unpack(tmp_path / "data")
    assert {path.name for path in tmp_path.rglob("*")} == {"data", *FILES}
