"""A web server on the loopback interface: it behaves as told, request by request."""

import re
import ssl
import threading
import time
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SELF_SIGNED = Path(__file__).with_name(
    "self_signed.pem"
)  # a certificate for 127.0.0.1 with its key, which keeps no secret


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, files, certificate=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files  # {name: bytes}
        self.tricks = defaultdict(list)  # {name: functions of a handler and the file's bytes, one for each GET to come}
        self.always = behave  # and what is done at any other
        self.ranges = defaultdict(list)  # {name: the ranges, "first-last", of every GET so far}
        self.url = f"http://127.0.0.1:{self.server_port}/"
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.socket = context.wrap_socket(self.socket, server_side=True)
            self.url = self.url.replace("http", "https")

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def handle_error(self, *_):
        pass  # clients are killed here on purpose, or do not like the certificate


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        name, _, self.query = self.path[1:].partition("?")
        if name not in self.server.files:
            return self.send_error(404)
        self.server.ranges[name].append(self.headers["Range"].removeprefix("bytes="))
        tricks = self.server.tricks[name]
        trick = tricks.pop(0) if tricks else self.server.always
        trick(self, self.server.files[name])

    def log_message(self, *_):
        pass


def behave(handler, content, sent=None, hang=0):
    """Answer as a good server does; with `sent`, promise everything and stop after so many bytes."""
    first, body = asked(handler, content)
    headers = {"Content-Length": len(body), "Content-Range": f"bytes {first}-{first + len(body) - 1}/{len(content)}"}
    send(handler, 206 if body else 416, body[:sent], headers)
    time.sleep(hang)


def asked(handler, content):
    """Return the first byte that a request's range names, and all its bytes."""
    first, last = map(int, re.findall(r"\d+", handler.headers["Range"]))
    return first, content[first : last + 1]


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


def ignore_range(handler, content, sent=None):
    """Answer with the whole file, as servers do that know no ranges; or promise it and stop after so many bytes."""
    send(handler, 200, content[:sent], {"Content-Length": len(content)})


def redirect(url):
    """Send to another address, in which {} stands for the file's name."""
    return lambda handler, _content: send(handler, 302, b"", {"Location": url.format(handler.path[1:])})


def trickle(handler, content, n_bytes=1000, seconds=0.05):
    """Send so many bytes at a time, and wait for so long after each."""
    behave(handler, content, sent=0)
    _, body = asked(handler, content)
    for position in range(0, len(body), n_bytes):
        handler.wfile.write(body[position : position + n_bytes])
        time.sleep(seconds)
