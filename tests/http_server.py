"""A web server on the loopback interface that misbehaves as told, one trick per GET of a file, then behaves.

A trick is a function of the request's handler and the file's bytes.
"""

import dataclasses
import re
import socket
import struct
import threading
import time
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclasses.dataclass
class Get:
    name: str
    range: str | None  # the header
    time: float  # seconds, monotonic


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files  # {name: bytes}
        self.tricks = defaultdict(list)  # {name: those still to be played}
        self.gets = []
        self.closing = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/"

    def ranges(self, name):
        """Return the Range header, or None, of every GET of `name` so far."""
        return [get.range for get in self.gets if get.name == name]

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, *_):
        pass  # clients are killed here on purpose


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        name = self.path[1:].removeprefix("moved/")
        self.server.gets.append(Get(name, self.headers["Range"], time.monotonic()))
        tricks = self.server.tricks[name]
        trick = tricks.pop(0) if tricks else behave
        trick(self, self.server.files[name])

    def log_message(self, *_):
        pass


def send_head(handler, status, headers):
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, str(value))
    handler.end_headers()


def behave(handler, content, sent=None):
    """Answer as a good server does; with `sent`, promise everything and stop after so many bytes."""
    offset = int(re.search(r"\d+", handler.headers["Range"] or "0").group())
    if handler.headers["Range"] and offset >= len(content):
        send_head(handler, 416, {"Content-Range": f"bytes */{len(content)}", "Content-Length": 0})
        return
    headers = {"Content-Length": len(content) - offset}
    if handler.headers["Range"]:
        headers["Content-Range"] = f"bytes {offset}-{len(content) - 1}/{len(content)}"
    send_head(handler, 206 if handler.headers["Range"] else 200, headers)
    handler.wfile.write(content[offset:][:sent])


def stop_after(sent):
    return lambda handler, content: behave(handler, content, sent)


def hang_after(sent):
    def trick(handler, content):
        behave(handler, content, sent)
        handler.server.closing.wait(60)

    return trick


def slow(handler, content):
    """Take a second."""
    send_head(handler, 200, {"Content-Length": len(content)})
    for start in range(0, len(content), len(content) // 10 + 1):
        handler.wfile.write(content[start:][: len(content) // 10 + 1])
        time.sleep(0.1)


def drop(handler, content):
    handler.connection.close()


def reset_after(sent):
    def trick(handler, content):
        behave(handler, content, sent)
        time.sleep(0.5)  # a reset throws away what the client has not read yet
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close is a reset
        handler.connection.close()

    return trick


def ignore_range(handler, content):
    del handler.headers["Range"]
    behave(handler, content)


def other_range(handler, content):
    """Answer a range with the bytes of another."""
    send_head(handler, 206, {"Content-Length": 10, "Content-Range": f"bytes 0-9/{len(content)}"})
    handler.wfile.write(content[:10])


def send(body, content_type="application/octet-stream", length=True):
    """Answer with other bytes, and, as very simple servers do, without saying how many."""

    def trick(handler, content):
        headers = {"Content-Type": content_type} | ({"Content-Length": len(body)} if length else {})
        send_head(handler, 200, headers)
        handler.wfile.write(body)

    return trick


def refuse(status, **headers):
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler, content: send_head(handler, status, headers | {"Content-Length": 0})


def redirect(location):
    return lambda handler, content: send_head(handler, 302, {"Location": location, "Content-Length": 0})
