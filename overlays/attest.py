"""What workers say that they run, against a bundle's manifest.

Asked of an engine in dev mode: POST /collective_rpc {"method": "overlay_attest", "args": [[PATH, ...]]}, answered by
{"results": [an answer of overlays/payload/attest.py a rank]}. A file may hold all of that, its list, or one answer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import requests

from overlays.errors import OverlayError, reason
from overlays.manifest import FileFacts, Manifest

METHOD = "overlay_attest"
TIMEOUT_S = (5.0, 60.0)  # to connect, to answer
ANSWER_MAX_BYTES = 16 * 1024 * 1024


def fetch(where: str, facts: Manifest) -> list[dict[str, Any]]:
    """The ranks' answers, from a file or from an engine's address. Raises OverlayError."""
    text = _ask(where, facts) if where.startswith(("http://", "https://")) else _read(Path(where))
    try:
        answer = json.loads(text)
    except ValueError:
        raise OverlayError(
            f"{where} holds no JSON: name an engine's address, or a file with what its workers answered"
        ) from None
    ranks = answer.get("results", [answer]) if isinstance(answer, dict) else answer
    if not isinstance(ranks, list) or not ranks or not all(isinstance(rank, dict) for rank in ranks):
        raise OverlayError(f"{where} holds no attestation: a list with one object a rank is needed")
    return ranks


def _ask(where: str, facts: Manifest) -> bytes:
    url = where.rstrip("/") + "/collective_rpc"
    body = {"method": METHOD, "args": [[item.path for item in facts.files]]}
    try:
        answer = requests.post(url, json=body, timeout=TIMEOUT_S)
    except requests.RequestException as error:
        raise OverlayError(f"cannot ask {url}: {reason(error)}: is the engine up, and is that its own port?") from None
    if answer.status_code != 200:
        raise OverlayError(
            f"{url} answered {answer.status_code}: the workers know no {METHOD}, so the bundle is not mounted over the "
            "vLLM that they load, or VLLM_SERVER_DEV_MODE=1 is not set"
        )
    return answer.content[:ANSWER_MAX_BYTES]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise OverlayError(f"cannot read {path}: {error.strerror}") from None


def differences(facts: Manifest, ranks: list[dict[str, Any]]) -> list[str]:
    """What is not as the manifest says, a line each; none if every rank runs exactly the bundle."""
    found = []
    for number, rank in enumerate(ranks):
        told = {item.get("path"): item for item in rank.get("files", []) if isinstance(item, dict)}
        wrong = {item.path: _difference(item, told.get(item.path)) for item in facts.files}
        found += [f"rank {rank.get('rank', number)}: {path}: {text}" for path, text in wrong.items() if text]
    return found


def _difference(item: FileFacts, told: dict[str, Any] | None) -> str:
    if told is None:
        return "not told"
    if not told.get("file"):
        return "the engine has no such module"
    if told.get("sha256") != item.sha256:
        return f"{told['file']} is {told.get('sha256')}, the bundle's is {item.sha256}"
    if "loaded" in told and told["loaded"] != item.body_sha256:
        return f"{told['file']} is the bundle's, but the code in memory is not from it: {told['loaded']}"
    return ""
