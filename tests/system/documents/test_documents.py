"""Every command of the documents does what its document says, on one simulated machine from the first page to the last."""

from pathlib import Path

from tests.system.documents.sandbox import ROOT, sandbox

DOCS = ROOT / "docs"


def test_a_machine_follows_the_quick_start_and_the_guides_of_its_operator(tmp_path: Path) -> None:
    with sandbox(tmp_path) as machine:
        machine.environment_at("/opt/vllm")
        machine.replaced["/var/lib/rotator"] = str(tmp_path / "var")
        for name in ("quick-start.md", "concepts.md", "operations.md", "upgrading.md"):
            assert machine.follow(DOCS / name), f"{name} has no commands"
