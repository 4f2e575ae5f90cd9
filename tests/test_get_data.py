"""get_data.py as a person runs it, against a server that misbehaves in the ways servers do."""

import email.utils
import hashlib
import io
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
import types
import zipfile

import pytest
from http_server import (
    Server,
    drop,
    hang_after,
    ignore_range,
    other_range,
    redirect,
    refuse,
    reset_after,
    send,
    stop_after,
)

import get_data
from common import InputError
from conftest import ROOT

PART = "mp3.zip.001"
CHUNK = get_data.CHUNK
RNG = random.Random(0)
CLIPS = {f"{folder}/clip{number}.mp3": RNG.randbytes(70_000) for folder in "09f" for number in range(2)}
CLIPS["6/silent.mp3"] = b""  # as three of MagnaTagATune's are
TABLES = {"annotations_final.csv": b"clip_id\ttag\n1\t0\n", "clip_info_final.csv": b"clip_id\ttitle\n1\tx\n"}
UNTIL = 30  # seconds that a test waits for what has to happen


def size_of(path):
    return path.stat().st_size if path.exists() else 0


def make_zip(members, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            member = name if isinstance(name, zipfile.ZipInfo) else zipfile.ZipInfo(name)  # the same bytes at any time
            archive.writestr(member, content, compression)
    return buffer.getvalue()


def make_files(archive=None):
    """Return {name: bytes} of what a host has; the cuts go through clips."""
    archive = make_zip(CLIPS) if archive is None else archive
    cuts = len(archive) // 2, len(archive) * 9 // 10
    parts = archive[: cuts[0]], archive[cuts[0] : cuts[1]], archive[cuts[1] :]
    return dict(zip(get_data.PARTS, parts)) | TABLES


def md5(content):
    return hashlib.md5(content).hexdigest()


class Client:
    """Runs get_data.py in a folder of its own, against given hosts that should have given files."""

    def __init__(self, folder, run_script, files):
        self.data, self.run_script = folder / "data", run_script
        self.data.mkdir()
        self.sums = {name: md5(content) for name, content in files.items()}
        self.sums["mp3.zip"] = md5(b"".join(files[part] for part in get_data.PARTS))
        self.md5sums = folder / "md5sums"
        self.md5sums.write_text("".join(f"{md5}  {name}\n" for name, md5 in self.sums.items()))

    def arguments(self, *hosts, **options):
        options = dict(data=self.data, md5sums=self.md5sums, pause=0.01, attempts=3) | options
        return [item for name, value in options.items() for item in (f"--{name}", value)] + ["--hosts", *hosts]

    def run(self, *hosts, status=0, **options):
        return self.run_script("get_data.py", *self.arguments(*hosts, **options), status=status, timeout=UNTIL)

    def run_until(self, moment, number, *hosts):
        """Start the script, send it signal `number` once `moment()` is true; return exit status and stderr."""
        command = [sys.executable, ROOT / "get_data.py", *self.arguments(*hosts)]
        with subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True) as process:
            try:
                deadline = time.monotonic() + UNTIL
                while not moment():
                    assert process.poll() is None and time.monotonic() < deadline
                    time.sleep(0.005)
                process.send_signal(number)
                return process.wait(UNTIL), process.stderr.read()
            finally:
                process.kill()

    def error(self, *hosts, **options):
        """Return the one line with which the script gives up."""
        lines = self.run(*hosts, status=1, **options).stderr.splitlines()
        assert len(lines) == 1
        return lines[0]

    def put(self, files):
        for name, content in files.items():
            (self.data / name).write_bytes(content)

    def assert_complete(self):
        there = {str(path.relative_to(self.data)): path.read_bytes() for path in self.data.rglob("*") if path.is_file()}
        assert md5(b"".join(there.pop(part) for part in get_data.PARTS)) == self.sums["mp3.zip"]
        assert there.pop("tags.csv") == TABLES["annotations_final.csv"]
        assert there.pop("clip_info_final.csv") == TABLES["clip_info_final.csv"]
        assert there == CLIPS  # and nothing half-written


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server():
    with Server(make_files()) as server:
        yield server


@pytest.fixture
def client(tmp_path, run_script):
    return Client(tmp_path, run_script, make_files())


@pytest.fixture
def nobody():
    """The address of a host that refuses connections."""
    with Server({}) as server:
        return server.url


def test_first_run_fetches_everything_and_the_second_nothing(client, server):
    done = client.run(server.url)
    client.assert_complete()
    assert done.stdout.splitlines()[-1] == f"next: python gen_spectrograms.py --data {client.data}"
    assert done.stderr == ""
    assert sorted(get.name for get in server.gets) == sorted(make_files())
    client.run(server.url)
    assert len(server.gets) == len(make_files())


