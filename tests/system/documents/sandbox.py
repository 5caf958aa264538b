"""A machine for documents: a folder, a simulated box of GPUs, the `rotator` command, and stand-ins for the rest."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from allocator.box import SimulatedBox
from tests.nomad_double import NomadDouble
from tests.system.documents import warm
from tests.system.documents.blocks import Block, Command, blocks
from tests.system.service.rig import GIB, _environment, _pids, free_port

ROOT = Path(__file__).parents[3]
_SOON_S = 40.0

NOMAD_TOKEN = "a-token-of-the-test"
_EXPORT = re.compile(r"^export (\w+)=")

# Programs of a machine. Each says what it would have done; a block that uses one says so in the document's source.
STAND_INS = {
    # Engines: the stub speaks vLLM's dialect. Sizes are those of the box; names are the engines'.
    "vllm": """#!{python}
import os, sys
os.environ.update({env!r})
from rotator.demo.engine import main
given = dict(word.split("=", 1) for word in sys.argv[2:] if "=" in word)
given |= {{a: b for a, b in zip(sys.argv, sys.argv[1:]) if a in ("--served-model-name", "--port")}}
name, port = given["--served-model-name"], given["--port"]
sys.exit(main(["--name", name, "--port", port, "--weights-gib", "8", "--kv-gib", "4"]))
""",
    # A download: a model's folder, as small as one can be.
    "hf": """#!{python} -SIE
