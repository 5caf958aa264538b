"""The image's definition, read as a builder reads it: what its stages take, leave behind and run as."""

import json
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def instructions() -> list[tuple[str, str]]:
    """(word, rest) of each instruction, lines joined, comments gone."""
    text = "\n".join(line for line in (ROOT / "deploy/Containerfile").read_text().splitlines() if line[:1] != "#")
    lines = re.sub(r"\\\n", " ", text).splitlines()
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines if line.strip())]


def stages() -> list[list[tuple[str, str]]]:
    found: list[list[tuple[str, str]]] = []
    for word, rest in instructions():
        if word == "FROM":
            found.append([])
        found[-1].append((word, rest))
    return found


def test_it_has_a_stage_that_builds_and_one_that_holds_no_compiler() -> None:
    build, final = stages()
    assert any("g++" in rest for word, rest in build if word == "RUN")
    assert not any("apt-get" in rest for word, rest in final if word == "RUN")
    assert ("COPY", "--from=build /wheels /wheels") in final
    assert any("--no-index" in rest for word, rest in final if word == "RUN"), "what was built is what is installed"


def test_every_base_is_named_by_registry_and_version() -> None:
    for word, rest in instructions():
        if word == "FROM":
            assert re.match(r"^[a-z0-9.-]+\.[a-z]+/[\w./-]+:\d[\w.-]*( AS \w+)?$", rest), rest


def test_nothing_is_left_of_package_lists_and_caches() -> None:
    for word, rest in instructions():
        if word != "RUN":
            continue
        assert "apt-get update" not in rest or "rm -rf /var/lib/apt/lists/*" in rest
        assert "--no-cache-dir" in rest or not re.search(r"pip (install|wheel)", rest)


def test_it_runs_as_a_user_that_is_not_root_and_is_named_by_number() -> None:
    users = [rest for word, rest in stages()[-1] if word == "USER"]
    assert users
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1]), (
        "a number, so that an orchestrator can tell that it is not root"
    )


@pytest.mark.parametrize("word", ["ENTRYPOINT", "CMD"])
def test_programs_are_started_without_a_shell(word: str) -> None:
    (rest,) = [rest for w, rest in stages()[-1] if w == word]
    assert isinstance(json.loads(rest), list)


def test_its_health_is_asked_where_the_service_tells_it() -> None:
    (rest,) = [rest for word, rest in stages()[-1] if word == "HEALTHCHECK"]
    command = json.loads(rest.partition("CMD ")[2])
    assert command[0].startswith("/")
    compile(command[-1], "healthcheck", "exec")
    assert "/healthz" in command[-1]


def test_what_is_copied_exists_and_is_not_ignored() -> None:
    for name in (".containerignore", ".dockerignore"):
        kept = {line[1:] for line in (ROOT / name).read_text().splitlines() if line.startswith("!")}
        sources = [source for word, rest in stages()[0] if word == "COPY" for source in rest.split()[:-1]]
        assert set(sources) == kept
    assert all((ROOT / source).exists() for source in sources)


def test_the_wheel_takes_nothing_from_the_tree_that_the_image_lacks() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["scikit-build"]["wheel"]["packages"]
    copied = {rest.split()[0] for word, rest in stages()[0] if word == "COPY"}
    assert set(packages.values() if isinstance(packages, dict) else packages) <= copied
    assert project["project"]["readme"] in {s for w, r in stages()[0] if w == "COPY" for s in r.split()[:-1]}
