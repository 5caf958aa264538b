"""The documents' fenced blocks, as commands to run and files to write.

A ``console`` block has ``$ command`` lines, each followed by lines of what it prints; a ``bash`` block is one script.
What a reader cannot see stands in an HTML comment before the block, ``<!-- docs: … — reason -->``:

    file NAME           the block is that file, not a command
    background URL      the command goes on running; it is ready when URL answers
    stand-in A, B       these programs mean a machine that a test is not: the sandbox has programs of that name
    not-run             commands that another test runs, or that cannot run here
    not-run A, B        the same of those of the block's commands that begin with A or B

``# exit code 1`` at a command's end is what it must end with, else 0. In shown lines ``…`` stands for anything.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_COMMENT = re.compile(r"^<!-- docs: (?P<what>.+?) — (?P<why>.+?) -->$")
_EXIT = re.compile(r"#\s*exit code (\d+)\b")
_HEREDOC = re.compile(r"<<-?\s*'?(\w+)'?")


@dataclass(frozen=True, slots=True)
class Marks:
    file: str = ""
    background: str = ""
    stand_ins: tuple[str, ...] = ()
    not_run: str = ""
    skips: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Command:
    """``shown`` are lines that must be printed, in this order, among others."""

    text: str
    place: str
    exit_code: int = 0
    shown: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Block:
    language: str
    place: str  # document:line
    text: str
    marks: Marks = field(default_factory=Marks)

    def commands(self) -> Iterator[Command]:
        """Those that are to be run."""
        if self.language == "bash":
            every = iter([Command(self.text, self.place)])
        else:
            every = _console(self) if self.language == "console" else iter(())
        return (c for c in every if not self.marks.not_run and not c.text.startswith(self.marks.skips or ("\0",)))


def blocks(document: Path) -> Iterator[Block]:
    """Every fenced block, in the order of the document."""
    lines = document.read_text().splitlines()
    above: list[str] = []
    number = 0
    while number < len(lines):
        line = lines[number].strip()
        if line.startswith("```"):
            end = next(i for i in range(number + 1, len(lines)) if lines[i].strip() == "```")
            text = "\n".join(lines[number + 1 : end])
            yield Block(line[3:].strip(), f"{document.name}:{number + 2}", text, _marks(above, document, number))
            above, number = [], end
        elif line.startswith("<!--"):
            above.append(line)
        elif line:
            above = []
        number += 1


def _marks(above: list[str], document: Path, number: int) -> Marks:
    found: dict[str, str] = {}
    for comment in above:
        if not comment.startswith("<!-- docs:"):
            continue
        match = _COMMENT.match(comment)
        assert match, f"{document.name}:{number + 1}: no '<!-- docs: WHAT — REASON -->': {comment}"
        key, _, value = match["what"].partition(" ")
        found["skips" if key == "not-run" and value else key] = value or match["why"]
    unknown = found.keys() - {"file", "background", "stand-in", "not-run", "skips"}
    assert not unknown, f"{document.name}:{number + 1}: {unknown}"
    return Marks(
        found.get("file", ""),
        found.get("background", ""),
        _listed(found.get("stand-in", "")),
        found.get("not-run", ""),
        _listed(found.get("skips", "")),
    )


def _listed(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _console(block: Block) -> Iterator[Command]:
    first = int(block.place.rpartition(":")[2])
    lines = block.text.splitlines()
    assert lines[0].startswith("$ "), f"{block.place}: a console block begins with '$ '"
    at = 0
    while at < len(lines):
        place = f"{block.place.rpartition(':')[0]}:{first + at}"
        command = [lines[at][2:]]
        at += 1
        while command[-1].endswith("\\"):
            command.append(lines[at])
            at += 1
        if found := _HEREDOC.search(command[-1]):
            end = lines.index(found[1], at)
            command += lines[at : end + 1]
            at = end + 1
        shown = []
        while at < len(lines) and not lines[at].startswith("$ "):
            shown.append(lines[at])
            at += 1
        code = _EXIT.search(command[0])
        yield Command("\n".join(command), place, int(code[1]) if code else 0, tuple(s for s in shown if s.strip()))