import json, pathlib, struct, sys
folder = pathlib.Path(sys.argv[sys.argv.index("--local-dir") + 1])
folder.mkdir(parents=True)
(folder / "config.json").write_text(json.dumps({{"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}}))
(folder / "tokenizer.json").write_text("{{}}")
head = json.dumps({{"w": {{"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}}}).encode()
(folder / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + b"0")
""",
    "pip": """#!/bin/sh
echo "Successfully installed rotator-0.1.0"
""",
    "nvidia-smi": """#!/bin/sh
echo "GPU 0: {gpu} (UUID: {uuid})"
""",
    # Nomad's own tool, as far as the guide needs it.
    "nomad": """#!/bin/bash
case "$1 $2 $3" in
  "acl policy apply") echo "Successfully wrote policy!" ;;
  "acl token create") echo '{{"SecretID": "{token}"}}' ;;
  "job stop "*) curl -sf -X DELETE -H "x-nomad-token: {token}" "$NOMAD_ADDR/v1/job/$3?namespace=default" > /dev/null ;;
  *) exit 2 ;;
esac
""",
    # A box's init: it starts and stops the one service, and waits as systemd does for Type=notify.
    "systemctl": """#!/bin/bash
cd {home}
stop() {{ pid=$(cat service.pid); kill -TERM "$pid"
  while [ "$(cut -d' ' -f3 "/proc/$pid/stat" 2> /dev/null || echo Z)" != Z ]; do sleep 0.02; done; }}
start() {{ rotator serve -c fleet.yaml >> service.log 2>&1 < /dev/null & echo $! > service.pid
  until curl -sf -o /dev/null {url}/readyz; do sleep 0.05; done; }}
case "$1" in stop) stop ;; start) start ;; restart) stop; start ;; *) exit 2 ;; esac
""",
}


class Sandbox:
    """``replaced`` maps what documents say to what is so here, in commands and files: a port that is free, a folder, a
    GPU's UUID. What commands print is read with the opposite."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.home.mkdir(parents=True)
        self.box = SimulatedBox.create(folder / "box", devices=1, memory_bytes=20 * GIB, copy_gib_s=0)
        self.port = free_port()
        self.replaced: dict[str, str] = {"8400": str(self.port)}
        self._exported: dict[str, str] = {}
        self._background: list[subprocess.Popen[bytes]] = []
        self._write_programs()
        self._warm = self._start_warm()

    def _write_programs(self) -> None:
        socket = self.folder / "w"
        self._program("rotator", warm.CLIENT, socket=str(socket))
        for name, text in STAND_INS.items():
            self._program(
                name, text, gpu=self.box.name, uuid=self.box.uuids[0], home=self.home,
                url=f"http://127.0.0.1:{self.port}", env=self.box.env(), token=NOMAD_TOKEN,
            )  # fmt: skip
        (self.folder / "always" / "python").parent.mkdir(exist_ok=True)
        (self.folder / "always" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        (self.folder / "always" / "python").chmod(0o755)

    def _program(self, name: str, text: str, **values: object) -> None:
        """Each in a folder of its own, so that a block finds only those that it names."""
        path = self.folder / ("always" if name == "rotator" else name) / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text.format(python=sys.executable, **values))
        path.chmod(0o755)

    def _start_warm(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tests.system.documents.warm", str(self.folder / "w")]
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **self.box.nvml_env(), "HOME": str(self.home)})
        _until((self.folder / "w.ready").exists, "the warm command", process)
        return process

    def environment_at(self, prefix: str) -> None:
        """A Python environment where documents have vLLM's."""
        place = self.folder / "environment"
        venv.create(place, with_pip=False)
        self.replaced[prefix] = str(place)

    def on_nomad(self, nomad: NomadDouble) -> None:
        """Let Nomad's tasks run here: an engine's container is a stub, the service's is the real command."""
        self.replaced["4646"] = nomad.address.rpartition(":")[2]
        for folder in ("/etc/rotator", "/var/lib/rotator", "/srv"):
            self.replaced[folder] = str(self.folder / "root") + folder
        self.replaced["GPU-44444444-4444-4444-8444-444444444444"] = self.box.uuids[0]
        self.replaced["awake_gib: 76, residue_gib: 2, host_gib: 26"] = "awake_gib: 13, residue_gib: 2, host_gib: 1"
        self.replaced |= {port: str(free_port()) for port in ("8505", "8506")}

        def argv(job: Mapping[str, Any], task: Mapping[str, Any]) -> list[str] | None:
            if task["Name"] == "vllm":
                return [str(self.folder / "vllm" / "vllm"), *map(str, task["Config"]["args"])]
            if task["Name"] == "rotator":
                return [str(self.folder / "always" / "rotator"), *map(self._here, task["Config"]["args"])]
            return None

        nomad.cluster.argv = argv

    # -- documents ---------------------------------------------------------------------------------------------------

    def follow(self, document: Path) -> int:
        """Do all that a document says. Returns how many commands were run."""
        return sum(self._do(block) for block in blocks(document))

    def _do(self, block: Block) -> int:
        if block.marks.file:
            path = self.home / self._here(block.marks.file)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self._here(block.text) + "\n")
            return 0
        commands = list(block.commands())
        for command in commands:
            if block.marks.background:
                self._begin(command, block)
            else:
                self._run(command, block)
        return len(commands)

    def _run(self, command: Command, block: Block) -> None:
        script = "set -euo pipefail\n" + self._here(command.text)
        exported = _EXPORT.match(command.text)
        if exported:  # a reader's shell would keep it
            script += f'\nprintf %s "${exported[1]}"'
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=self.home,
            env=self.environment(block.marks.stand_ins),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=90,
            check=False,
        )
        said = self._as_documented(done.stdout)
        where = f"{command.place}: $ {command.text}\n{said}"
        print(where)
        assert done.returncode == command.exit_code, f"exit code {done.returncode}, not {command.exit_code}\n{where}"
        if exported:
            self._exported[exported[1]] = done.stdout
        missing = first_missing(command.shown, said)
        assert missing is None, f"it does not print (in this order): {missing}\n{where}"

    def _begin(self, command: Command, block: Block) -> None:
        with (self.home / "service.log").open("ab") as log:
            process = subprocess.Popen(
                ["bash", "-c", "exec " + self._here(command.text)],
                cwd=self.home,
                env=self.environment(block.marks.stand_ins),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        (self.home / "service.pid").write_text(str(process.pid))
        self._background.append(process)
        url = self._here(block.marks.background)
        _until(lambda: _answers(url), f"{block.place}: {url}", process, self.home / "service.log")

    def environment(self, stand_ins: Sequence[str] = ()) -> Mapping[str, str]:
        folders = [self.folder / name for name in ("always", *stand_ins)]
        own = {
            "HOME": str(self.home),
            "PATH": ":".join([*map(str, folders), "/usr/bin", "/bin"]),
            "ROTATOR_URL": f"http://127.0.0.1:{self.port}",
            "COLUMNS": "160",
            "PYTHONPATH": str(ROOT),
            "LANG": "C.UTF-8",
        }
        return {**own, **self.box.env(), **self.box.nvml_env(), **self._exported}

    def _here(self, text: str) -> str:
        for documented, real in self.replaced.items():
            text = text.replace(documented, real)
        return text

    def _as_documented(self, text: str) -> str:
        for documented, real in self.replaced.items():
            text = text.replace(real, documented)
        return text

    # -- the end -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End every process whose home is here."""
        for process in (*self._background, self._warm):
            process.kill()
            process.wait()
        for _ in range(3):  # what is just being started may start something
            for pid in self.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def processes(self) -> set[int]:
        mark = f"HOME={self.home}".encode() + b"\0"
        return {pid for pid in _pids() if mark in _environment(pid)} - {os.getpid()}


@contextlib.contextmanager
def sandbox(folder: Path) -> Iterator[Sandbox]:
    made = Sandbox(folder)
    try:
        yield made
    finally:
        made.close()


def first_missing(shown: tuple[str, ...], said: str) -> str | None:
    """The first shown line that is not among what was said, after the one before it. Blanks do not count."""
    lines = iter(said.splitlines())
    for line in shown:
        wanted = re.compile(".*?".join(re.escape(_plain(part)) for part in line.split("…")))
        if not any(wanted.search(_plain(given)) for given in lines):
            return line
    return None


def _plain(text: str) -> str:
    return re.sub(r"\s+", "", text)


def _answers(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2) as answer:
        return bool(answer.status == 200)
    return False


def _until(holds: object, what: str, process: subprocess.Popen[bytes], log: Path | None = None) -> None:
    """Look again and again, while the process lives."""
    until_s = time.monotonic() + _SOON_S
    while not holds():  # type: ignore[operator]
        said = log.read_text(errors="replace")[-3000:] if log and log.exists() else ""
        assert process.poll() is None, f"{what}: it ended with {process.returncode}\n{said}"
        assert time.monotonic() < until_s, f"{what}: not within {_SOON_S} s\n{said}"
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.05)
