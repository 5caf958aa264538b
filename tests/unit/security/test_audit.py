"""What the audit of dependencies concludes from what pip-audit says."""

import json

import pytest

from bench.audit import judge

CLEAN = {"dependencies": [{"name": "a", "version": "1", "vulns": []}, {"name": "b", "skip_reason": "local"}]}
FLAWED = {"dependencies": [{"name": "a", "version": "1", "vulns": [{"id": "CVE-1", "fix_versions": ["2"]}]}]}


def test_a_known_vulnerability_fails_the_build_and_names_its_fix(capsys: pytest.CaptureFixture[str]):
    assert judge(1, json.dumps(FLAWED), "") == 1
    assert "a 1: CVE-1: fixed in 2" in capsys.readouterr().err


def test_no_known_vulnerability_passes():
    assert judge(0, json.dumps(CLEAN), "") == 0


def test_without_a_way_to_the_advisories_it_says_so_and_passes(capsys: pytest.CaptureFixture[str]):
    assert judge(1, "", "pip_audit._service.interface.ServiceError: ...") == 0
    assert "nothing is known" in capsys.readouterr().err


def test_an_audit_that_fails_otherwise_is_no_pass():
    assert judge(2, "", "usage: pip-audit") == 1
