"""get_data.py as a person runs it, against a server that misbehaves in the ways servers do."""

import hashlib
import io
import random
import re
import resource
import zipfile

import http_server as web
import pytest

import get_data
from lib.common import InputError

PART = "mp3.zip.001"
CHUNK = get_data.CHUNK
RNG = random.Random(0)
CLIPS = {f"{folder}/clip{number}.mp3": RNG.randbytes(70_000) for folder in "09f" for number in range(3)}
CLIPS["6/silent.mp3"] = b""  # as three of MagnaTagATune's are
TABLES = {"annotations_final.csv": b"clip_id\ttag\n1\t0\n", "clip_info_final.csv": b"clip_id\ttitle\n1\tx\n"}
UNTIL = 30  # seconds that a test waits for what has to happen


def make_zip(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)  # the same bytes at any time
    return buffer.getvalue()


def make_files(archive=make_zip(CLIPS)):
    """Return {name: bytes} of what a host has; the cuts go through clips."""
    cuts = len(archive) // 2, len(archive) * 9 // 10
    parts = archive[: cuts[0]], archive[cuts[0] : cuts[1]], archive[cuts[1] :]
    return TABLES | dict(zip(get_data.PARTS, parts))


def md5(content):
    return hashlib.md5(content).hexdigest()


FILES = make_files()
FILE = FILES[PART]
SUMS = {name: md5(content) for name, content in FILES.items()}


def put(folder, files):
    for name, content in files.items():
        (folder / name).write_bytes(content)


class Client:
    """Runs get_data.py in a folder of its own, against given hosts."""

    def __init__(self, folder, run_script):
        self.data, self.md5sums, self.run_script = folder / "data", folder / "md5sums", run_script
        self.data.mkdir()
        sums = SUMS | {"mp3.zip": "0" * 32}  # a line that nobody needs
        self.md5sums.write_text("".join(f"{md5}  {name}\n" for name, md5 in sums.items()))

    def arguments(self, *hosts, **options):
        options = dict(data=self.data, md5sums=self.md5sums, pause=0.01, attempts=3) | options
        return [str(item) for name, value in options.items() for item in (f"--{name}", value)] + ["--hosts", *hosts]

    def run(self, *hosts, status=0, preexec_fn=None, **options):
        arguments = self.arguments(*hosts, **options)
        return self.run_script("get_data.py", *arguments, status=status, timeout=UNTIL, preexec_fn=preexec_fn)

    def error(self, *hosts, **options):
        """Return the one line with which the script gives up."""
        (line,) = self.run(*hosts, status=1, **options).stderr.splitlines()
        return line

    def assert_complete(self):
        there = {str(path.relative_to(self.data)): path.read_bytes() for path in self.data.rglob("*") if path.is_file()}
        there["annotations_final.csv"] = there.pop("tags.csv")
        assert there == CLIPS | FILES  # and nothing half-written


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server():
    with web.Server(FILES) as server:
        yield server


@pytest.fixture
def client(tmp_path, run_script):
    return Client(tmp_path, run_script)


@pytest.fixture
def nobody():
    """The address of a host that refuses connections."""
    with web.Server({}) as server:
        return server.url


def test_first_run_fetches_everything_and_the_second_nothing(client, server):
    done = client.run(server.url)
    client.assert_complete()
    assert done.stdout.splitlines()[-1] == f"next: python gen_spectrograms.py --data {client.data}"
    assert done.stderr == ""
    assert sorted(server.gets) == [(name, None) for name in sorted(FILES)]
    client.run(server.url)
    assert len(server.gets) == len(FILES)


def test_goes_on_after_connections_that_break_or_hang(client, server):
    server.tricks[PART] = [web.stop_after(CHUNK + 9), web.stop_after(CHUNK + 9, web.hang)]
    client.run(server.url, timeout=1)
    client.assert_complete()
    assert server.ranges(PART) == [None, f"bytes={CHUNK}-", f"bytes={2 * CHUNK}-"]


def test_a_bad_answer_leaves_nothing(client, server):
    """All of them in a row; had one left anything, the next request would ask for a range."""
    server.tricks[PART] = [
        web.answer(200),
        web.answer(200, FILE[:-1], length=False),
        web.answer(200, FILE + b"x"),
        web.answer(200, b"<html>", Content_Type="text/html; charset=utf-8"),
        web.answer(503),
        web.answer(302, Location="http://[::1"),
        web.answer(302, Location=f"/moved/{PART}"),
    ]
    client.run(server.url, attempts=10, pause=0)
    client.assert_complete()
    assert server.ranges(PART) == [None] * 8  # the redirect makes two of one attempt


