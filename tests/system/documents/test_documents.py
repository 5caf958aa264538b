"""Every command of the documents does what its document says, on a machine that follows them page by page."""

import asyncio
import re
from pathlib import Path

from tests.nomad_double import NomadDouble
from tests.system.documents.blocks import blocks
from tests.system.documents.sandbox import NOMAD_TOKEN, ROOT, sandbox

_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"^    (?:rotator|python3? -m|make|pip|docker|systemctl|pytest|nomad) .*$", re.MULTILINE)
DOCS = ROOT / "docs"
GUIDES = ("quick-start.md", "concepts.md", "operations.md", "upgrading.md")
REFERENCE = ("policies-calendar.md", "policies.md", "soak.md", "nodes.md", "watchdog.md", "overlays.md", "../README.md")
ELSEWHERE = ("nomad-guide.md",)


def test_every_page_with_commands_to_run_is_followed() -> None:
    pages = [*DOCS.rglob("*.md"), *ROOT.glob("*.md")]
    runnable = {page for page in pages if any(command for block in blocks(page) for command in block.commands())}
    assert runnable == {(DOCS / name).resolve() for name in (*GUIDES, *REFERENCE, *ELSEWHERE)}


def test_no_page_has_commands_where_nothing_looks_for_them() -> None:
    """Indented, they would be seen as code and run by nobody."""
    for page in (*DOCS.rglob("*.md"), *ROOT.glob("*.md")):
        outside = _FENCE.sub("", page.read_text())
        assert not _INDENTED.findall(outside), f"{page.name}: put these into a console block"


def test_a_machine_follows_the_quick_start_and_the_guides_of_its_operator(tmp_path: Path) -> None:
    with sandbox(tmp_path) as machine:
        machine.environment_at("/opt/vllm")
        machine.replaced["/var/lib/rotator"] = str(tmp_path / "var")
        for name in GUIDES:
            assert machine.follow(DOCS / name), f"{name} has no commands"
        machine.replaced |= {"glm-5.1": "chat", "/etc/rotator": str(tmp_path / "etc")}
        (tmp_path / "etc").mkdir()
        for name in REFERENCE:
            assert machine.follow(DOCS / name), f"{name} has no commands"


async def test_a_cluster_follows_the_guide_from_zero_to_a_fleet_on_nomad(tmp_path: Path) -> None:
    with sandbox(tmp_path) as machine:
        environ = machine.environment()
        async with NomadDouble(tmp_path / "nomad", token=NOMAD_TOKEN, environ=environ) as nomad:
            machine.on_nomad(nomad)
            assert await asyncio.to_thread(machine.follow, DOCS / "nomad-guide.md")