def test_goes_on_after_a_kill(client, server):
    server.tricks[PART] = [hang_after(CHUNK * 2 + 100)]
    partial = client.data / f"{PART}.partial"
    status, _ = client.run_until(lambda: size_of(partial) == CHUNK * 2, signal.SIGKILL, server.url)
    assert status == -signal.SIGKILL
    client.run(server.url)
    client.assert_complete()
    assert server.ranges(PART) == [None, f"bytes={CHUNK * 2}-"]
    assert server.ranges("annotations_final.csv") == [None]


PAGE = b"<html>the server is being looked after</html>"


@pytest.mark.parametrize(
    "trick",
    [reset_after(CHUNK + 9), stop_after(CHUNK + 9), hang_after(CHUNK + 9)],
    ids=["reset", "less than announced", "silence"],
)
def test_goes_on_after_a_broken_connection(client, server, trick):
    server.tricks[PART] = [trick]
    client.run(server.url, timeout=1)
    client.assert_complete()
    assert server.ranges(PART) == [None, f"bytes={CHUNK}-"]


def test_starts_over_after_a_bad_answer(client, server):
    """All of them in a row; had one left anything, the next request would ask for a range."""
    file = make_files()[PART]
    server.tricks[PART] = [
        drop,
        send(b""),
        send(file[:-1]),
        send(file[:-1], length=False),
        send(file + b"x"),
        send(file + b"x", length=False),
        send(PAGE, "text/html; charset=utf-8"),
        send(PAGE, "text/plain"),
        refuse(503),
        refuse(503, Retry_After="soon"),
        redirect,
    ]
    client.run(server.url, attempts=11, pause=0)
    client.assert_complete()
    assert server.ranges(PART) == [None] * 12  # the redirect makes two of one attempt


def test_range_ignored(client, server):
    client.put({f"{PART}.partial": make_files()[PART][:1000]})
    server.tricks[PART] = [ignore_range]
    client.run(server.url)
    client.assert_complete()
    assert server.ranges(PART) == ["bytes=1000-"]


@pytest.mark.parametrize("size", [1000, len(make_files()[PART]), 1_000_000], ids=["begun", "complete", "too long"])
def test_what_was_begun_belongs_to_another_file(client, server, size):
    client.put({f"{PART}.partial": bytes(size)})
    client.run(server.url)
    client.assert_complete()
    assert server.ranges(PART) == [f"bytes={size}-", None]


def test_killed_just_before_the_renaming(client, server):
    size = len(make_files()[PART])
    client.put({f"{PART}.partial": make_files()[PART]})
    client.run(server.url)
    client.assert_complete()
    assert server.ranges(PART) == [f"bytes={size}-"]  # answered with 416


def test_other_range_than_asked_for(client, server):
    client.put({f"{PART}.partial": make_files()[PART][:1000]})
    server.tricks[PART] = [other_range]
    client.run(server.url)
    client.assert_complete()


def test_web_page_does_not_cost_what_was_begun(client, server):
    client.put({f"{PART}.partial": make_files()[PART][:1000]})
    server.tricks[PART] = [send(PAGE, "text/html")]
    client.run(server.url)
    client.assert_complete()
    assert server.ranges(PART) == ["bytes=1000-", "bytes=1000-"]


def test_second_host_when_the_first_refuses_connections(client, server, nobody):
    done = client.run(nobody, server.url)
    client.assert_complete()
    assert "Connection refused; again in" in done.stdout


def test_second_host_goes_on_where_the_first_failed(client, server):
    with Server(make_files()) as first:
        first.tricks[PART] = [stop_after(CHUNK + 9)]
        client.run(first.url, server.url, attempts=1)
    client.assert_complete()
    assert server.ranges(PART) == [f"bytes={CHUNK}-"]


def test_file_not_found_is_not_asked_for_again(client, server):
    with Server(make_files()) as first:
        first.tricks[PART] = [refuse(404)] * 3
        client.run(first.url, server.url)
        assert first.ranges(PART) == [None]
    client.assert_complete()


def test_pause_that_the_host_asks_for(client, server):
    server.tricks[PART] = [refuse(503, Retry_After=1)]
    client.run(server.url)
    client.assert_complete()
    first, second = (get.time for get in server.gets if get.name == PART)
    assert second - first >= 1


