"""From a launch spec to the job's text, and from a task's log to the engine's log file. Blocking work, off the loop."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rotator.adapters import enginelog
from rotator.adapters.blocking import off_loop
from rotator.adapters.nomad_job import var_file
from rotator.ports import LaunchError, LaunchSpec, RotatorError

READ_S = 10.0
LOG_ROTATE_BYTES = 16 << 20
LOGS_KEPT = 5


@dataclass(frozen=True, slots=True)
class JobText:
    """What Nomad parses: the job's HCL2, and the text of a variables file."""

    hcl: str
    variables: str


Render = Callable[[Path, str], JobText]
"""(site file, engine's name there) -> its job. Blocking. Raises RotatorError."""


async def read_job(spec: LaunchSpec, render: Render) -> JobText:
    """Raises LaunchError with what to do."""
    job = spec.job
    if job is None:
        raise LaunchError(f"engine '{spec.engine}' has no job: give it 'job' in the fleet file")

    def read() -> JobText:
        if job.site:
            return render(Path(job.site), job.name or spec.engine)
        return JobText(Path(job.file).read_text(encoding="utf-8"), var_file(job.variables))

    try:
        return await off_loop(read, deadline_s=READ_S, doing=f"reading the job of engine '{spec.engine}'")
    except (OSError, UnicodeDecodeError) as e:
        raise LaunchError(
            f"engine '{spec.engine}': job file {job.file} cannot be read: {e}: correct 'job.file'"
        ) from None
    except LaunchError:
        raise
    except RotatorError as e:
        raise LaunchError(f"engine '{spec.engine}': no job from {job.site}: {e}") from None


def keep_log(path: Path, text: str, allocs: tuple[str, ...]) -> None:
    """Blocking. Add what was fetched to the engine's log file: Nomad forgets an allocation's logs with it. A disk that
    is full loses the copy, nothing else."""
    try:
        enginelog.rotate(path, above_bytes=LOG_ROTATE_BYTES, keep=LOGS_KEPT)
        with open(enginelog.open_for_launch(path, ("allocation", *allocs)), "a", encoding="utf-8") as file:
            file.write(f"{text}\n")
    except OSError:
        return
