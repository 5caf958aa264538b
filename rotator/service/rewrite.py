"""Bodies: finding the model's name in a request, changing it where it must change, and changing it back in answers.

Nothing is touched that need not be: a request without alias and overrides goes on byte for byte.
"""

from dataclasses import dataclass
from typing import Any

import orjson
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from rotator.service.responses import ApiError
from rotator.service.routes import Target

MODEL_CHARS_MAX = 256
EVENT_BYTES_MAX = 4 << 20  # an SSE event longer than this is passed on in pieces, as it came


@dataclass(slots=True)
class Request:
    """A request's body. ``data`` is its JSON; ``span`` is where the model's name lies in a multipart body."""

    raw: bytes
    model: str
    stream: bool
    data: dict[str, Any] | None = None
    span: tuple[int, int] | None = None


def read_request(raw: bytes, content_type: str) -> Request:
    """Raises ApiError (400) where the body is not what its type says, or names no model."""
    if content_type.startswith("multipart/form-data"):
        return _read_multipart(raw, content_type)
    try:
        data = orjson.loads(raw)
    except orjson.JSONDecodeError as e:
        raise ApiError(400, f"the body is not valid JSON: {e}", "invalid_json") from None
    if not isinstance(data, dict):
        raise ApiError(400, "the body must be a JSON object", "invalid_json")
    return Request(raw, _checked(data.get("model")), data.get("stream") is True, data)


def body_for(request: Request, served_model: str, target: Target | None = None) -> bytes:
    """The body to send on: the same bytes unless the name differs or ``target`` has overrides."""
    overrides = target.overrides if target is not None and target.overrides.any else None
    if request.data is None:
        if request.span is None or request.model == served_model:
            return request.raw
        begin, end = request.span
        return request.raw[:begin] + served_model.encode() + request.raw[end:]
    if overrides is None:
        return request.raw if request.model == served_model else orjson.dumps({**request.data, "model": served_model})
    data = {**overrides.defaults, **request.data, **overrides.set}
    for key in overrides.remove:
        data.pop(key, None)
    return orjson.dumps({**data, "model": served_model})


def rename(data: Any, name: str) -> bool:
    """Put ``name`` where an answer names its model: at the top, and in ``response``, ``message`` and ``session``."""
    if not isinstance(data, dict):
        return False
    changed = False
    for part in (data, data.get("response"), data.get("message"), data.get("session")):
        if isinstance(part, dict) and isinstance(part.get("model"), str) and part["model"] != name:
            part["model"] = name
            changed = True
    return changed


def rename_json(body: bytes, name: str) -> bytes:
    """The JSON text with the model renamed; the very same bytes where nothing is named or it is no JSON."""
    if b'"model"' not in body:
        return body
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError:
        return body
    return orjson.dumps(data) if rename(data, name) else body


class Events:
    """Cuts a stream of SSE bytes into whole events, so that between two writes there is always room for our own.

    With ``name``, each event's model is renamed; without, bytes stay what they are.
    """

    __slots__ = ("_name", "_rest", "whole")

    def __init__(self, name: str | None = None) -> None:
        self._name = name
        self._rest = bytearray()
        self.whole = True  # whether all that was handed out ended with a whole event

    def feed(self, chunk: bytes) -> bytes:
        """What may be written now: whole events, perhaps none."""
        if not self._rest and chunk.endswith(b"\n\n"):
            self.whole = True
            return chunk if self._name is None else self._renamed(chunk)
        searched = max(0, len(self._rest) - 3)
        self._rest += chunk
        end = _last_boundary(self._rest, searched)
        if end < 0 and len(self._rest) > EVENT_BYTES_MAX:
            piece, self._rest, self.whole = bytes(self._rest), bytearray(), False
            return piece
        if end < 0:
            return b""
        self.whole = True
        whole = bytes(self._rest[:end])
        del self._rest[:end]
        return whole if self._name is None else self._renamed(whole)

    def flush(self) -> bytes:
        """What the stream ended with, outside any whole event."""
        rest, self._rest = bytes(self._rest), bytearray()
        return rest if self._name is None or not rest else self._renamed(rest)

    def _renamed(self, events: bytes) -> bytes:
        if b'"model"' not in events or self._name is None:
            return events
        return b"".join(_rename_line(line, self._name) for line in events.splitlines(keepends=True))


def _rename_line(line: bytes, name: str) -> bytes:
    if not line.startswith(b"data:") or b'"model"' not in line:
        return line
    field = line.rstrip(b"\r\n")
    value = field[5:].lstrip(b" ")
    renamed = rename_json(value, name)
    return line if renamed is value else field[: len(field) - len(value)] + renamed + line[len(field) :]


def _last_boundary(data: bytearray, start: int) -> int:
    """Where the last whole event ends, or -1."""
    return max(
        _end_of(data, b"\n\n", start),
        _end_of(data, b"\r\n\r\n", start),
        _end_of(data, b"\r\r", start),
    )


def _end_of(data: bytearray, mark: bytes, start: int) -> int:
    at = data.rfind(mark, start)
    return -1 if at < 0 else at + len(mark)


def _checked(model: object) -> str:
    if model is None or model == "":
        raise ApiError(400, "the request names no model: set 'model'", "missing_model", param="model")
    if not isinstance(model, str):
        raise ApiError(400, "'model' must be a string", "invalid_model", param="model")
    if len(model) > MODEL_CHARS_MAX:
        raise ApiError(400, f"'model' is longer than {MODEL_CHARS_MAX} characters", "invalid_model", param="model")
    return model


def _read_multipart(raw: bytes, content_type: str) -> Request:
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise ApiError(400, "the multipart body's content-type names no boundary", "invalid_multipart")
    form = _Form(raw)
    try:
        parser = MultipartParser(boundary, form.callbacks())  # type: ignore[arg-type] # a plain dict is what it wants
        parser.write(raw)
        parser.finalize()
    except MultipartParseError as e:
        raise ApiError(400, f"the body is not valid multipart/form-data: {e}", "invalid_multipart") from None
    span = form.fields.get(b"model")
    try:
        name = raw[span[0] : span[1]].decode() if span else None
    except UnicodeDecodeError:
        raise ApiError(400, "'model' must be UTF-8 text", "invalid_model", param="model") from None
    begin, end = form.fields.get(b"stream", (0, 0))
    return Request(raw, _checked(name), raw[begin:end].lower() == b"true", span=span)


class _Form:
    """Where each field's value lies in the body. The parser sees the whole body at once, so its offsets are absolute;
    what it hands out of its own buffers instead is told by identity and left alone."""

    def __init__(self, raw: bytes) -> None:
        self._raw = raw
        self._header = b""
        self._value = b""
        self._name: bytes | None = None
        self._span: tuple[int, int] | None = None
        self.fields: dict[bytes, tuple[int, int]] = {}

    def callbacks(self) -> dict[str, Any]:
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_part_data": self._data,
            "on_part_end": self._end,
        }

    def _begin(self) -> None:
        self._name = self._span = None
        self._header = self._value = b""

    def _header_field(self, data: bytes, begin: int, end: int) -> None:
        self._header += data[begin:end]

    def _header_value(self, data: bytes, begin: int, end: int) -> None:
        self._value += data[begin:end]

    def _header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            options = parse_options_header(self._value)[1]
            self._name = None if b"filename" in options else options.get(b"name")
        self._header = self._value = b""

    def _data(self, data: bytes, begin: int, end: int) -> None:
        if data is self._raw:
            self._span = (self._span[0] if self._span else begin, end)

    def _end(self) -> None:
        if self._name is not None and self._span is not None:
            self.fields[self._name] = self._span
