"""Keys, scopes, and what a web page may not do."""

import pytest

from rotator.config import BindConfig
from rotator.service.keys import Keys, digest, new_key
from tests.unit.api.conftest import key

LOCAL = {"host": "127.0.0.1:8400"}


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


def test_without_keys_whoever_reaches_the_service_is_trusted():
    assert Keys().authorize({}, "admin") is None


@pytest.mark.parametrize(
    ("held", "allowed"),
    [("infer", ["infer"]), ("operate", ["infer", "operate"]), ("admin", ["infer", "operate", "admin"])],
)
def test_a_scope_includes_the_ones_below_it(held: str, allowed: list[str]):
    keys = Keys([key(held)])
    scopes = ("infer", "operate", "admin")
    assert [s for s in scopes if keys.authorize(bearer(f"{held}-secret"), s) is None] == allowed


def test_a_missing_key_is_401_and_a_missing_scope_403_with_its_name():
    keys = Keys([key("infer"), key("operate")])
    missing, wrong = keys.authorize({}, "infer"), keys.authorize(bearer("guess"), "infer")
    low = keys.authorize(bearer("infer-secret"), "admin")
    assert missing is not None
    assert wrong is not None
    assert low is not None
    assert (missing.status, wrong.status, low.status) == (401, 401, 403)
    assert "'a infer' lacks scope 'admin'" in low


@pytest.mark.parametrize(
    "headers", [{"authorization": "bearer infer-secret"}, {"x-api-key": "infer-secret"}, bearer(" infer-secret")]
)
def test_both_clients_ways_to_send_a_key_are_taken(headers: dict[str, str]):
    assert Keys([key("infer")]).authorize(headers, "infer") is None


@pytest.mark.parametrize("header", ["Basic aW5mZXI=", "Bearer", "Bearer ", "infer-secret", "Bearer \udcff"])
def test_what_is_no_bearer_key_is_refused_without_an_error(header: str):
    denial = Keys([key("infer")]).authorize({"authorization": header}, "infer")
    assert denial is not None
    assert denial.status == 401


def test_a_new_key_matches_the_digest_that_goes_into_the_file_and_no_two_are_alike():
    one, other = new_key(), new_key()
    assert digest(one.secret) == one.sha256
    assert one.secret != other.secret


@pytest.mark.parametrize("host", ["127.0.0.1:8400", "localhost:8400", "[::1]:8400", "127.0.0.2", "LOCALHOST"])
def test_loopback_names_are_the_service_itself(host: str):
    assert Keys().guard("GET", {"host": host}) is None


@pytest.mark.parametrize("host", ["evil.example:8400", "", "127.0.0.1.evil.example", "[::1", "10.0.0.7:8400"])
def test_a_rebound_name_is_refused_even_for_reading(host: str):
    denial = Keys().guard("GET", {"host": host})
    assert denial is not None
    assert denial.status == 421
    assert "bind.hosts" in denial


def test_a_configured_host_name_is_the_service_itself():
    keys = Keys(bind=BindConfig(hosts=("models.example",)))
    assert keys.guard("GET", {"host": "models.example"}) is None


@pytest.mark.parametrize(
    "page",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:3000"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_a_page_of_another_origin_may_not_post(page: dict[str, str]):
    denial = Keys().guard("POST", {**LOCAL, **page})
    assert denial is not None
    assert denial.status == 403


@pytest.mark.parametrize("page", [{}, {"origin": "http://127.0.0.1:8400", "sec-fetch-site": "same-origin"}])
def test_programs_and_the_services_own_page_may_post(page: dict[str, str]):
    assert Keys().guard("POST", {**LOCAL, **page}) is None


def test_with_keys_a_page_cannot_do_harm_and_is_not_asked():
    keys = Keys([key("infer")])
    assert keys.guard("POST", {"host": "models.example", "origin": "https://chat.example"}) is None
