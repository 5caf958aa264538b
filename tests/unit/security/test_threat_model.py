"""The threat model names a test for each threat: they must exist."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_every_test_that_the_threat_model_names_exists_and_every_threat_names_one():
    text = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", text))
    there = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"def (test_\w+)", path.read_text(encoding="utf-8"))
    }
    assert named
    assert sorted(named - there) == []
    threats = re.split(r"\n- |\n\n", text.partition("## Threats")[2].partition("## Settings")[0])
    unheld = [t for t in threats if ":" in t and "`test_" not in t and not t.startswith("**Not mitigated")]
    assert unheld == []
