"""Single files of a wheel, from an index over HTTP."""

import hashlib
import io
import re
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from overlays import bundle, matrix, registry
from overlays.build import Result
from overlays.errors import SourceError
from overlays.index import Index, pip_index
from overlays.sources import open_wheel
from tests.overlay_sleep_files import CUMEM, MIDDLE, OLD, stock

PATCHES = registry.chosen(
    registry.all_patches(),
    ("attest", "driver-state", "failed-rank-guard", "stream-aware-free", "transactional-wake"),
    (),
)
LARGE = 4 * 1024 * 1024  # bytes of a library beside the sources, which nobody may fetch


def wheel(version: str, shape: dict[str, str]) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, text in stock(shape).items():
            archive.writestr(path, text)
        archive.writestr(zipfile.ZipInfo("vllm/_C.abi3.so"), bytes(LARGE))
        archive.writestr(f"vllm-{version}.dist-info/METADATA", f"Name: vllm\nVersion: {version}\n")
    return made.getvalue()


class Shelf:
    """An index with a few wheels, as HTML or JSON, and the bytes that were asked of it."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.ranges = True
        self.sent_bytes = 0
        self.asked: list[str] = []

    def put(self, version: str, shape: dict[str, str], build: str = "", arch: str = "x86_64") -> None:
        self.files[f"vllm-{version}{build}-cp38-abi3-manylinux_2_31_{arch}.whl"] = wheel(version, shape)

    def page(self) -> bytes:
        links = (
            f'<a href="../../files/{name}#sha256={hashlib.sha256(data).hexdigest()}">{name}</a>'
            for name, data in self.files.items()
        )
        return f"<!DOCTYPE html><html><body>{''.join(links)}</body></html>".encode()


def handler(shelf: Shelf) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            shelf.asked.append(self.path)
            if self.path == "/simple/vllm/":
                self.answer(200, shelf.page(), {"Content-Type": "text/html"})
                return
            data = shelf.files.get(self.path.rpartition("/")[2])
            if data is None:
                self.answer(404, b"none", {})
                return
            wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
            if wanted is None or not shelf.ranges:
                self.answer(200, data, {})
                return
            start = int(wanted[1]) if wanted[1] else max(0, len(data) - int(wanted[2]))
            end = int(wanted[2]) if wanted[1] and wanted[2] else len(data) - 1
            part = data[start : end + 1]
            shelf.sent_bytes += len(part)
            self.answer(206, part, {"Content-Range": f"bytes {start}-{start + len(part) - 1}/{len(data)}"})

        def answer(self, code: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(code)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


class Quiet(ThreadingHTTPServer):
    """Who hangs up in the middle of an answer is nobody's concern."""

    def handle_error(self, request: object, client_address: object) -> None:
        pass


@pytest.fixture
def shelf() -> Shelf:
    made = Shelf()
    made.put("0.19.1", OLD)
    made.put("0.26.0", MIDDLE)
    return made


@pytest.fixture
def url(shelf: Shelf) -> Iterator[str]:
    server = Quiet(("127.0.0.1", 0), handler(shelf))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/simple"
    server.shutdown()
    server.server_close()
    thread.join()


def test_only_the_files_that_are_needed_cross_the_wire(shelf: Shelf, url: str, tmp_path: Path) -> None:
    with Index(url, tmp_path) as index:
        opened = index.open("0.26.0")
        assert opened.read(CUMEM) == stock(MIDDLE)[CUMEM].encode()
        assert opened.read("vllm/none.py") is None
        assert opened.version == "0.26.0"
        opened.close()
    assert 0 < shelf.sent_bytes < LARGE / 20


def test_what_was_fetched_once_is_kept(shelf: Shelf, url: str, tmp_path: Path) -> None:
    for _ in range(2):
        with Index(url, tmp_path) as index:
            bundle.compose(index.open("0.26.0"), PATCHES)
        fetched, shelf.sent_bytes = shelf.sent_bytes, 0
    assert fetched == 0