@pytest.mark.parametrize("asked", ["86400", email.utils.formatdate(time.time() + 86400, usegmt=True)])
def test_longest_pause(asked, monkeypatch, tmp_path, server):
    paused = []
    monkeypatch.setattr("tenacity.nap.time.sleep", paused.append)
    server.tricks[PART] = [refuse(503, Retry_After=asked)] + [refuse(503)] * 8
    settings = get_data.Settings(data=tmp_path, hosts=(server.url,), attempts=10)
    get_data.fetch(settings, PART, tmp_path / PART, md5(make_files()[PART]), hashlib.md5())
    assert paused == [60, 2, 4, 8, 16, 32, 60, 60, 60]


def test_no_host_delivers(client, server, nobody):
    server.tricks[PART] = [refuse(500)] * 3
    line = client.error(nobody, server.url)
    assert "Connection refused" in line and "500 Internal Server Error" in line
    for told in (PART, nobody + PART, str(client.data), client.sums[PART]):
        assert told in line
    client.run(server.url)  # as the line says: later
    client.assert_complete()


def test_files_put_there_by_hand(client, nobody):
    client.put(make_files())
    client.run(nobody)
    client.assert_complete()


@pytest.mark.parametrize("name", ["mp3.zip.002", "annotations_final.csv", "tags.csv"])
def test_another_file_put_there_by_hand(client, server, name):
    client.put({name: b"mine"})
    line = client.error(server.url)
    assert str(client.data / name) in line and md5(b"mine") in line
    assert (client.data / name).read_bytes() == b"mine"


def test_parts_of_another_archive(client, server):
    client.md5sums.write_text(client.md5sums.read_text().replace(client.sums["mp3.zip"], "0" * 32))
    assert client.sums["mp3.zip"] in client.error(server.url)
    assert not (client.data / "0").exists()


def test_md5sums_without_one_of_the_files(client, server):
    client.md5sums.write_text(client.md5sums.read_text().replace("mp3.zip.002", "mp3.zip.02"))
    assert "mp3.zip.002" in client.error(server.url)


@pytest.mark.parametrize(
    "wrong",
    [{"timeout": 0}, {"timeout": float("nan")}, {"attempts": 0}, {"pause": -1}, {"hosts": ()}, {"hosts": ("a.b/",)}],
    ids=str,
)
def test_setting_out_of_range(wrong):
    with pytest.raises(InputError, match=f"--{next(iter(wrong))}"):
        get_data.check(get_data.Settings(**wrong))


def test_setting_out_of_range_is_one_line(client, server):
    assert "--timeout" in client.error(server.url, timeout=0)
    assert not server.gets


def test_disk_full(client, server):
    """A limit on the size of files stands in for the end of the disk."""
    limit = CHUNK + 1000
    full = client.run_script(
        "get_data.py",
        *client.arguments(server.url),
        status=1,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert full.stderr == "error: writing: File too large\n"
    client.run(server.url)
    client.assert_complete()
    assert server.ranges(PART) == [None, f"bytes={limit}-"]


def test_ctrl_c(client, server):
    server.tricks[PART] = [hang_after(0)]
    stopped = client.run_until(lambda: server.ranges(PART), signal.SIGINT, server.url)
    assert stopped == (130, "\ninterrupted; the same command goes on from here\n")


@pytest.mark.parametrize("there, fits", [({}, False), ({f"{PART}.partial": bytes(1000)}, True)])
def test_disk_space(tmp_path, monkeypatch, server, there, fits):
    """The same disk, 500 bytes short for all, suffices once 1000 are there."""
    archive = len(make_zip(CLIPS))
    for name, content in there.items():
        (tmp_path / name).write_bytes(content)
    usage = types.SimpleNamespace(free=2 * archive - 500)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    settings = get_data.Settings(data=tmp_path, hosts=(server.url,))
    if fits:
        get_data.require_disk_space(settings)
    else:
        with pytest.raises(InputError, match=f"{usage.free / 1e9:.3f} GB free.* need {2 * archive / 1e9:.3f} GB"):
            get_data.require_disk_space(settings)


def test_disk_space_that_no_host_tells(tmp_path, monkeypatch, nobody):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=5e9))
    with pytest.raises(InputError, match="5.000 GB free.* need 5.940 GB"):
        get_data.require_disk_space(get_data.Settings(data=tmp_path, hosts=(nobody,)))


