"""The documents beside the code: what they must name, what they refer to, and that their commands exist."""

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer.main

from rotator.adapters.ledger_database import known_revisions
from rotator.cli import rest_docs
from rotator.cli.main import app
from rotator.core import gpu_faults, watchdog
from rotator.core.values import BlockKind, Depth, Health, State
from rotator.doctor.layers import LAYERS

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs"
DOCUMENTS = sorted([*DOCS.rglob("*.md"), *ROOT.glob("*.md")])
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^\s*```.*?^\s*```", re.MULTILINE | re.DOTALL)


def rows(name: str) -> set[str]:
    """What the first column of a document's tables names."""
    return set(re.findall(r"^\| `([\w-]+)`", (DOCS / name).read_text(), re.MULTILINE))


def incident_kinds() -> set[str]:
    """From the code that opens incidents: kinds are words there."""
    found = {k.value for k in watchdog.Kind} - {"well", "probe"} | {fault[3] for fault in gpu_faults.XIDS.values()}
    for file in ("service/news.py", "service/recovery.py", "service/sentinel.py", "core/gpu_faults.py"):
        text = (ROOT / "rotator" / file).read_text()
        found |= set(re.findall(r"""(?:kind=|kind, action = |GpuFinding\()"([a-z_]+)\"""", text))
        found |= set(
            re.findall(r"""facts\.kind or \("(\w+)" if .* else "(\w+)"\)""", text)[0] if "recovery" in file else ()
        )
    return found


def test_the_operations_guide_has_each_state_obstacle_incident_and_layer() -> None:
    named = rows("operations.md")
    assert {s.value for s in State} <= named
    assert {b.value for b in BlockKind} <= named
    assert incident_kinds() <= named
    assert {layer.name for layer in LAYERS} <= named


def test_the_operations_guide_names_each_depth_of_sleep_and_health_of_a_gpu() -> None:
    text = (DOCS / "operations.md").read_text()
    assert all(f"`{word}`" in text for word in [*(d.value for d in Depth), *(h.value for h in Health)])


def test_the_incident_kinds_are_found_in_the_code() -> None:
    assert {"wedged", "crashed", "silent", "lied", "failed", "garbage", "crash_loop", "gpu_lost"} <= incident_kinds()


def test_the_upgrade_notes_have_each_schema_of_the_ledger() -> None:
    assert rows("upgrading.md") | set(re.findall(r"^\| (v\d+)", (DOCS / "upgrading.md").read_text(), re.M)) >= (
        known_revisions()
    )


def test_the_reference_of_rest_is_current() -> None:
    assert (DOCS / "rest.md").read_text() == rest_docs.markdown(), "run 'make docs'"


def test_the_index_names_every_document() -> None:
    index = (DOCS / "README.md").read_text()
    missing = [d.name for d in DOCS.glob("*.md") if d.name != "README.md" and f"({d.name}" not in index]
    assert not missing, f"docs/README.md does not name {missing}"


def test_the_readme_stays_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: str(d.relative_to(ROOT)))
def test_every_link_of_a_document_leads_somewhere(document: Path) -> None:
    for link in _LINK.findall(_FENCE.sub("", document.read_text())):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), f"{link}: there is no {target}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{link}: no such heading"


def anchors(document: Path) -> set[str]:
    """As the usual renderers make them from headings."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE):
        plain = re.sub(r"[^\w\- ]", "", heading.strip().lower())
        found.add(plain.replace(" ", "-"))
    return found


def mentioned(text: str) -> Iterator[str]:
    """Lines of code that begin with our command: fenced, indented, or in the text."""
    for line in text.splitlines():
        bare = line.strip().removeprefix("$ ").removeprefix("&& ")
        if bare.startswith("rotator "):
            yield bare
        yield from (code for code in re.findall(r"`(rotator [^`]+)`", line))


@cache
def root() -> Any:
    return typer.main.get_command(app)


def problem(words: list[str]) -> str:
    """Why these words are no command of ours; '' where they are one."""
    command = root()
    at = 1
    while at < len(words) and getattr(command, "commands", None):
        if words[at] not in command.commands:
            if words[at].startswith("-") or (command.invoke_without_command and at > 1):
                break
            return f"there is no '{words[at]}'"
        command = command.commands[words[at]]
        at += 1
    known = {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | {"--help", "--install-completion"}
    given = [w.partition("=")[0] for w in words[at:] if w.startswith("-") and not w[1:2].isdigit()]
    unknown = [w for w in given if w not in known | {"--version", "--show-completion"}]
    return f"has no {unknown}" if unknown else ""


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: str(d.relative_to(ROOT)))
def test_every_command_that_a_document_mentions_exists_with_its_options(document: Path) -> None:
    for text in mentioned(document.read_text()):
        bare = re.split(r"\s+[#|>&;]|\s{3,}|…| — |\\$", text)[0]
        words = [w for w in shlex.split(bare.replace("'", ""), comments=True) if not w.startswith(("[", "<"))]
        assert not problem(words), f"{document.name}: {text}: {problem(words)}"


def test_a_command_that_does_not_exist_is_noticed() -> None:
    assert problem(["rotator", "frobnicate"])
    assert problem(["rotator", "wake", "a", "--gently"])
    assert not problem(["rotator", "jobs", "plan", "-s", "site.yaml"])
