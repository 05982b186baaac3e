"""A Hugging Face Hub on the loopback interface: its routes for models' files, with what one test serves."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/revision/(?P<revision>[^/?]+)")
_FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)")
_LFS_BYTES = 4096


@dataclass
class FakeHub:
    """A model hub: the files that it serves, and the requests that it received.

    Attributes:
        repos: Files by repository and name, all in the revision `main`.
        token: Token that `gated` repositories ask for.
        gated: Repositories that are shown to nobody else.
        cut_after: Bytes of a file after which the connection ends, once; 0: never.
        requests: Method, path, Authorization and Range of each request.
    """

    address: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    token: str = ""
    gated: set[str] = field(default_factory=set)
    cut_after: int = 0
    is_broken: bool = False
    requests: list[tuple[str, str, str, str]] = field(default_factory=list)

    def commit(self, repo: str) -> str:
        """The commit of `main`: another one when a file changes."""
        digest = hashlib.sha1()
        for name, content in sorted(self.repos[repo].items()):
            digest.update(name.encode() + b"\0" + content)
        return digest.hexdigest()

    def downloads(self, name: str) -> list[str]:
        """The ranges with which a file was asked for."""
        return [asked for method, path, _, asked in self.requests if method == "GET" and path.endswith(f"/{name}")]


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """Serve until the block ends."""
    hub = FakeHub()

    class Handler(_Handler):
        _hub = hub

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.address = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    _hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *arguments: Any) -> None:
        pass

    def _answer(self) -> None:
        hub, headers = self._hub, self.headers
        asked = (headers.get("Authorization", ""), headers.get("Range", ""))
        hub.requests.append((self.command, self.path, *asked))
        if hub.is_broken:
            return self._send(503, b"out of order")
        found = _API.match(self.path) or _FILE.fullmatch(self.path)
        repo = found["repo"] if found else ""
        if found is None or repo not in hub.repos:
            return self._send(401, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        if repo in hub.gated and asked[0] != f"Bearer {hub.token}":
            return self._send(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        commit = hub.commit(repo)
        if found["revision"] not in ("main", commit):
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if "name" in found.groupdict():
            return self._send_file(hub.repos[repo].get(found["name"]), commit)
        siblings = [_sibling(name, content) for name, content in sorted(hub.repos[repo].items())]
        document = {"id": repo, "modelId": repo, "sha": commit, "siblings": siblings, "tags": [], "private": False}
        return self._send(200, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def _send_file(self, content: bytes | None, commit: str) -> None:
        if content is None:
            return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_etag(content)}"', "Accept-Ranges": "bytes"}
        start = int(self.headers["Range"].removeprefix("bytes=").split("-")[0]) if self.headers.get("Range") else 0
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return self._send(206 if start else 200, content[start:], headers)

    def _send(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        cut, is_cut = self._hub.cut_after, 0 < self._hub.cut_after < len(body)
        if is_cut:
            self._hub.cut_after = 0
            self.close_connection = True
        self.wfile.write(body[:cut] if is_cut else body)


def _etag(content: bytes) -> str:
    if len(content) >= _LFS_BYTES:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _sibling(name: str, content: bytes) -> dict[str, Any]:
    sibling: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": _etag(content)}
    if len(content) >= _LFS_BYTES:
        sibling["lfs"] = {"sha256": _etag(content), "size": len(content), "pointerSize": 134}
    return sibling
