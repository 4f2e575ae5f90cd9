"""A web server on the loopback interface that misbehaves as told, one trick per GET of a file, then behaves.

A trick is a function of the request's handler and the file's bytes.
"""

import re
import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files  # {name: bytes}
        self.tricks = defaultdict(list)  # {name: those still to be played}
        self.gets = []  # (name, Range header or None) of every GET so far
        self.closing = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/"

    def ranges(self, name):
        return [asked for got, asked in self.gets if got == name]

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
        self.server.gets.append((name, self.headers["Range"]))
        tricks = self.server.tricks[name]
        trick = tricks.pop(0) if tricks else behave
        trick(self, self.server.files[name])

    def log_message(self, *_):
        pass


def behave(handler, content, sent=None):
    """Answer as a good server does; with `sent`, promise everything and stop after so many bytes."""
    asked = handler.headers["Range"]
    offset = int(re.search(r"\d+", asked or "0").group())
    status = 200 if not asked else 206 if offset < len(content) else 416
    handler.send_response(status)
    if asked:
        span = f"{offset}-{len(content) - 1}" if status == 206 else "*"
        handler.send_header("Content-Range", f"bytes {span}/{len(content)}")
    handler.send_header("Content-Length", len(content[offset:]))
    handler.end_headers()
    handler.wfile.write(content[offset:][:sent])


def ignore_range(handler, content):
    del handler.headers["Range"]
    behave(handler, content)


def close(handler):
    handler.connection.close()


def hang(handler):
    handler.server.closing.wait(60)


def stop_after(sent, then=close):
    def trick(handler, content):
        behave(handler, content, sent)
        then(handler)

    return trick


def answer(status, body=b"", length=True, **headers):
    """Answer with these, whatever was asked for; without `length`, as very simple servers do, not saying how long."""

    if length:
        headers["Content-Length"] = len(body)

    def trick(handler, content):
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), str(value))
        handler.end_headers()
        handler.wfile.write(body)

    return trick
