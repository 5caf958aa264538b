"""Where job specs and recipes lie: beside the package in a checkout, inside it where a wheel is installed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from rotator.config_text import TextProblem, problem_lines, read_mapping
from rotator.jobs.findings import JobsError

_PACKAGE = Path(__file__).resolve().parents[1]
_PLACES = (_PACKAGE / "data" / "jobs", _PACKAGE.parent / "jobs")  # the wheel's place first: see CMakeLists.txt
_MARK = "engine.nomad.hcl"

M = TypeVar("M", bound=BaseModel)


def jobs_folder() -> Path:
    """The folder of job specs. Raises JobsError where the installation lacks it."""
    for place in _PLACES:
        if (place / _MARK).is_file():
            return place
    raise JobsError(f"jobs: no {_MARK} in {' or '.join(map(str, _PLACES))}: install the package again")


def template_text(name: str) -> str:
    """The text of one job spec, by its name without suffix."""
    return read_text(jobs_folder() / f"{name}.nomad.hcl")


def read_text(path: Path) -> str:
    """Raises JobsError with what to do."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as e:
        raise JobsError(f"{path}: cannot be read ({e.strerror}): check the path") from None
    except UnicodeDecodeError as e:
        raise JobsError(f"{path}: byte {e.start} is not UTF-8: save the file as UTF-8 text") from None


def parse_as(model: type[M], text: str, where: str) -> M:
    """YAML text as a model. Raises JobsError with one line a problem, each beginning with ``where``."""
    data: Mapping[str, Any] = {}
    try:
        data = read_mapping(text)
        return model.model_validate(data)
    except TextProblem as e:
        raise JobsError(f"{where}: {e}") from None
    except ValidationError as e:
        raise JobsError(*(f"{where}: {line}" for line in problem_lines(e, dict(data), model))) from None
