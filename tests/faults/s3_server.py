"""An S3 server that fails as it is told: moto's, behind a middleware that counts requests and injects faults.

`python s3_server.py` listens on a free port of the loopback and writes the port on a line; it ends with its input.
`S3Server` is the handle of such a process. A rule names which requests it is about (method, regular expressions for
the key and the query), which of them it hits (after `skip`, at most `times`), and what happens:

    status   answer with `status` and the error code `code`, and do nothing
    lost     do it, then reset the connection instead of answering
    reset    reset the connection, and do nothing
    delay    wait `seconds` (less if the rules are changed), then do it
    hide     do it, and drop the keys that match `hidden` from a listing
    blind    do it without heeding If-Match and If-None-Match
    kill     SIGKILL the process `pid`, and do nothing
    killed   do it, then SIGKILL the process `pid` instead of answering
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import urllib.request
from typing import Any
from urllib.parse import unquote

BUCKET = "bucket"
CONTROL = "/_control"


class Faults:
    """WSGI middleware."""

    def __init__(self, app):
        self.app, self.lock = app, threading.Lock()
        self.rules: list[dict[str, Any]] = []
        self.requests: list[str] = []
        self.changed, self.running, self.idle = threading.Event(), 0, threading.Condition(self.lock)

    def __call__(self, environ, start_response):
        if environ["PATH_INFO"] == CONTROL:
            return self.control(environ, start_response)
        with self.lock:
            self.running += 1
        try:
            return self.answer(environ, start_response)
        finally:
            with self.lock:
                self.running -= 1
                self.idle.notify_all()

    def answer(self, environ, start_response):
        method, key, query = environ["REQUEST_METHOD"], unquote(environ["PATH_INFO"]), environ.get("QUERY_STRING", "")
        with self.lock:
            self.requests.append(f"{method} {key}" + (f"?{query}" if query else ""))
            rule = next((rule for rule in self.rules if hits(rule, method, key, query)), {})
            waiting = self.changed
        action = rule.get("action")
        if action == "delay":
            waiting.wait(rule["seconds"])
        if action in {"status", "reset", "kill"}:
            body = environ["wsgi.input"]  # all of it: a client hears nothing while it sends
            body.read() if environ.get("wsgi.input_terminated") else body.read(int(environ.get("CONTENT_LENGTH") or 0))
        if action == "status":
            code = rule.get("code", "Injected")
            body = f"<Error><Code>{code}</Code><Message>{rule.get('text', 'injected')}</Message></Error>".encode()
            start_response(f"{rule['status']} Injected", [("Content-Type", "application/xml")])
            return [b"" if method == "HEAD" else body]
        if action in {"lost", "killed"}:
            list(self.app(environ, lambda *_: None))
        if action in {"kill", "killed"}:
            os.kill(rule["pid"], signal.SIGKILL)
        if action in {"reset", "lost", "kill", "killed"}:
            return reset(environ)
        if action == "blind":
            environ = {k: v for k, v in environ.items() if k not in {"HTTP_IF_MATCH", "HTTP_IF_NONE_MATCH"}}
        if action == "hide":
            return self.without(environ, start_response, rule["hidden"])
        return self.app(environ, start_response)

    def without(self, environ, start_response, hidden):
        head: list[Any] = []
        body = b"".join(self.app(environ, lambda *told: head.extend(told)))
        body = re.sub(
            rb"<Contents>.*?</Contents>",
            lambda m: b"" if re.search(hidden.encode(), m[0]) else m[0],
            body,
            flags=re.DOTALL,
        )
        headers = [(name, value) for name, value in head[1] if name.lower() != "content-length"]
        start_response(head[0], [*headers, ("Content-Length", str(len(body)))])
        return [body]

    def control(self, environ, start_response):
        size = int(environ.get("CONTENT_LENGTH") or 0)
        told = json.loads(environ["wsgi.input"].read(size) or b"{}")
        with self.lock:
            if told.get("idle"):
                self.idle.wait_for(lambda: self.running == 0, timeout=30)
            answer = {"requests": self.requests}
            if "rules" in told:
                self.changed.set()
                self.changed, self.requests, self.rules = threading.Event(), [], told["rules"]
        start_response("200 OK", [("Content-Type", "application/json")])
        return [json.dumps(answer).encode()]


def hits(rule, method, key, query):
    """Tell whether a rule is about a request, and count that it was asked."""
    wanted = rule.get("method", method) == method and re.search(rule.get("key", ""), key)
    if not wanted or not re.search(rule.get("query", ""), query):
        return False
    rule["seen"] = rule.get("seen", 0) + 1
    skip = rule.get("skip", 0)
    return skip < rule["seen"] <= skip + rule.get("times", 10**9)


def reset(environ):
    """Close the connection with a reset."""
    connection = environ["werkzeug.socket"]
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(connection.detach())  # a mere close() would wait for the handler's files
    raise ConnectionResetError


class S3Server:
    """The process, and what it is told."""

    def __init__(self):
        command = [sys.executable, "-W", "ignore", __file__]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self.url = f"http://127.0.0.1:{int(self.process.stdout.readline())}"
        urllib.request.urlopen(urllib.request.Request(f"{self.url}/{BUCKET}", method="PUT")).close()

    def _control(self, **told) -> Any:
        with urllib.request.urlopen(self.url + CONTROL, json.dumps(told).encode()) as answer:
            return json.load(answer)

    def rules(self, *rules: dict[str, Any]) -> None:
        """Replace the rules, release what waits, and count from the beginning."""
        self._control(rules=rules)

    def requests(self) -> list[str]:
        """Return the requests since then, such as "PUT /bucket/key?query"."""
        return self._control()["requests"]

    def settle(self) -> None:
        """Return when every request has been answered, those included that nobody waits for any more."""
        self._control(idle=True)

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()


def main():
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Handler(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

        def log(self, *_):
            pass

    server = make_server("127.0.0.1", 0, Faults(DomainDispatcherApplication(create_backend_app)), True, 1, Handler)
    print(server.server_port, flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.buffer.read()
    os._exit(0)  # requests that hang are left where they are


if __name__ == "__main__":
    main()
