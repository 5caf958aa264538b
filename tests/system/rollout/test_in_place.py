"""An environment exchanged under its engine: the command killed in mid-install, an install that fails, an abort."""

import os
import re
import signal
import sys
import sysconfig
import venv
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from rotator.rollout import run
from tests.system.rollout.stage import Command, Killable, Stage
from tests.system.service.rig import engine, eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

OLD, NEW = "0.26.0", "0.28.0"
QUICK = ("--recall", "2", "--recall-words", "60", "--cycles", "1", "--samples", "1", "--tolerance", "5", "--away", "60")

# As pip does: the program goes first, and comes back last. Where there is a gate, it waits in the middle.
INSTALLER = """\
import os, pathlib, sys
program, release, gate, version, code = (*map(pathlib.Path, sys.argv[1:4]), *sys.argv[4:])
text = program.read_text() if program.exists() else release.with_name("program.txt").read_text()
release.with_name("program.txt").write_text(text)
program.unlink(missing_ok=True)
release.write_text("half of it")
if gate.exists():
    gate.read_text()
if code == "0":
    release.write_text(f"RELEASE = {version!r}")
    program.write_text(text)
    program.chmod(0o755)
sys.exit("no matching distribution" if code != "0" else 0)
"""


class InPlace(Stage):
    """Engine a runs from an environment of its own, b from elsewhere."""

    def __init__(self, folder: Path) -> None:
        self.prefix, self.gate, self.archives = folder / "opt/vllm", folder / "gate", folder / "archives"
        venv.create(self.prefix, symlinks=True, with_pip=False)
        site = next(self.prefix.glob("lib/python3*/site-packages"))
        (site / "stub.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
        self.program, self.release = self.prefix / "bin/vllm", site / "vllm_release.py"
        self.release.write_text(f"RELEASE = {OLD!r}")
        serve = "from rotator.demo.engine import main\nsys.exit(main([*sys.argv[1:], '--dialect', RELEASE]))"
        self.program.write_text(f"#!{self.prefix}/bin/python\nimport sys\nfrom vllm_release import RELEASE\n{serve}\n")
        self.program.chmod(0o755)
        (folder / "installer.py").write_text(INSTALLER)
        one = engine("a", arguments=["--tokens-per-s", "1000"])
        one["command"] = [str(self.program), *one["command"][3:]]
        super().__init__(folder, [one, engine("b", gpus=[1])], gpus=2)

    def words(self, version: str, code: int = 0) -> tuple[str, ...]:
        own = [self.folder / "installer.py", self.program, self.release, self.gate]
        install = " ".join(map(str, [sys.executable, *own, version, code]))
        places = ("--environment", str(self.prefix), "--archives", str(self.archives))
        return ("--install", install, *places, *QUICK, "--yes")

    async def killed_in_mid_install(self, version: str) -> None:
        """The command is killed; its installer stays, waiting at the gate."""
        os.mkfifo(self.gate)
        await Killable(self, *self.words(version)).killed_when(lambda: not self.program.exists())

    async def open_gate(self) -> None:
        """The installer at the gate goes on; no further one waits there."""
        handles: list[int] = []

        def is_open() -> bool:
            try:
                handles.append(os.open(self.gate, os.O_WRONLY | os.O_NONBLOCK))
            except OSError:  # nobody reads yet
                return False
            return True

        await eventually(is_open, what="an installer at the gate")
        self.gate.unlink()
        os.close(handles[0])

    async def runs(self) -> str:
        """The release that engine a tells of itself, once it has answered."""
        await self.say("a")
        return str((await self.view("a"))["version"])

    async def health(self) -> list[str]:
        return [gpu["health"] for gpu in await self.get("/gpus")]


@pytest.fixture(autouse=True)
def looked_again_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "AGAIN_S", 0.1)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rig(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[InPlace]:
    made = InPlace(tmp_path_factory.mktemp("in-place"))
    try:
        await made.serve()
        yield made
    finally:
        if made.gate.exists():  # a test failed: no installer waits on
            os.close(os.open(made.gate, os.O_RDWR | os.O_NONBLOCK))
        await made.close()


async def test_a_command_killed_in_mid_install_goes_on_when_its_installer_has_ended(rig: InPlace) -> None:
    assert await rig.runs() == OLD
    await rig.killed_in_mid_install(NEW)
    assert await rig.state("a") == "stopped"
    assert await rig.health() == ["cordoned", "ok"], "nothing starts from half an environment"
    assert await rig.say("b")
    resumed = Command(rig, "--resume")
    await resumed.until_said("waits: a killed command left its installer at work")
    assert rig.release.read_text() == "half of it", "two installers are never at work"
    await rig.open_gate()
    assert await resumed.end() == 0, resumed.said
    assert "a runs the new version" in resumed.said
    assert await rig.runs() == NEW
    assert await rig.health() == ["ok", "ok"]
    await rig.check()


async def test_an_install_that_fails_leaves_the_environment_and_the_engine_as_they_were(rig: InPlace) -> None:
    before = await rig.runs()
    command = Command(rig, *rig.words("0.33.0", code=1))
    assert await command.end() == 5, command.said
    assert "a failed at install: " in command.said
    assert "ended with code 1: no matching distribution" in command.said
    assert "a runs its former version again" in command.said
    assert await rig.runs() == before
    assert await rig.health() == ["ok", "ok"]


async def test_an_abort_takes_back_what_a_killed_command_had_half_installed(rig: InPlace) -> None:
    before = await rig.runs()
    await rig.killed_in_mid_install("0.33.0")
    aborted = Command(rig, "--abort")
    await aborted.until_said("end it by `kill -- -")
    (group,) = set(re.findall(r"kill -- -(\d+)", aborted.said))
    os.killpg(int(group), signal.SIGKILL)
    assert await aborted.end() == 5, aborted.said
    assert "a was aborted" in aborted.said
    assert await rig.runs() == before
    assert [f.name for f in rig.prefix.parent.iterdir()] == ["vllm"], "nothing is left beside it"
    assert await rig.health() == ["ok", "ok"]
    await rig.check()
