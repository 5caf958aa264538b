"""The wire shapes between the service, a bundle's manifest, and the workers that were asked."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from overlays import bundle, registry
from overlays.bundle import Built
from overlays.sources import Memory
from rotator.adapters.overlay import OverlayCheck, read_manifest
from rotator.adapters.vllm import VllmControl
from rotator.config import EngineConfig
from rotator.ports import EngineError
from tests.overlay_sleep_files import MIDDLE, stock


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    patches = registry.chosen(registry.all_patches(), ("attest", "failed-rank-guard"), ())
    return bundle.build(Memory(stock(MIDDLE), "0.26.0"), patches, tmp_path_factory.mktemp("bundles"))


class Engine:
    """Two ranks that answer what they are told to."""

    def __init__(self, built: Built) -> None:
        self.status = 200
        self.asked: list[Any] = []
        self.files: list[dict[str, Any]] = [
            {"path": f.path, "file": f"/opt/{f.path}", "sha256": f.sha256, "loaded": f.body_sha256}
            for f in built.manifest.files
        ]

    async def answer(self, request: web.Request) -> web.Response:
        self.asked.append(await request.json())
        if self.status != 200:
            return web.json_response({"error": {"message": "no attribute overlay_attest"}}, status=self.status)
        return web.json_response({"results": [{"rank": rank, "files": self.files} for rank in range(2)]})


@pytest.fixture
def engine(built: Built) -> Engine:
    return Engine(built)


@pytest.fixture
async def url(engine: Engine) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_post("/collective_rpc", engine.answer)
    server = TestServer(app)
    await server.start_server()
    yield str(server.make_url("/")).rstrip("/")
    await server.close()


async def check(url: str, manifest: Path | None) -> str | None:
    control = VllmControl()
    try:
        config = EngineConfig(name="a", gpus=(0,), command=("vllm",), overlay_manifest=manifest)
        return await OverlayCheck(control)(config, url)
    finally:
        await control.close()


async def test_workers_that_run_the_bundle_are_believed(built: Built, engine: Engine, url: str) -> None:
    assert await check(url, built.path / "manifest.json") is None
    paths = [item.path for item in built.manifest.files]
    assert engine.asked == [{"method": "overlay_attest", "args": [paths]}]


async def test_workers_that_run_other_files_are_named(built: Built, engine: Engine, url: str) -> None:
    engine.files[0]["sha256"] = "0" * 64
    wrong = await check(url, built.path / "manifest.json")
    assert wrong is not None
    assert f"rank 1: {engine.files[0]['path']}" in wrong


@pytest.mark.parametrize("status", [500, 404])
async def test_workers_without_the_method_have_no_overlay(built: Built, engine: Engine, url: str, status: int) -> None:
    engine.status = status
    wrong = await check(url, built.path / "manifest.json")
    assert wrong is not None
    assert "not mounted" in wrong


async def test_an_engine_that_does_not_answer_is_no_engine_with_wrong_files(built: Built) -> None:
    with pytest.raises(EngineError):
        await check("http://127.0.0.1:1", built.path / "manifest.json")


async def test_an_engine_without_an_overlay_is_not_asked(engine: Engine, url: str) -> None:
    assert await check(url, None) is None
    assert engine.asked == []


@pytest.mark.parametrize("text", ["", "{}", '{"format": 1, "files": [{}]}', '{"format": 2, "files": []}', "[]"])
async def test_a_manifest_that_is_none_is_told(tmp_path: Path, engine: Engine, url: str, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    wrong = await check(url, tmp_path / "manifest.json")
    assert wrong is not None
    assert str(tmp_path / "manifest.json") in wrong
    assert engine.asked == []


def test_the_service_reads_what_the_tool_writes(built: Built) -> None:
    read = read_manifest(built.path / "manifest.json")
    assert [(f.path, f.sha256, f.mark) for f in read] == [
        (f.path, f.sha256, f.body_sha256) for f in built.manifest.files
    ]
