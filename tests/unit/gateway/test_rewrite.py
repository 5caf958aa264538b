"""Bodies and events: found, changed where they must, untouched otherwise."""

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rotator.config import OverridesConfig
from rotator.service import rewrite
from rotator.service.responses import ApiError
from rotator.service.rewrite import Events, body_for, read_request, rename, rename_json
from rotator.service.routes import Target

EVENT = st.sampled_from(
    [
        b"data: 1\n\n",
        b'data: {"model":"m","x":"\\n"}\n\n',
        b"event: a\r\ndata: b\r\n\r\n",
        b": comment\n\n",
        b"data: one\ndata: two\n\n",
        b"data: [DONE]\n\n",
    ]
)


@given(st.lists(EVENT, max_size=8), st.data())
def test_however_a_stream_is_cut_the_same_bytes_come_out_in_whole_events(
    events: list[bytes], data: st.DataObject
) -> None:
    stream = b"".join(events)
    cutter = Events()
    out, at = [], 0
    while at < len(stream):
        step = data.draw(st.integers(1, len(stream)))
        piece = cutter.feed(stream[at : at + step])
        assert piece == b"" or piece.endswith((b"\n\n", b"\r\n\r\n"))
        out.append(piece)
        at += step
    assert b"".join(out) + cutter.flush() == stream
    assert cutter.flush() == b""


@given(st.lists(EVENT, max_size=8), st.integers(1, 9))
def test_renaming_does_not_depend_on_where_the_pieces_end(events: list[bytes], size: int) -> None:
    stream = b"".join(events)
    cutter = Events("n")
    out = b"".join(cutter.feed(stream[i : i + size]) for i in range(0, len(stream), size)) + cutter.flush()
    assert out == stream.replace(b'"model":"m"', b'"model":"n"')


def test_an_event_over_the_bound_passes_in_pieces_and_is_known_to_be_unfinished(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rewrite, "EVENT_BYTES_MAX", 10)
    cutter = Events()
    assert cutter.feed(b"data: 0123456789") == b"data: 0123456789"
    assert not cutter.whole
    assert cutter.feed(b"\n\n") == b"\n\n"
    assert cutter.whole


def test_only_the_places_that_name_a_model_are_renamed() -> None:
    answer = {"model": "m", "response": {"model": "m"}, "message": {"model": "m"}, "choices": [{"model": "m"}]}
    assert rename(answer, "n")
    assert answer == {"model": "n", "response": {"model": "n"}, "message": {"model": "n"}, "choices": [{"model": "m"}]}
    assert not rename(answer, "n")
    assert not rename(["model"], "n")


@pytest.mark.parametrize(
    "body", [b"{}", b'{"model" ', b'["model"]', b'{"x":"model"}', b'{"model":"n"}', b'{"model":1}']
)
def test_an_answer_without_another_name_keeps_its_very_bytes(body: bytes) -> None:
    assert rename_json(body, "n") is body


def test_a_request_without_alias_or_override_keeps_its_very_bytes() -> None:
    raw = b'{ "model":"m" }'
    request = read_request(raw, "application/json")
    assert body_for(request, "m", target("m")) is raw


def test_overrides_never_change_which_model_the_engine_is_asked_for() -> None:
    request = read_request(b'{"model":"m"}', "application/json")
    overrides = OverridesConfig(set={"model": "x"}, remove=("model",))
    assert orjson.loads(body_for(request, "real", target("real", overrides))) == {"model": "real"}


@pytest.mark.parametrize(("value", "streams"), [(b"true", True), (b"false", False), (b'"true"', False), (b"1", False)])
def test_only_true_asks_for_a_stream(value: bytes, streams: bool) -> None:
    assert read_request(b'{"model":"m","stream":' + value + b"}", "application/json").stream is streams


def test_a_file_called_model_is_not_the_models_name() -> None:
    body = b'--b\r\nContent-Disposition: form-data; name="model"; filename="x"\r\n\r\nevil\r\n--b--\r\n'
    with pytest.raises(ApiError) as e:
        read_request(body, "multipart/form-data; boundary=b")
    assert e.value.code == "missing_model"


@given(
    st.binary(max_size=200), st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), min_size=1, max_size=20)
)
def test_a_form_keeps_every_other_byte_when_its_model_is_replaced(file: bytes, name: str) -> None:
    def form(model: str) -> bytes:
        return (
            b'--bOuNd\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
            + file.replace(b"\r\n--bOuNd", b"")
            + b'\r\n--bOuNd\r\nContent-Disposition: form-data; name="model"\r\n\r\n'
            + model.encode()
            + b"\r\n--bOuNd--\r\n"
        )

    request = read_request(form(name), "multipart/form-data; boundary=bOuNd")
    assert request.model == name
    assert body_for(request, "other") == form("other")
    assert body_for(request, name) is request.raw


def target(served: str, overrides: OverridesConfig | None = None) -> Target:
    return Target("a", "http://x", served, "m", overrides or OverridesConfig())
