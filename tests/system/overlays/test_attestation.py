"""What workers say that they run, asked over HTTP and compared with the manifest."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from overlays import bundle, registry
from overlays.bundle import Built
from overlays.cli import app
from overlays.payload import attest as payload
from overlays.sources import Memory
from tests.overlay_sleep_files import CUMEM, MIDDLE, stock

SLEEP = ("attest", "driver-state", "failed-rank-guard", "stream-aware-free", "transactional-wake")
SCRIPT = Path(payload.__file__)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    patches = registry.chosen(registry.all_patches(), SLEEP, ())
    return bundle.build(Memory(stock(MIDDLE), "0.26.0"), patches, tmp_path_factory.mktemp("bundles"))


def verify(built: Built, attested: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["verify", str(built.path), "--attested", str(attested)])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.stdout + result.stderr


def engine(built: Built, folder: Path, mounted: bool = True) -> Path:
    """A package as a container sees it, with the bundle mounted over it or not."""
    for path, text in {**stock(MIDDLE), "vllm/__init__.py": ""}.items():
        file = folder / path
        for parent in file.relative_to(folder).parents:
            (folder / parent).mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    if mounted:
        for item in built.manifest.files:
            (folder / item.path).write_bytes((built.path / "files" / item.path).read_bytes())
    return folder


def worker_answer(built: Built, folder: Path) -> dict[str, Any]:
    """What a process that can import the package says, by the script that stands alone."""
    words = [sys.executable, str(SCRIPT), *(item.path for item in built.manifest.files)]
    answer = subprocess.run(words, env={"PYTHONPATH": str(folder)}, capture_output=True, check=True, timeout=30)
    told: dict[str, Any] = json.loads(answer.stdout)
    return told


def test_an_engine_that_runs_the_bundle_is_believed(built: Built, tmp_path: Path) -> None:
    answer = worker_answer(built, engine(built, tmp_path / "opt" / "vllm"))
    (tmp_path / "said.json").write_text(json.dumps(answer))
    assert verify(built, tmp_path / "said.json")[0] == 0


def test_a_mount_that_missed_is_found_on_each_file(built: Built, tmp_path: Path) -> None:
    answer = worker_answer(built, engine(built, tmp_path / "opt" / "vllm", mounted=False))
    (tmp_path / "said.json").write_text(json.dumps([answer, answer]))
    code, text = verify(built, tmp_path / "said.json")
    assert code == 1
    assert text.count("the bundle's is") == 2 * len(built.manifest.files)
    assert str(tmp_path / "opt" / "vllm" / CUMEM) in text


def told(built: Built, **changed: object) -> dict[str, Any]:
    """An honest rank's answer, with one file's entry changed."""
    files: list[dict[str, Any]] = [
        {"path": item.path, "file": f"/opt/{item.path}", "sha256": item.sha256, "loaded": item.body_sha256}
        for item in built.manifest.files
    ]
    files[0].update(changed)
    return {"rank": 1, "pid": 7, "files": files}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({}, "is whole"),
        ({"loaded": None}, "the code in memory is not from it"),
        ({"sha256": "0" * 64}, "the bundle's is"),
        ({"file": None}, "no such module"),
        ({"path": "vllm/other.py"}, "not told"),
    ],
)
def test_each_way_to_differ_is_told(built: Built, tmp_path: Path, changed: dict[str, object], says: str) -> None:
    (tmp_path / "said.json").write_text(json.dumps({"results": [told(built), told(built, **changed)]}))
    code, text = verify(built, tmp_path / "said.json")
    assert (code, says in text) == (1 if changed else 0, True)


@pytest.fixture
def answers() -> dict[str, Any]:
    return {"code": 200, "body": {}, "asked": []}


@pytest.fixture
def url(answers: dict[str, Any]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answers["asked"].append((self.path, asked))
            body = json.dumps(answers["body"]).encode()
            self.send_response(answers["code"])
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_an_engine_is_asked_for_the_files_of_the_bundle(built: Built, url: str, answers: dict[str, Any]) -> None:
    answers["body"] = {"results": [told(built)]}
    assert verify(built, url)[0] == 0
    paths = [item.path for item in built.manifest.files]
    assert answers["asked"] == [("/collective_rpc", {"method": "overlay_attest", "args": [paths]})]


def test_workers_that_know_nothing_of_it_have_no_bundle_mounted(
    built: Built, url: str, answers: dict[str, Any]
) -> None:
    answers["code"] = 500
    code, text = verify(built, url)
    assert code == 1
    assert "not mounted" in text


@pytest.mark.parametrize("said", ["", "[]", "7", '{"results": ["no"]}'])
def test_an_answer_that_is_none_is_told(built: Built, tmp_path: Path, said: str) -> None:
    (tmp_path / "said.json").write_text(said)
    assert verify(built, tmp_path / "said.json")[0] == 1
