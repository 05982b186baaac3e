"""Writes docs/reference from the protos and from the settings of the services; `--check` compares instead of writing.

    python scripts/reference.py [--check]

Both pages take every word from the source: the comments of protos/scalellm/v1, and the docstrings of the settings.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)
from grpc_tools import protoc
from pydantic import ByteSize
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings

from scalellm.services.common.settings import LinkedSettings, LinkingSettings, ServiceSettings, describe
from scalellm.services.executor.config import ExecutorSettings
from scalellm.services.scheduler.config import SchedulerSettings
from scalellm.services.tokenizer.config import TokenizerSettings

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "reference"
PUBLIC = ("generation", "tokenizer", "sessions", "common")
"""The protos that clients use; those among the services are documented in their own files only."""

API_INTRODUCTION = """# API reference

<!-- Written by `make docs` from protos/scalellm/v1; not edited by hand. -->

The public gRPC API, package `scalellm.v1`. The tokenizer service serves it, by default at `127.0.0.1:50051`.
[http.md](../http.md) describes the HTTP API. The contracts between the services (`link.proto`, `scheduler.proto`,
`executor.proto`) are documented in `protos/scalellm/v1`.
"""

SETTINGS_INTRODUCTION = """# Settings reference

<!-- Written by `make docs` from the settings of the services; not edited by hand. -->

