"""The web pages: what they are made of, and who may read them. What they do is tested in a browser."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from face_kit import calling, make_all_routes
from scalellm.services.common.access import Access
from scalellm.services.common.api_keys import Role, key_entry, new_key
from scalellm.services.tokenizer import http
from scalellm.services.tokenizer.config import TokenizerSettings

STATIC = Path(http.__file__).with_name("static")
SOURCES = sorted(STATIC.iterdir())
MOST_BYTES = 150_000


class Page(HTMLParser):
    """The names in a page of HTML, and the parts that its policy would not let run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.labelled: set[str] = set()
        self.fields: list[str] = []
        self.refused: list[str] = []
        self._is_script = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.links += [value for name in ("src", "href") if (value := found.get(name))]
        self.refused += [name for name in found if name.startswith("on") or name == "style"]
        self._is_script = tag == "script"
        if (name := found.get("id")) is not None:
            self.ids.append(name)
            if tag in ("input", "textarea", "select"):
                self.fields.append(name)
        if tag == "label" and (target := found.get("for")) is not None:
            self.labelled.add(target)
        if tag == "style":
            self.refused.append(tag)

    def handle_data(self, data: str) -> None:
        if self._is_script and data.strip():
            self.refused.append(f"script: {data}")

    def handle_endtag(self, tag: str) -> None:
        self._is_script = False


@pytest.mark.parametrize("name", ["index.html", "live.html"])
def test_a_page_names_only_files_that_there_are_and_its_policy_lets_all_of_it_run(name: str) -> None:
    page = Page((STATIC / name).read_text())
    assert page.refused == []
    for link in page.links:
        assert link in ("./", "live") or (STATIC / link.removeprefix("assets/")).is_file(), link
    assert len(page.ids) == len(set(page.ids))
    inside = {"logprobs"}  # stands in its label
    assert set(page.fields) - inside <= page.labelled


@pytest.mark.parametrize("path", [path for path in SOURCES if path.suffix == ".js"], ids=lambda path: path.name)
def test_modules_import_each_other_and_parse_no_text_as_code_or_html(path: Path) -> None:
    text = path.read_text()
    for name in re.findall(r'from "([^"]+)"', text):
        assert name.startswith("./"), name
        assert (STATIC / name).is_file(), name
    forbidden = (
        r"innerHTML|outerHTML|insertAdjacentHTML|createContextualFragment|DOMParser|document\.write|srcdoc|setHTML"
        r"|\beval\b|new Function|import\(|localStorage"
    )
    assert re.findall(forbidden, text) == []


def test_the_elements_that_modules_look_for_are_in_a_page() -> None:
    ids = {name for page in STATIC.glob("*.html") for name in Page(page.read_text()).ids}
    for path in STATIC.glob("*.js"):
        assert set(re.findall(r'byId\("([^"]+)"\)', path.read_text())) <= ids, path.name


def test_nothing_is_asked_of_others_and_all_of_it_is_small() -> None:
    for path in SOURCES:
        elsewhere = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+", path.read_text()))
        assert elsewhere <= {"http://www.w3.org"}, f"{path.name}: but for the name of SVG's elements"
    assert sum(path.stat().st_size for path in SOURCES) < MOST_BYTES


async def test_pages_and_their_files_are_served_and_asked_for_again_by_their_tags() -> None:
    app = make_all_routes(TokenizerSettings())
    types = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
    async with calling(app) as client:
        for url, path in [
            ("/", STATIC / "index.html"),
            ("/live", STATIC / "live.html"),
            *((f"/assets/{path.name}", path) for path in SOURCES if path.suffix != ".html"),
        ]:
            async with client.get(url) as response:
                assert response.status == 200, url
                assert response.content_type == types[path.suffix]
                assert response.headers["content-security-policy"].startswith("default-src 'self'; ")
                assert response.headers["x-content-type-options"] == "nosniff"
                assert await response.read() == path.read_bytes()
                tag = response.headers["etag"]
            async with client.get(url, headers={"if-none-match": f'"other", W/{tag}'}) as response:
                assert (response.status, await response.read()) == (304, b"")
            async with client.head(url) as response:
                assert (response.status, await response.read()) == (200, b"")
        for name in ("none.js", "index.html", "..%2fface.py", "%2e%2e%2fface.py", "face.py"):
            async with client.get(f"/assets/{name}") as response:
                assert response.status == 404, name


async def test_with_keys_the_pages_are_open_and_what_they_show_is_not(tmp_path: Path) -> None:
    user, file = new_key(), tmp_path / "keys.toml"
    file.write_text(key_entry(user, "acme", Role.USER))
    app = make_all_routes(TokenizerSettings(), Access(file))
    async with calling(app) as client:

        async def status(path: str, **headers: str) -> int:
            async with client.get(path, headers=headers) as response:
                return response.status

        assert [await status(path) for path in ("/", "/live", "/assets/live.js")] == [200] * 3
        assert [await status(path) for path in ("/v1/fleet", "/v1/sessions", "/v1/sessions/a")] == [401] * 3
        assert await status("/v1/fleet", authorization=f"Bearer {user}") == 403


async def test_pages_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    app = make_all_routes(TokenizerSettings(playground=False))
    async with calling(app) as client:
        for path in ("/", "/live", "/assets/dom.js", "/v1/fleet"):
            async with client.get(path) as response:
                assert response.status == 404, path
