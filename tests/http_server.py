"""A web server on the loopback interface that misbehaves as told, one trick per GET of a file, then behaves."""

import re
import threading
import time
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files  # {name: bytes}
        self.tricks = defaultdict(
            list
        )  # {name: functions of a request's handler and the file's bytes, still to be called}
        self.ranges = defaultdict(list)  # {name: the Range header, or None, of every GET so far}
        self.url = f"http://127.0.0.1:{self.server_port}/"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def handle_error(self, *_):
        pass  # clients are killed here on purpose


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        name = self.path[1:].removeprefix("moved/")
        self.server.ranges[name].append(self.headers["Range"])
        tricks = self.server.tricks[name]
        trick = tricks.pop(0) if tricks else behave
        trick(self, self.server.files[name])

    def log_message(self, *_):
        pass


def behave(handler, content, sent=None, hang=0):
    """Answer as a good server does; with `sent`, promise everything and stop after so many bytes."""
    asked = handler.headers["Range"]
    offset = int(re.search(r"\d+", asked or "0").group())
    headers = {"Content-Length": len(content[offset:])}
    if asked:
        headers["Content-Range"] = f"bytes {offset}-{len(content) - 1}/{len(content)}"
    send(handler, 200 if not asked else 206 if offset < len(content) else 416, content[offset:][:sent], headers)
    time.sleep(hang)


def send(handler, status, body, headers):
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


def stop_after(sent, hang=0):
    """Break the connection after `sent` bytes and `hang` seconds."""
    return lambda handler, content: behave(handler, content, sent, hang)


def answer(status, body=b"", headers={}):
    """Answer with these, whatever was asked for, and as very simple servers do, without saying how long it is."""
    return lambda handler, _content: send(handler, status, body, headers)