A setting `--some-name` of a service is also the environment variable `SCALELLM_<SERVICE>_SOME_NAME`, and the key
`some_name` in the table `[<service>]` of a file for `scalellm up --config FILE`. The command line overrides the
environment, and the environment overrides the file. `scalellm config show` prints such a file with every setting, and
`python -m scalellm.services.<service> --help` prints this list.
"""

SETTINGS = (
    ("Every service", ServiceSettings),
    ("Services that get work from others: scheduler, executor", LinkedSettings),
    ("Services that send work on: tokenizer, scheduler", LinkingSettings),
    ("Tokenizer", TokenizerSettings),
    ("Scheduler", SchedulerSettings),
    ("Executor", ExecutorSettings),
)


def main(arguments: list[str]) -> int:
    """Write the pages, or with --check name those that differ from what would be written."""
    pages = {FOLDER / "api.md": api_page(), FOLDER / "settings.md": settings_page()}
    if "--check" not in arguments:
        for path, text in pages.items():
            path.write_text(text, encoding="utf-8")
        return 0
    stale = [path for path, text in pages.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        print(f"{path.relative_to(ROOT)} does not match the protos or settings: run 'make docs'", file=sys.stderr)
    return 1 if stale else 0


def api_page() -> str:
    """Return the page about the services, messages and enums of the public protos."""
    return API_INTRODUCTION + "".join(f"\n{line}\n" for file in public_files() for line in _ApiFile(file).sections())


def public_files() -> Iterator[FileDescriptorProto]:
    """Yield the descriptors of the public protos, with their comments."""
    names = [f"scalellm/v1/{name}.proto" for name in PUBLIC]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "set.binpb"
        well_known = Path(protoc.__file__).parent / "_proto"
        command = ["protoc", f"-I{ROOT / 'protos'}", f"-I{well_known}", "--include_source_info"]
        if protoc.main([*command, f"--descriptor_set_out={output}", *names]):
            raise SystemExit("the protos do not compile")
        found = {file.name: file for file in FileDescriptorSet.FromString(output.read_bytes()).file}
    yield from (found[name] for name in names)


class _ApiFile:
    """One proto file as Markdown."""

    def __init__(self, file: FileDescriptorProto) -> None:
        self._file = file
        self._comments = {
            tuple(place.path): " ".join((place.leading_comments or place.trailing_comments).split())
            for place in file.source_code_info.location
        }

    def sections(self) -> Iterator[str]:
        """Yield paragraphs and tables: services, then messages, then enums."""
        yield f"## {self._file.name.rpartition('/')[2]}"
        for index, service in enumerate(self._file.service):
            yield from self._service(service, (6, index))
        for index, message in enumerate(self._file.message_type):
            yield from self._message(message, (4, index), "")
        for index, enum in enumerate(self._file.enum_type):
            yield from self._enum(enum, (5, index), "")

    def _service(self, service: ServiceDescriptorProto, path: tuple[int, ...]) -> Iterator[str]:
        yield f"### {service.name}"
        yield self._comment(path)
        rows = [
            (f"`{method.name}`", _link(method.input_type), _stream(method.server_streaming) + _link(method.output_type),
             self._comment((*path, 2, index)))
            for index, method in enumerate(service.method)
        ]  # fmt: skip
        yield _table(("method", "request", "answer", ""), rows)

    def _message(self, message: DescriptorProto, path: tuple[int, ...], prefix: str) -> Iterator[str]:
        name = f"{prefix}{message.name}"
        yield f"### {name}"
        yield self._comment(path)
        maps = {nested.name: nested for nested in message.nested_type if nested.options.map_entry}
        rows = [
            (f"`{field.name}`", _type(field, maps) + _oneof(field, message), self._comment((*path, 2, index)))
            for index, field in enumerate(message.field)
        ]
        if rows:
            yield _table(("field", "type", ""), rows)
        for index, nested in enumerate(message.nested_type):
            if nested.name not in maps:
                yield from self._message(nested, (*path, 3, index), f"{name}.")
        for index, enum in enumerate(message.enum_type):
            yield from self._enum(enum, (*path, 4, index), f"{name}.")

    def _enum(self, enum: EnumDescriptorProto, path: tuple[int, ...], prefix: str) -> Iterator[str]:
        yield f"### {prefix}{enum.name}"
        yield self._comment(path)
        rows = [
            (f"`{value.name}`", str(value.number), self._comment((*path, 2, index)))
            for index, value in enumerate(enum.value)
        ]
        yield _table(("value", "number", ""), rows)

    def _comment(self, path: tuple[int, ...]) -> str:
        return _escaped(self._comments.get(path, ""))


def settings_page() -> str:
    """Return the page about the settings of the services."""
    parts = [SETTINGS_INTRODUCTION]
    for title, cls in SETTINGS:
        rows = [
            (f"`--{name.replace('_', '-')}`", _kind(field), _default(field), _escaped(field.description or ""))
            for name, field in _own_fields(cls)
        ]
        parts.append(f"\n## {title}\n\n{_table(('setting', 'value', 'default', ''), rows)}\n")
    return "".join(parts)


def _own_fields(cls: type[BaseSettings]) -> Iterator[tuple[str, FieldInfo]]:
    cls.model_rebuild()
    describe(cls)
    for name, field in cls.model_fields.items():
        if name in cls.__annotations__:
            yield name, field


def _kind(field: FieldInfo) -> str:
    """Return the values that a setting takes: its choices, or its type and range."""
    bounds = [
        f"{sign} {value:,}"
        for rule in _rules(field)
        for sign, value in (("≥", getattr(rule, "ge", None)), (">", getattr(rule, "gt", None)),
                            ("≤", getattr(rule, "le", None)), ("<", getattr(rule, "lt", None)))
        if value is not None
    ]  # fmt: skip
    return " ".join([_kind_of(field.annotation), *([", ".join(bounds)] if bounds else [])])


def _rules(field: FieldInfo) -> Iterator[Any]:
    yield from field.metadata
    for part in get_args(field.annotation):
        if get_origin(part) is Annotated:
            for rule in get_args(part)[1:]:
                yield from rule.metadata if isinstance(rule, FieldInfo) else (rule,)


def _kind_of(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if origin is Annotated:
        return _kind_of(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return " or ".join(_kind_of(part) for part in get_args(annotation) if part is not type(None))
    names = {
        bool: "yes or no",
        int: "integer",
        float: "number",
        str: "text",
        Path: "path",
        ByteSize: "size, such as `2GiB`",
    }
    return names.get(origin or annotation, "list of `NAME=VALUE`" if origin is dict else "list")


def _default(field: FieldInfo) -> str:
    value = field.default
    if field.is_required() or field.default_factory is not None or value in (None, ""):
        return ""  # what a factory returns may depend on the machine; the description says it
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Path):
        return f"`{str(value).replace(str(Path.home()), '~', 1)}`"
    return f"`{value}`"


def _type(field: FieldDescriptorProto, maps: dict[str, DescriptorProto]) -> str:
    name = field.type_name.rpartition(".")[2]
    if name in maps:
        key, value = maps[name].field
        return f"map of {_type(key, {})} to {_type(value, {})}"
    kind = _link(field.type_name) if field.type_name else FieldDescriptorProto.Type.Name(field.type)[5:].lower()
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"list of {kind}"
    return f"{kind}, optional" if field.proto3_optional else kind


def _oneof(field: FieldDescriptorProto, message: DescriptorProto) -> str:
    if not field.HasField("oneof_index") or field.proto3_optional:
        return ""
    return f", one of `{message.oneof_decl[field.oneof_index].name}`"


def _link(full_name: str) -> str:
    package, _, name = full_name.partition(".scalellm.v1.")
    if package:
        return full_name.removeprefix(".")
    return f"[{name}](#{name.lower().replace('.', '')})"


def _stream(is_stream: bool) -> str:
    return "stream of " if is_stream else ""


def _escaped(text: str) -> str:
    """Return text that a cell of a table holds as it is: the bars, and what would be read as a tag."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
