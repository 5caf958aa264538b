"""The command line's reference, from the commands themselves."""

from collections.abc import Iterator
from typing import Any

from rotator.cli.errors import MEANINGS

_HEAD = """# Command line

Made from the commands by `rotator schema --commands`; do not edit it by hand (`make docs` writes it).

Commands that speak to a running service take `--url` (or `ROTATOR_URL`) and `--key` (or `ROTATOR_KEY`). `--json` prints
what the service said, for scripts; without it, tables for people. Errors are one line on stderr that begins with
`rotator:`.

Tab completion of commands, options and engines' names: `rotator --install-completion` (bash, zsh, fish, PowerShell), or
`rotator --show-completion` for a package that installs it itself.

A wake or a launch that a terminal waits for draws a bar with the bytes that have come and when it will be ready, from
the service's own events."""


def markdown(command: Any) -> str:
    """``command`` is the root, as click has it."""
    sections = [_HEAD, "", "## Exit codes", "", "| code | meaning |", "|---|---|"]
    sections += [f"| {code} | {meaning} |" for code, meaning in MEANINGS.items()]
    names = [path for path, _ in _leaves(command)]
    sections += ["", "## Commands", "", ", ".join(f"[`{n}`](#{_anchor(n)})" for n in names) + "."]
    for path, leaf in _leaves(command):
        sections += ["", *_section(path, leaf)]
    return "\n".join(sections) + "\n"


def _leaves(command: Any, path: str = "rotator") -> Iterator[tuple[str, Any]]:
    """Every command that does something, by its whole name, in alphabetical order."""
    for name, inner in sorted(getattr(command, "commands", {}).items()):
        if inner.hidden:
            continue
        if getattr(inner, "commands", None):
            if inner.invoke_without_command:
                yield f"{path} {name}", inner
            yield from _leaves(inner, f"{path} {name}")
        else:
            yield f"{path} {name}", inner


def _anchor(name: str) -> str:
    return name.replace(" ", "-")


def _section(path: str, command: Any) -> list[str]:
    parameters = [p for p in command.params if p.name != "help" and not getattr(p, "hidden", False)]
    words = [_word(p) for p in parameters if p.param_type_name == "argument"]
    usage = " ".join([path, *words, *(["[OPTIONS]"] if len(words) < len(parameters) else [])])
    text = [" ".join(part.split()) for part in (command.help or "").split("\n\n")]
    lines = [f"### {path}", "", f"`{usage}`", ""]
    for part in text:
        lines += [part, ""]
    if parameters:
        lines += ["| | default | meaning |", "|---|---|---|", *(_row(p) for p in parameters)]
    return lines if parameters else lines[:-1]


def _word(parameter: Any) -> str:
    name = parameter.name.upper()
    name += "..." if parameter.nargs == -1 else ""
    return name if parameter.required else f"[{name}]"


def _row(parameter: Any) -> str:
    is_argument = parameter.param_type_name == "argument"
    names = [parameter.name.upper()] if is_argument else [*parameter.opts, *parameter.secondary_opts]
    meaning = (getattr(parameter, "help", None) or "").replace("|", "\\|")
    if variable := getattr(parameter, "envvar", None):
        meaning += f" (also `{variable}`)"
    return f"| {', '.join(f'`{n}`' for n in names)} | {_default(parameter)} | {meaning} |"


def _default(parameter: Any) -> str:
    if parameter.required:
        return "**required**"
    value = parameter.default
    if value is None or callable(value) or value is False or value == ():
        return ""
    if value is True and parameter.secondary_opts:
        return f"`{parameter.opts[0]}`"
    text = str(value)
    return f"`{text}`" if 0 < len(text) <= 40 else "see `--help`" if text else ""
