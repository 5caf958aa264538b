"""The example's site, and changes of it."""

from pathlib import Path
from typing import Any

from rotator.config_text import read_mapping
from rotator.jobs import Site
from rotator.jobs.files import jobs_folder

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "examples" / "site.yaml"
SPECS = sorted(jobs_folder().glob("*.nomad.hcl"))


def site_data() -> dict[str, Any]:
    return read_mapping(EXAMPLE.read_text(encoding="utf-8"))


def changed(engine: str, **changes: Any) -> Site:
    """The example with keys of one engine changed; None takes one away."""
    data = site_data()
    config = {**data["engines"][engine], **changes}
    data["engines"][engine] = {k: v for k, v in config.items() if v is not None}
    return Site.model_validate(data)
