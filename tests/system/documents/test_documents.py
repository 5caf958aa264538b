"""Every command of the documents does what its document says, on a machine that follows them page by page."""

import asyncio
from pathlib import Path

from tests.nomad_double import NomadDouble
from tests.system.documents.sandbox import NOMAD_TOKEN, ROOT, sandbox

DOCS = ROOT / "docs"


def test_a_machine_follows_the_quick_start_and_the_guides_of_its_operator(tmp_path: Path) -> None:
    with sandbox(tmp_path) as machine:
        machine.environment_at("/opt/vllm")
        machine.replaced["/var/lib/rotator"] = str(tmp_path / "var")
        for name in ("quick-start.md", "concepts.md", "operations.md", "upgrading.md"):
            assert machine.follow(DOCS / name), f"{name} has no commands"


async def test_a_cluster_follows_the_guide_from_zero_to_a_fleet_on_nomad(tmp_path: Path) -> None:
    with sandbox(tmp_path) as machine:
        environ = machine.environment()
        async with NomadDouble(tmp_path / "nomad", token=NOMAD_TOKEN, environ=environ) as nomad:
            machine.on_nomad(nomad)
            assert await asyncio.to_thread(machine.follow, DOCS / "nomad-guide.md")
