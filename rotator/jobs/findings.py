"""What a lint finds, and the error that recipes, sites and renders raise."""

from dataclasses import dataclass


class JobsError(Exception):
    """A recipe, a site or a job cannot be used. ``problems`` are one line each: where, what, the fix."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclass(frozen=True, slots=True)
class Finding:
    """``source`` says where it is known from. An error breaks something; a warning may be meant."""

    rule: str
    place: str
    problem: str
    fix: str
    source: str
    is_error: bool = True

    @property
    def line(self) -> str:
        return f"{self.place}: {self.problem}: {self.fix} [{self.rule}; known from: {self.source}]"
