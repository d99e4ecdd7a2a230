"""What an ONNX file says about itself, read from its protobuf without the onnx package.

Only the fields that must be checked before a runtime opens the file: opsets, metadata, and which
other files it reads. Field numbers are those of onnx.proto.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from arkv_fx.errors import EngineError

GRAPH, OPSETS, METADATA = 7, 8, 14  # of ModelProto
NODE, INITIALIZER, ATTRIBUTE = 1, 5, 5  # of GraphProto and NodeProto
TENSOR, SUBGRAPH, TENSORS, SUBGRAPHS = 5, 6, 10, 11  # of AttributeProto
EXTERNAL = 13  # of TensorProto


@dataclass
class GraphFile:
    """Opset version by domain ("" is ONNX's own), metadata, and (file, end of what is read)."""

    opsets: dict[str, int] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    external: list[tuple[str, int]] = field(default_factory=list)


def read_graph_file(path: Path) -> GraphFile:
    """Read an ONNX file.

    Raises:
        EngineError: if it is missing or damaged.
    """
    found = GraphFile()
    try:
        for number, value in _fields(memoryview(path.read_bytes())):
            if number == OPSETS:
                parts = dict(_fields(_message(value)))
                found.opsets[_text(parts.get(1, b""))] = int(_integer(parts.get(2, 0)))
            elif number == METADATA:
                key, text = _pair(_message(value))
                found.metadata[key] = text
            elif number == GRAPH:
                found.external += _in_graph(_message(value))
    except FileNotFoundError:
        raise EngineError(f"{path}: the graph is missing; export again") from None
    except (OSError, ValueError, IndexError) as error:
        raise EngineError(f"{path}: damaged, not an ONNX file: {error}") from error
    return found


def _in_graph(graph: memoryview) -> Iterator[tuple[str, int]]:
    for number, value in _fields(graph):
        if number == INITIALIZER:
            yield from _in_tensor(_message(value))
        elif number == NODE:
            for inner, attribute in _fields(_message(value)):
                if inner == ATTRIBUTE:
                    yield from _in_attribute(_message(attribute))


def _in_attribute(attribute: memoryview) -> Iterator[tuple[str, int]]:
    for number, value in _fields(attribute):
        if number in (TENSOR, TENSORS):
            yield from _in_tensor(_message(value))
        elif number in (SUBGRAPH, SUBGRAPHS):
            yield from _in_graph(_message(value))


def _in_tensor(tensor: memoryview) -> Iterator[tuple[str, int]]:
    entries = dict(_pair(_message(v)) for n, v in _fields(tensor) if n == EXTERNAL)
    if entries:
        end = int(entries.get("offset", 0)) + int(entries.get("length", 0))
        yield entries.get("location", ""), end


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(number, value) of each field: an integer, or the bytes of a string or a message."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if at + size > len(data):
            raise ValueError("it ends too early")
        yield tag >> 3, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("a number is too long")


def _message(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number in place of a message")
    return value


def _integer(value: int | memoryview | bytes) -> int:
    if not isinstance(value, int):
        raise ValueError("bytes in place of a number")
    return value


def _text(value: int | memoryview | bytes) -> str:
    if isinstance(value, int):
        raise ValueError("a number in place of a text")
    return bytes(value).decode()


def _pair(entry: memoryview) -> tuple[str, str]:
    """A StringStringEntryProto."""
    parts = dict(_fields(entry))
    return _text(parts.get(1, b"")), _text(parts.get(2, b""))