@pytest.mark.parametrize(
    "begun, tricks, others",
    [
        (FILE[:1000], [], []),
        (FILE[:1000], [web.ignore_range], []),
        (FILE[:1000], [web.answer(206, FILE[:10], Content_Range=f"bytes 0-9/{len(FILE)}")], [None]),
        (FILE[:1000], [web.answer(200, b"<html>", Content_Type="text/html")], ["bytes=1000-"]),
        (FILE, [], []),  # the server answers with 416
        (bytes(1000), [], [None]),
    ],
    ids="plainly range-ignored other-range web-page killed-before-renaming other-begun".split(),
)
def test_goes_on_with_what_was_begun(client, server, begun, tricks, others):
    put(client.data, {f"{PART}.partial": begun})
    server.tricks[PART] = tricks
    client.run(server.url)
    client.assert_complete()
    assert server.ranges(PART) == [f"bytes={len(begun)}-", *others]


def test_the_second_host_goes_on_where_the_first_failed(client, server):
    with web.Server(FILES) as first:
        first.tricks[PART] = [web.stop_after(CHUNK + 9)]
        client.run(first.url, server.url)
    client.assert_complete()
    assert server.ranges(PART) == [f"bytes={CHUNK}-"]


def test_no_host_delivers(client, server, nobody):
    server.tricks[PART] = [web.answer(500)] * 3
    line = client.error(nobody, server.url)
    for told in ("Connection refused", "500 Internal Server Error", nobody + PART, str(client.data), SUMS[PART]):
        assert told in line
    client.run(server.url)  # as the line says: later
    client.assert_complete()


@pytest.mark.parametrize("name", ["mp3.zip.002", "tags.csv"])
def test_another_file_put_there_by_hand(client, server, name):
    put(client.data, {name: b"mine"})
    line = client.error(server.url)
    assert str(client.data / name) in line and md5(b"mine") in line
    assert (client.data / name).read_bytes() == b"mine"


def test_a_host_that_is_no_address_or_sums_without_a_file_are_one_line(client):
    assert client.error("a.b/").startswith("error: --hosts takes")
    client.md5sums.write_text(client.md5sums.read_text().replace("mp3.zip.002", "mp3.zip.02"))
    assert "mp3.zip.002" in client.error("http://127.0.0.1:9/")


@pytest.mark.parametrize(
    "there, limit, named",
    [({}, CHUNK + 1000, f"{PART}.partial"), (FILES, 50_000, "")],
    ids=["fetching", "unpacking"],
)
def test_disk_full(client, server, there, limit, named):
    """A limit on the size of files stands in for the end of the disk."""
    put(client.data, there)
    line = client.error(server.url, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert line == f"error: {client.data / named}: File too large"
    client.run(server.url)
    client.assert_complete()
    assert server.ranges(PART) == ([] if there else [None, f"bytes={limit}-"])


def test_unpacking_files_put_there_by_hand_keeps_the_clips_that_are_whole(client, nobody):
    whole, cut_off, zeros = (client.data / "0" / f"clip{n}.mp3" for n in (0, 1, 2))
    put(client.data, FILES)
    whole.parent.mkdir()
    put(whole.parent, {whole.name: CLIPS["0/clip0.mp3"], cut_off.name: CLIPS["0/clip1.mp3"][:5000]})
    put(whole.parent, {zeros.name: bytes(70_000), "clip1.mp3.partial": b"half"})
    before = whole.stat()
    client.run(nobody)
    client.assert_complete()
    after = whole.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("member", ["0/../../x", "/x"])
def test_member_that_would_leave_the_folder(client, member):
    put(client.data, make_files(make_zip(CLIPS | {member: b"/etc"})))
    with pytest.raises(InputError, match=re.escape(repr(member))):
        get_data.unpack(client.data)
    assert {path.name for path in client.data.parent.iterdir()} == {"data", "md5sums"}


def flipped(archive, where):
    return archive[:where] + bytes([archive[where] ^ 0xFF]) + archive[where + 1 :]


WHOLE = make_zip(CLIPS)
DAMAGED = {
    "clip": flipped(WHOLE, 5000),
    "directory": flipped(WHOLE, WHOLE.index(b"PK\x01\x02")),
    "cut off": WHOLE[:-100],
    "no zip": b"<html>",
}


@pytest.mark.parametrize("archive", DAMAGED)
def test_damaged_archive(tmp_path, archive):
    put(tmp_path, make_files(DAMAGED[archive]))
    with pytest.raises(InputError, match="damaged archive"):
        get_data.unpack(tmp_path)
    assert not list(tmp_path.glob("0/*"))  # neither the clip nor half of it
