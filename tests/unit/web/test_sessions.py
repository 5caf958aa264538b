"""Tokens that stand for keys."""

import pytest

from rotator.service.keys import Keys
from rotator.service.sessions import Sessions
from tests.unit.api.conftest import key


def sessions(*scopes: str, secret: str = "s" * 32, lasts_s: float = 60.0) -> Sessions:
    return Sessions(secret, [key(s) for s in scopes], lasts_s)


def test_a_token_stands_for_its_key_and_for_no_more_than_that_key_may_do():
    made = sessions("operate")
    keys = Keys([key("operate")], sessions=made)
    headers = {"authorization": f"Bearer {made.issue('a operate')}"}
    assert keys.authorize(headers, "operate") is None
    denial = keys.authorize(headers, "admin")
    assert denial is not None
    assert denial.status == 403
    assert keys.client(headers) == "a operate"


def test_a_token_outlives_the_service_that_gave_it_but_not_its_end():
    token = sessions("admin").issue("a admin")
    again = sessions("admin").read(token)
    assert again is not None
    assert again.key == "a admin"
    assert sessions("admin", lasts_s=-2).read(token) is None


@pytest.mark.parametrize(
    "spoil", [lambda t: t[:-1], lambda t: t + "x", lambda t: "rs-" + t, lambda t: t[3:], str.upper]
)
def test_a_token_that_was_tampered_with_is_none(spoil):
    assert sessions("admin").read(spoil(sessions("admin").issue("a admin"))) is None


def test_a_token_of_another_secret_or_of_a_key_that_is_gone_or_replaced_is_none():
    token = sessions("admin").issue("a admin")
    assert sessions("admin", secret="other").read(token) is None
    assert sessions("infer").read(token) is None
    replaced = key("admin").model_copy(update={"sha256": "0" * 64})
    assert Sessions("s" * 32, [replaced], 60.0).read(token) is None


def test_a_token_is_no_key_to_log_in_with():
    made = sessions("admin")
    keys = Keys([key("admin")], sessions=made)
    assert keys.login("admin-secret") == ("a admin", 3)
    assert keys.login(made.issue("a admin")) is None
    assert keys.login("guess") is None
