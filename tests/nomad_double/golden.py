"""What Nomad makes of a job's text, kept by the hash of text and variables: a change of either needs another parse.

`python -m tests.nomad_double.golden` makes those of this project's jobs anew, as ``jobspec`` reads them: look at the
difference before it is committed. Where a Nomad is at hand, ask it: `python -m tests.nomad_double.renew SITE`.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.nomad_double.jobspec import read_job

ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).parent / "golden"
VARIABLES = ROOT / "tests" / "unit" / "jobs" / "golden"


def golden_key(hcl: str, variables: str) -> str:
    return hashlib.sha256(f"{hcl}\0{variables}".encode()).hexdigest()


def load_goldens(folder: Path = FOLDER) -> dict[str, dict[str, Any]]:
    """By key. Each file holds {"key", "of", "job"}."""
    goldens = (json.loads(path.read_text()) for path in sorted(folder.glob("*.json")))
    return {golden["key"]: golden["job"] for golden in goldens}


def project_jobs() -> Iterator[tuple[str, str, str, str]]:
    """(name, file, its text, variables) of every job that this project's templates make in the tests."""
    for path in sorted(VARIABLES.glob("*.vars.hcl")):
        variables = path.read_text()
        file = f"jobs/{_template(variables)}.nomad.hcl"
        yield path.name.removesuffix(".vars.hcl"), file, (ROOT / file).read_text(), variables


def _template(variables: str) -> str:
    names = set(re.findall(r"(?m)^(\w+) =", variables))
    if "worker" in names:
        return "engine-two-node"
    if "nodes" in names:
        return "agent"
    return "rotator" if "config_dir" in names else "engine" if "model_dir" in names else "gpu-lease"


def var_text(variables: Mapping[str, str]) -> str:
    """A variables file of plain texts."""
    return "".join(f"{name} = {json.dumps(variables[name])}\n" for name in sorted(variables))


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, file, hcl, variables in project_jobs():
        golden = {"key": golden_key(hcl, variables), "of": f"{name}, of {file}", "job": read_job(hcl, variables)}
        (FOLDER / f"{name}.json").write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
