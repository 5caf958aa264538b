"""What Nomad makes of a job's text, kept by the hash of text and variables: a change of either needs another parse."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "golden"


def golden_key(hcl: str, variables: str) -> str:
    return hashlib.sha256(f"{hcl}\0{variables}".encode()).hexdigest()


def load_goldens(folder: Path = FOLDER) -> dict[str, dict[str, Any]]:
    """By key. Each file is named for its key's first 16 digits and holds {"key", "of", "job"}."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        golden = json.loads(path.read_text())
        assert path.stem == golden["key"][:16], f"{path.name} is not named for its key"
        found[golden["key"]] = golden["job"]
    return found


def var_text(variables: Mapping[str, str]) -> str:
    """A variables file of plain texts."""
    return "".join(f"{name} = {json.dumps(variables[name])}\n" for name in sorted(variables))
