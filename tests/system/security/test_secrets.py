"""A canary secret through every door of a real service, and what of it can be found afterwards: nothing."""

import asyncio
import contextlib
import json
import os
import signal
import stat
from pathlib import Path

import aiohttp

from rotator.service.keys import digest
from tests.system.service.rig import Rig, engine, eventually

CANARY = "rk-canary-5e1f0a77c2-do-not-write-me-down"
LATER = "rk-canary-9b24d1-the-key-after-the-reload"
UNKNOWN = "rk-canary-77aa-never-configured"


def as_bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


def keys(secret: str) -> list[dict[str, object]]:
    return [{"name": "ops", "sha256": digest(secret), "scopes": ["admin"]}]


async def every_door(rig: Rig) -> None:
    """Show known and unknown secrets wherever something may be written down of a request."""
    async with aiohttp.ClientSession() as session:
        for secret in (CANARY, UNKNOWN):
            for headers in (as_bearer(secret), {"x-api-key": secret}, {"authorization": f"Basic {secret}"}):
                for path in ("/engines", "/v1/models", "/nothing", "/ledger?table=engines", "/config/reload"):
                    async with session.get(rig.url + path, headers=headers) as answer:
                        assert secret not in await answer.text()
                body = {"model": "a", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
                async with session.post(f"{rig.url}/v1/chat/completions", json=body, headers=headers) as answer:
                    assert secret not in await answer.text()
            async with session.post(f"{rig.url}/login", data={"key": secret}, allow_redirects=False) as answer:
                assert secret not in f"{await answer.text()}{answer.headers}"
            async with session.get(f"{rig.url}/v1/realtime", headers=as_bearer(secret)) as answer:
                assert secret not in await answer.text()


async def some_of(url: str) -> str:
    """What it says within a second: streams do not end."""
    said = b""
    async with aiohttp.ClientSession() as session, session.get(url, headers=as_bearer(CANARY)) as answer:
        assert answer.status == 200
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1):
                while piece := await answer.content.readany():
                    said += piece
    return said.decode()


def written_with(folder: Path, *secrets: str) -> list[tuple[str, str]]:
    """Every file below that has one of these in it."""
    wanted = [(secret, secret.encode()) for secret in secrets]
    return [
        (str(path.relative_to(folder)), secret)
        for path in folder.rglob("*")
        if path.is_file() and path.stat().st_size < 64 << 20
        for secret, raw in wanted
        if raw in path.read_bytes()
    ]


async def test_no_key_is_written_down_keys_change_by_a_reload_and_engines_ask_for_their_own(tmp_path: Path):
    rig = Rig(tmp_path, [engine("a")], keys=keys(CANARY))
    try:
        rig.spawn()
        await rig.until_ready()
        async with aiohttp.ClientSession() as session:
            body = {"model": "a", "messages": [{"role": "user", "content": "x"}], "max_tokens": 400, "stream": True}
            async with session.post(f"{rig.url}/v1/chat/completions", json=body, headers=as_bearer(CANARY)) as running:
                assert running.status == 200
                await running.content.readuntil(b"\n\n")
                rig.settings["keys"] = keys(LATER)
                rig.write_fleet()
                assert rig.service is not None
                rig.service.send_signal(signal.SIGHUP)

                async def changed() -> bool:
                    return (await rig.call("GET", "/engines", headers=as_bearer(LATER)))[0] == 200

                await eventually(changed, what=lambda: f"the new key; log:\n{rig.log()}")
                assert (await rig.call("GET", "/engines", headers=as_bearer(CANARY)))[0] == 401
                assert (await running.content.read()).rstrip().endswith(b"data: [DONE]")
        rig.settings["keys"] = keys(CANARY)
        rig.write_fleet()
        rig.service.send_signal(signal.SIGHUP)

        async def back() -> bool:
            return (await rig.call("GET", "/engines", headers=as_bearer(CANARY)))[0] == 200

        await eventually(back, what="the first key")
        await every_door(rig)
        kept = tmp_path / "state" / "engine_keys.json"
        engine_key = next(iter(json.loads(kept.read_text()).values()))
        assert stat.S_IMODE(os.stat(kept).st_mode) == 0o600
        (view,) = (await rig.call("GET", "/engines", headers=as_bearer(CANARY)))[1]
        assert (await rig.call("GET", f"{view['url']}/v1/models"))[0] == 401
        assert (await rig.call("GET", f"{view['url']}/v1/models", headers=as_bearer(engine_key)))[0] == 200
        told = ""
        for path in ("/events?after=0", "/metrics", "/engines", "/incidents", "/ledger?table=transitions", "/info"):
            told += await some_of(rig.url + path)
        assert not [secret for secret in (CANARY, LATER, UNKNOWN, engine_key) if secret in told]
        await _survives(rig, engine_key)
        assert await rig.terminate() == 0
        assert written_with(tmp_path, CANARY, LATER, UNKNOWN) == []
        assert written_with(tmp_path, engine_key) == [("state/engine_keys.json", engine_key)]
    finally:
        await rig.close()


async def _survives(rig: Rig, engine_key: str) -> None:
    """The engine goes on with its key when the service is killed and started again."""
    assert rig.service is not None
    pid = next(iter(rig.engine_processes("a")))
    rig.service.kill()
    await rig.ended()
    rig.spawn()
    await rig.until_ready()
    body = {"model": "a", "messages": [{"role": "user", "content": "x"}], "max_tokens": 4}
    status, said = await rig.call("POST", "/v1/chat/completions", json=body, headers=as_bearer(CANARY))
    assert status == 200, said
    assert pid in rig.engine_processes("a")
    assert engine_key in (rig.folder / "state" / "engine_keys.json").read_text()
