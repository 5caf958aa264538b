"""Engines' logs read for operators, on real files."""

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from rotator.adapters.logfiles import FileLogs
from rotator.adapters.redact import redactor
from rotator.ports import LaunchError


@pytest.fixture
def logs() -> FileLogs:
    return FileLogs(redactor({"HF_TOKEN": "a-very-secret-value"}))


async def lines_of(batches: AsyncGenerator[tuple[str, ...]], wanted: int) -> list[str]:
    """So many lines, and no more is read."""
    found: list[str] = []
    async with asyncio.timeout(20):
        async for batch in batches:
            found += batch
            if len(found) >= wanted:
                break
    await batches.aclose()
    return found


async def test_the_last_lines_come_first_and_secrets_do_not_come_at_all(logs: FileLogs, tmp_path: Path):
    path = tmp_path / "a.log"
    path.write_text(
        "".join(f"line {i}\n" for i in range(100_000)) + "token a-very-secret-value\nauthorization: Bearer abcdefgh1\n"
    )
    found = await lines_of(logs.read(str(path), lines=3, follow=False), 3)
    assert found[0] == "line 99999"
    assert "very-secret" not in "".join(found)
    assert "abcdefgh1" not in "".join(found)


async def test_what_is_added_comes_in_whole_lines(logs: FileLogs, tmp_path: Path):
    path = tmp_path / "a.log"
    path.write_text("old\nhalf")
    batches = logs.read(str(path), lines=10, follow=True)
    assert await anext(batches) == ("old",)
    with path.open("a") as file:
        file.write(" and whole\nnext\n")
    assert await lines_of(batches, 2) == ["half and whole", "next"]


async def test_a_rotated_log_and_one_that_appears_later_are_read_from_their_beginning(logs: FileLogs, tmp_path: Path):
    path = tmp_path / "a.log"
    batches = logs.read(str(path), lines=10, follow=True)
    assert await anext(batches) == ()
    path.write_text("first\n")
    async with asyncio.timeout(20):
        while (batch := await anext(batches)) == ():
            pass
    assert batch == ("first",)
    path.replace(tmp_path / "a.log.1")
    path.write_text("second, of another file\n")
    assert await lines_of(batches, 1) == ["second, of another file"]


async def test_a_line_without_an_end_does_not_grow_for_ever(logs: FileLogs, tmp_path: Path):
    path = tmp_path / "a.log"
    path.write_bytes(b"x" * 5_000_000)
    [line] = await lines_of(logs.read(str(path), lines=1, follow=False), 1)
    assert len(line) <= 16 << 10


async def test_what_cannot_be_read_is_told(logs: FileLogs, tmp_path: Path):
    with pytest.raises(LaunchError, match="cannot be read"):
        await lines_of(logs.read(str(tmp_path), lines=1, follow=False), 1)