def test_unpacking_goes_on_after_a_kill(client, nobody):
    """A pipe in a half-written clip's place stops the script there, until it is killed."""
    client.put(make_files())
    (client.data / "9").mkdir()
    pipe = client.data / "9" / "clip1.mp3.partial"
    os.mkfifo(pipe)
    status, _ = client.run_until((client.data / "9" / "clip0.mp3").exists, signal.SIGKILL, nobody)
    assert status == -signal.SIGKILL
    before = (client.data / "0" / "clip0.mp3").stat()
    assert not (client.data / "9" / "clip1.mp3").exists()
    pipe.unlink()
    pipe.write_bytes(b"half")
    (client.data / "9" / "clip0.mp3").write_bytes(CLIPS["9/clip0.mp3"][:5000])
    (client.data / "0" / "clip1.mp3").write_bytes(bytes(len(CLIPS["0/clip1.mp3"])))
    client.run(nobody)
    client.assert_complete()
    after = (client.data / "0" / "clip0.mp3").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def symlink(name):
    member = zipfile.ZipInfo(name)
    member.external_attr = (stat.S_IFLNK | 0o777) << 16
    return member


@pytest.mark.parametrize(
    "member", ["../x", "0/../../x", "/x", "C:/x", "C:x", "..\\x", "\\x", ".", symlink("0/link")], ids=str
)
def test_member_that_would_leave_the_folder(tmp_path, member):
    data = tmp_path / "data"
    data.mkdir()
    files = make_files(make_zip(CLIPS | {member: b"/etc"}))
    for part in get_data.PARTS:
        (data / part).write_bytes(files[part])
    name = getattr(member, "filename", member)
    with pytest.raises(InputError) as error:
        get_data.unpack(data)
    assert repr(name) in str(error.value)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["data", *get_data.PARTS]


DIRECTORY = make_zip(CLIPS).index(b"PK\x01\x02")


def damaged(where, compression=zipfile.ZIP_STORED, flip=0xFF):
    archive = bytearray(make_zip(CLIPS, compression))
    archive[where] ^= flip
    return bytes(archive)


@pytest.mark.parametrize(
    "archive",
    {
        "clip": damaged(5000),
        "compressed clip": damaged(41, zipfile.ZIP_DEFLATED),  # the first byte after the member's header
        "directory": damaged(DIRECTORY),
        "encrypted": damaged(DIRECTORY + 8),  # a member's flags
        "method": damaged(DIRECTORY + 10, flip=zipfile.ZIP_BZIP2),
        "comment": damaged(DIRECTORY + 32, flip=46 + len("0/clip1.mp3")),  # as long as the next entry, which it hides
        "directory's place": damaged(-3),
        "cut off": make_zip(CLIPS)[:-100],
        "no zip": b"<html>",
    }.items(),
    ids=lambda item: item[0],
)
def test_damaged_archive(tmp_path, archive):
    files = make_files(archive[1])
    for part in get_data.PARTS:
        (tmp_path / part).write_bytes(files[part])
    with pytest.raises(InputError, match="damaged archive"):
        get_data.unpack(tmp_path)
    assert not list(tmp_path.glob("0/*"))  # neither the clip nor half of it


def test_damaged_archive_is_one_line(tmp_path, run_script, nobody):
    files = make_files(damaged(5000))
    client = Client(tmp_path, run_script, files)
    client.put(files)
    assert "damaged archive" in client.error(nobody)


def test_joined_parts_read_like_the_file(tmp_path):
    rng = random.Random(1)
    whole = rng.randbytes(1000)
    paths = [tmp_path / name for name in "abcd"]
    for path, content in zip(paths, (whole[:400], b"", whole[400:401], whole[401:])):
        path.write_bytes(content)
    joined, same = io.BufferedReader(get_data.JoinedParts(paths), 64), io.BytesIO(whole)
    for _ in range(1000):
        offset, size = rng.randrange(1100), rng.randrange(600)
        assert joined.seek(offset) == same.seek(offset) and joined.read(size) == same.read(size)
    assert joined.seek(-5, os.SEEK_END) == 995 and joined.read() == whole[-5:]


def test_demo(monkeypatch, tmp_path, capsys):
    rendered = []
    demo = types.SimpleNamespace(render=lambda folder, n_clips, seed: rendered.append((folder, n_clips, seed)))
    monkeypatch.setitem(sys.modules, "demo", demo)
    command = ["get_data.py", "--demo", "--data", str(tmp_path), "--demo-clips", "3", "--demo-seed", "5"]
    monkeypatch.setattr(sys, "argv", command)
    get_data.main()
    assert rendered == [(tmp_path / "demo", 3, 5)]
    assert capsys.readouterr().out == f"next: python gen_spectrograms.py --data {tmp_path / 'demo'}\n"