def test_a_kept_file_that_was_damaged_is_fetched_again(shelf: Shelf, url: str, tmp_path: Path) -> None:
    with Index(url, tmp_path) as index:
        index.open("0.26.0").read(CUMEM)
        kept = next(tmp_path.rglob("cumem.py"))
        kept.write_text("print()")
        assert index.open("0.26.0").read(CUMEM) == stock(MIDDLE)[CUMEM].encode()


@pytest.mark.parametrize("cache", ["/proc/overlays-cache", "/etc/hostname"])
def test_a_cache_that_cannot_be_written_is_done_without(url: str, cache: str) -> None:
    with Index(url, Path(cache)) as index:
        assert index.open("0.26.0").read(CUMEM) == stock(MIDDLE)[CUMEM].encode()


def test_releases_are_listed_in_order_without_previews_and_other_machines(
    shelf: Shelf, url: str, tmp_path: Path
) -> None:
    shelf.put("0.27.0rc1", MIDDLE)
    shelf.put("0.28.0", MIDDLE, arch="aarch64")
    shelf.put("0.20.0", OLD)
    with Index(url, tmp_path) as index:
        assert [str(version) for version in index.releases("0.19.1", "0.33.0")] == ["0.19.1", "0.20.0", "0.26.0"]
    with Index(url, tmp_path, "aarch64") as index:
        assert [str(version) for version in index.releases("0.19.1", "0.33.0")] == ["0.28.0"]


def test_of_rebuilt_wheels_the_one_that_pip_takes_is_read(shelf: Shelf, url: str, tmp_path: Path) -> None:
    shelf.put("0.26.0", OLD, build="-1")
    with Index(url, tmp_path) as index:
        assert index.open("0.26.0").read(CUMEM) == stock(OLD)[CUMEM].encode()


def test_a_server_without_ranges_is_told(shelf: Shelf, url: str, tmp_path: Path) -> None:
    shelf.ranges = False
    with Index(url, tmp_path) as index, pytest.raises(SourceError, match="--wheel"):
        index.open("0.26.0")


def test_a_release_that_is_not_there_is_told_with_those_that_are(url: str, tmp_path: Path) -> None:
    with Index(url, tmp_path) as index, pytest.raises(SourceError, match=r"0\.19\.1, 0\.26\.0"):
        index.open("0.21.0")


@pytest.mark.parametrize("path", ["/simple", "/none"])
def test_an_index_that_says_no_is_told_without_its_password(url: str, tmp_path: Path, path: str) -> None:
    url = url.replace("http://", "http://somebody:secret@").replace("/simple", path)
    with Index(url, tmp_path) as index, pytest.raises(SourceError) as raised:
        index.open("0.21.0")
    assert path in str(raised.value)
    assert "secret" not in str(raised.value)


def test_an_index_that_does_not_answer_is_told_without_its_password(tmp_path: Path) -> None:
    with (
        Index("http://somebody:secret@127.0.0.1:1/simple", tmp_path) as index,
        pytest.raises(SourceError, match="cannot list vLLM") as raised,
    ):
        index.open("0.26.0")
    assert "secret" not in str(raised.value)


def test_a_wheel_on_disk_gives_the_bundle_that_the_index_gives(shelf: Shelf, url: str, tmp_path: Path) -> None:
    name, data = next((name, data) for name, data in shelf.files.items() if "0.26.0" in name)
    (tmp_path / name).write_bytes(data)
    local, _ = bundle.compose(open_wheel(tmp_path / name), PATCHES)
    with Index(url, tmp_path / "cache") as index:
        remote, _ = bundle.compose(index.open("0.26.0"), PATCHES)
    assert local.bundle == remote.bundle


def test_the_matrix_has_each_release_and_says_what_its_probes_saw(url: str, tmp_path: Path) -> None:
    told: list[str] = []
    with Index(url, tmp_path) as index:
        columns = matrix.run(index, PATCHES, ["0.19.1", "0.26.0"], told.append)
    assert told == ["0.19.1", "0.26.0"]
    assert matrix.failures(columns) == []
    free = [outcome.result for column in columns for outcome in column.outcomes if outcome.patch == "stream-aware-free"]
    assert free == [Result.APPLIED, Result.UPSTREAM]


def test_the_index_is_the_one_that_pip_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://index.example/simple")
    assert pip_index() == "http://index.example/simple"
