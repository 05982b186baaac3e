"""The web pages at `/` and `/live`, and the files that they are made of."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import grpc
from aiohttp import hdrs, web

from scalellm.services.common.errors import StatusError
from scalellm.services.tokenizer.http.call import HttpCall
from scalellm.services.tokenizer.http.face import HttpFace

_FOLDER = Path(__file__).with_name("static")
_PAGES: Mapping[str, str] = MappingProxyType({"/": "index.html", "/live": "live.html"})
_TYPES: Mapping[str, str] = MappingProxyType(
    {
        ".html": "text/html; charset=utf-8",
        ".js": "text/javascript; charset=utf-8",
        ".css": "text/css; charset=utf-8",
        ".svg": "image/svg+xml",
    }
)
_HEADERS: Mapping[str, str] = MappingProxyType(
    {
        # Code that was injected into a page can neither run nor send data elsewhere.
        "content-security-policy": (
            "default-src 'self'; base-uri 'none'; object-src 'none'; form-action 'none'; frame-ancestors 'none'"
        ),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        # Browsers ask again each time, and get 304 unless the release has changed.
        "cache-control": "no-cache",
    }
)


@dataclass(frozen=True, slots=True)
class _File:
    """A file as it is sent."""

    body: bytes
    content_type: str
    etag: str


class PageRoutes:
    """Serves the pages. They are public, because they contain no data and call the API with the user's own key."""

    def __init__(self) -> None:
        self._files = {path.name: _read(path) for path in _FOLDER.iterdir() if path.suffix in _TYPES}

    def register(self, face: HttpFace, app: web.Application) -> None:
        """Add the routes."""
        for path in _PAGES:
            face.add(app, hdrs.METH_GET, path, self.page)
        face.add(app, hdrs.METH_GET, "/assets/{name}", self.asset)

    async def page(self, call: HttpCall) -> web.StreamResponse:
        """A page."""
        return _answer(call, self._files[_PAGES[call.request.path]])

    async def asset(self, call: HttpCall) -> web.StreamResponse:
        """A file that pages use. Raises StatusError NOT_FOUND."""
        name = call.request.match_info["name"]
        file = self._files.get(name)
        if file is None or name in _PAGES.values():
            raise StatusError(grpc.StatusCode.NOT_FOUND, f"name: there is no file {name[:128]!r}", field="name")
        return _answer(call, file)


def _read(path: Path) -> _File:
    body = path.read_bytes()
    return _File(body, _TYPES[path.suffix], f'"{hashlib.sha256(body).hexdigest()[:32]}"')


def _answer(call: HttpCall, file: _File) -> web.Response:
    headers = {**_HEADERS, "etag": file.etag}
    known = call.request.headers.get(hdrs.IF_NONE_MATCH, "")
    if file.etag in (tag.strip().removeprefix("W/") for tag in known.split(",")):
        return web.Response(status=304, headers=headers)
    return web.Response(body=file.body, headers={**headers, "content-type": file.content_type})
