"""The allow-list as a table."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rotator.service.routes import Dialect, Kind, NoRoute, Route, is_ours, match

ALLOWED = {
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/rerank", "/v2/rerank", "/rerank",
    "/v1/score", "/score", "/tokenize", "/detokenize", "/v1/messages", "/v1/messages/count_tokens",
}  # fmt: skip


@given(st.sampled_from(["POST", "GET", "DELETE"]), st.binary(max_size=60).map(lambda b: b"/v1/" + b))
def test_whatever_the_client_writes_an_engine_is_asked_for_a_listed_path_only(method: str, raw: bytes) -> None:
    route = match(method, raw)
    if isinstance(route, Route) and route.kind in (Kind.INFER, Kind.STORED):
        path = route.path
        assert path in ALLOWED or path.startswith(("/v1/audio/", "/v1/images/", "/v1/responses/"))
        assert "." not in path
        assert "%" not in path
        assert "//" not in path


@pytest.mark.parametrize("path", sorted(ALLOWED))
def test_a_listed_path_takes_post_and_nothing_else(path: str) -> None:
    route = match("POST", path.encode())
    assert isinstance(route, Route)
    assert (route.kind, route.path) == (Kind.INFER, path)
    assert match("GET", path.encode()) == NoRoute(("POST",))


@pytest.mark.parametrize(
    ("method", "path", "item"),
    [
        ("GET", "/v1/responses/resp_1", "resp_1"),
        ("DELETE", "/v1/responses/r-2", "r-2"),
        ("POST", "/v1/responses/r/cancel", "r"),
    ],
)
def test_a_stored_answer_is_found_by_its_id(method: str, path: str, item: str) -> None:
    assert match(method, path.encode()) == Route(Kind.STORED, path, Dialect.RESPONSES, item)


def test_a_stored_answer_can_only_be_cancelled_by_post() -> None:
    assert match("GET", b"/v1/responses/r/cancel") == NoRoute(("POST",))
    assert match("POST", b"/v1/responses/r") == NoRoute(("GET", "DELETE"))


@pytest.mark.parametrize(
    ("path", "ours"),
    [
        ("/v1/anything", True),
        ("/v1", True),
        ("/v2/rerank", True),
        ("/tokenize", True),
        ("/score/x", True),
        ("/v1x", False),
        ("/scores", False),
        ("/sleep", False),
        ("/engines", False),
        ("/", False),
    ],
)
def test_the_data_plane_owns_its_prefixes_and_nothing_of_the_operators(path: str, ours: bool) -> None:
    assert is_ours(path) is ours
