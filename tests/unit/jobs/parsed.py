"""What Nomad's own parser makes of the jobs of ``fixed/site.yaml``: kept answers, each with its question's hash.

They were made by Nomad's jobspec2 (main at aa026cc, 2026-08-21), canonicalized, without the one key that 2.0.6 lacks.
After a change of ``jobs/*.hcl`` or of what is rendered, ``python -m tests.unit.jobs.parsed`` asks a Nomad again.
"""

import asyncio
import hashlib
import json
import os
from typing import Any

from rotator.adapters.nomad_access import access_of
from rotator.adapters.nomad_client import NomadClient
from rotator.config_nomad import NomadConfig
from rotator.jobs import Rendered, load_site, render_all
from tests.unit.jobs.sites import ROOT

FIXED = ROOT / "tests" / "unit" / "jobs" / "fixed" / "site.yaml"
FOLDER = FIXED.parent / "parsed"


def key(made: Rendered) -> str:
    return hashlib.sha256(f"{made.hcl}\0{made.variables}".encode()).hexdigest()


def made() -> dict[str, Rendered]:
    return {one.name: one for one in render_all(load_site(FIXED))}


def kept(one: Rendered) -> tuple[str, dict[str, Any]]:
    """The key of what was parsed, and the job."""
    found = json.loads((FOLDER / f"{one.job_id}.json").read_text(encoding="utf-8"))
    return found["key"], found["job"]


def keep(one: Rendered, job: dict[str, Any]) -> None:
    text = json.dumps({"key": key(one), "job": job}, indent=1) + "\n"
    (FOLDER / f"{one.job_id}.json").write_text(text, encoding="utf-8")


async def _renew() -> None:
    async with NomadClient(access_of(NomadConfig(), os.environ)) as client:
        for one in made().values():
            keep(one, await client.parse(one.hcl, one.variables))


if __name__ == "__main__":
    asyncio.run(_renew())
