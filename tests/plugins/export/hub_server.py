"""A hub on the loopback: the part of its API that uploads and downloads of models use, with a token and faults.

`Hub()` starts it; `hub.url` is its endpoint, `hub.files` what the repository holds at its newest commit. A fault is
(part of the path, what happens): a status to answer with, "drop" to cut the connection, "hang" to answer late.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin", ".onnx", ".gguf")


def git_hash(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub:
    """A hub with any number of repositories; restarting it keeps them."""

    def __init__(self, token="hf_right", *, role="write"):
        self.token, self.role = token, role
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}  # repository -> branch -> path -> content
        self.commits: list[dict[str, list[str]]] = []
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.bodies: list[bytes] = []
        self.faults: list[tuple[str, object]] = []
        self.denied: set[str] = set()  # repositories that this token may not write to
        self.lock, self.port, self.server = threading.Lock(), 0, None
        self.start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def start(self):
        """Listen, on the port of before if there was one."""
        self.gone = False
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), type("Bound", (Handler,), {"hub": self}))
        self.server.daemon_threads, self.port = True, self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self):
        """Be gone, for open connections too, until `start`."""
        self.gone = True
        self.server.shutdown()
        self.server.server_close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def files(self, repo, branch="main"):
        """Return the files of a branch."""
        return self.repos[repo][branch]

    def take_fault(self, path):
        """Return what shall go wrong with this request, once."""
        with self.lock:
            for fault in self.faults:
                if fault[0] in path:
                    self.faults.remove(fault)
                    return fault[1]
        return None

    def commit(self, repo, branch, body):
        """Apply the lines of a commit, all or nothing."""
        files, changed = dict(self.repos[repo].get(branch, {})), {"added": [], "deleted": []}
        for line in filter(None, body.split(b"\n")):
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
            if item["key"] in ("file", "lfsFile", "deletedFile"):
                changed["deleted" if item["key"] == "deletedFile" else "added"].append(value["path"])
        self.repos[repo][branch] = files
        self.commits.append(changed)
        return f"{len(self.commits):040x}"


class Handler(BaseHTTPRequestHandler):
    """One request."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Be quiet."""

    def answer(self, status, value=None, *, content=None, **headers):
        body = json.dumps(value).encode() if content is None else content
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_any(self):
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        body = self.read_body()
        with hub.lock:
            hub.requests.append(f"{self.command} {path}")
            hub.bodies.append(body)
        fault = "drop" if hub.gone else hub.take_fault(path)
        if fault == "drop":
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        if fault == "hang":
            time.sleep(3)
        if isinstance(fault, int):
            self.answer(fault, {"error": "out of order"})
        elif not path.startswith("/lfs/") and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self.answer(401, {"error": "Invalid username or password."})
        else:
            self.route(path, body)

    do_GET = do_POST = do_PUT = do_HEAD = handle_any  # noqa: N815 - the names that http.server calls

    def read_body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def route(self, path, body):  # noqa: PLR0911 - a line each
        hub = self.hub
        if path == "/api/whoami-v2":
            return self.answer(200, {"name": "me", "type": "user", "auth": {"accessToken": {"role": hub.role}}})
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path.startswith("/lfs/"):
            hub.objects[path.removeprefix("/lfs/")] = body
            return self.answer(200, {})
        first, second, *rest = path.removeprefix("/api/models/").strip("/").split("/")
        repo = f"{first}/{second.removesuffix('.git')}"
        if repo not in hub.repos:
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        if path.startswith("/api/models/"):
            return self.of_repo(repo, rest, body)
        if rest[:1] == ["resolve"]:
            return self.resolve(repo, rest[1], "/".join(rest[2:]))
        return self.batch(json.loads(body))

    def create(self, asked):
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if repo in self.hub.denied:
            return self.answer(403, {"error": f"You don't have the rights to create {repo}"})
        status = 409 if repo in self.hub.repos else 200
        self.hub.repos.setdefault(repo, {"main": {}})
        return self.answer(status, {"url": f"{self.hub.url}/{repo}", "name": repo})

    def of_repo(self, repo, rest, body):  # noqa: PLR0911 - a line each
        hub, what = self.hub, rest[0] if rest else "revision"
        branch = rest[1] if rest[1:] else "main"
        if repo in hub.denied and what in ("preupload", "commit"):
            return self.answer(403, {"error": "You don't have write access to this repository"})
        if what == "branch":
            hub.repos[repo].setdefault(branch, dict(hub.files(repo)))
            return self.answer(200, {})
        if branch not in hub.repos[repo]:
            return self.answer(404, {"error": f"Invalid rev id: {branch}"}, X_Error_Code="RevisionNotFound")
        files = hub.files(repo, branch)
        if what == "preupload":
            answers = [self.mode_of(item["path"], files) for item in json.loads(body)["files"]]
            return self.answer(200, {"files": answers})
        if what == "commit":
            oid = hub.commit(repo, branch, body)
            return self.answer(200, {"commitUrl": f"{hub.url}/{repo}/commit/{oid}", "commitOid": oid, "success": True})
        if what == "tree":
            inside = "/".join(rest[2:])
            rows = [
                {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
                for path, content in files.items()
                if path.startswith(inside)
            ]
            return self.answer(200, rows)
        about = {"id": repo, "sha": f"{len(hub.commits):040x}", "private": False, "tags": [], "downloads": 0}
        return self.answer(200, {**about, "siblings": [{"rfilename": path} for path in files]})

    @staticmethod
    def mode_of(path, files):
        large = path.endswith(LARGE)
        there = files.get(path)
        oid = None if there is None else hashlib.sha256(there).hexdigest() if large else git_hash(there)
        return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}

    def batch(self, asked):
        objects = []
        for item in asked["objects"]:
            there = item["oid"] in self.hub.objects
            link = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}", "header": {}}}
            objects.append({**item} if there else {**item, "actions": link})
        self.answer(200, {"transfer": "basic", "objects": objects})

    def resolve(self, repo, branch, path):
        content = self.hub.files(repo, branch if branch in self.hub.repos[repo] else "main").get(path)
        if content is None:
            return self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
        return self.answer(
            200,
            content=content,
            ETag=f'"{git_hash(content)}"',
            X_Repo_Commit=f"{len(self.hub.commits):040x}",
            Content_Type="application/octet-stream",
        )
