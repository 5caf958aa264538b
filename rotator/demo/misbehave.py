"""How the stub can be told to fail, at its start or while it runs. Each way was seen in the field."""

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Misbehaviour(BaseModel):
    """All off by default. With ``once``, a way of failing is switched off as it happens."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    once: bool = False
    lie_sleep: bool = False  # /sleep says 200 and frees nothing
    fail_sleep_rank: int | None = None  # this rank fails to sleep, the others slept: 500
    fail_wake_rank: int | None = None  # this rank fails to wake, the others woke: 500
    wake_garbage: Literal["", "zero", "corrupt"] = ""  # the weights are not what they were
    hang_sleep: bool = False
    hang_wake: bool = False
    hang_generate: bool = False
    wedged: bool = False  # /health says 200, everything that reaches the engine core hangs
    slow_sleep_s: float = 0.0
    slow_wake_s: float = 0.0
    die_at: Literal["", "start", "load", "sleep", "wake", "stream"] = ""
    exit_code: int = 1
    die_after_tokens: int = 3  # for die_at=stream
    cut_stream_after: int | None = None  # tokens after which a stream's connection breaks
    nan_logprobs: bool = False
    residue_growth_gib: float = 0.0  # a GPU, with each sleep
    draft_acceptance: float | None = None  # tell of speculative decoding, with this share of first drafts accepted
    start_delay_s: float = 0.0
    forget_at: int | None = None  # asked for so many needles at once, it finds none of them

    def take(self, name: str) -> bool:
        """Whether this way of failing is on; with ``once`` it is off from now on."""
        value = getattr(self, name)
        default = type(self).model_fields[name].default
        if value == default:
            return False
        if self.once:
            setattr(self, name, default)
        return True

    def die(self, where: str) -> bool:
        return self.die_at == where and self.take("die_at")
