"""What the service watches for, what it keeps as evidence, and whom it tells, typed."""

from typing import Literal

from pydantic import Field, HttpUrl

from rotator.config_base import Section
from rotator.core.watchdog import Bounds, ResidueBounds

_GIB = 1 << 30


class EvidenceConfig(Section):
    """One folder an incident, under ``state_dir/incidents``."""

    deadline_s: float = Field(
        default=30.0, gt=0, description="an engine is killed this much later at most, for its evidence's sake"
    )
    stack_deadline_s: float = Field(default=8.0, gt=0, description="for one process's stacks")
    bundle_max_mib: float = Field(default=64.0, gt=0, description="what one bundle may hold; more is left out, by name")
    log_lines: int = Field(default=500, ge=1, description="of the engine's log")
    kept: int = Field(default=50, ge=1, description="bundles; the oldest go first")
    kept_days: float = Field(default=30.0, gt=0)
    kept_max_mib: float = Field(default=1024.0, gt=0, description="all bundles together")
    nccl_trace: bool = Field(
        default=True,
        description="engines are launched with torch's NCCL flight recorder on, to be dumped at an incident",
    )


class WatchdogConfig(Section):
    enabled: bool = True
    every_s: float = Field(default=5.0, gt=0, description="how often awake engines are looked at, by their metrics")
    stall_s: float = Field(
        default=120.0,
        gt=0,
        description="an engine with requests whose counters stand still this long is wedged, if a probe fails too; "
        "half of it leads to the probe",
    )
    stall_young_s: float = Field(
        default=300.0, gt=0, description="the same for an engine launched lately: it still compiles"
    )
    young_s: float = Field(default=600.0, ge=0, description="so long after its launch an engine is young")
    stall_warned_s: float = Field(
        default=60.0, gt=0, description="the same where its workers warn of a broadcast that nobody takes"
    )
    probe_every_s: float | None = Field(
        default=300.0, gt=0, description="an engine not heard of this long is probed, idle or not; null: never"
    )
    probe_deadline_s: float = Field(default=30.0, gt=0, description="for a probe's answer of a few tokens")
    window_s: float = Field(default=30.0, gt=0, description="throughput and acceptance are taken over this")
    windows: int = Field(default=6, ge=1, description="so many bad windows in a row are an incident")
    baseline_windows: int = Field(
        default=10, ge=1, description="so many windows of its own tell an engine's usual throughput"
    )
    throughput_share_min: float | None = Field(
        default=0.2, gt=0, lt=1, description="of its usual throughput at the same load; less is slow; null: not judged"
    )
    acceptance_min: float | None = Field(
        default=0.02, gt=0, lt=1, description="share of first draft tokens accepted; less is lost; null: not judged"
    )
    drafts_min: int = Field(default=200, ge=1, description="drafts a window, for acceptance to be judged")
    restart_slow: bool = Field(
        default=False, description="a slow engine, too, is restarted at a quiet moment; false: it is only reported"
    )
    residue_growth_gib: float | None = Field(
        default=4.0, gt=0, description="growth of what stays asleep, a GPU, that leads to a restart; null: never"
    )
    residue_cycles_min: int = Field(default=2, ge=1, description="cycles over which it must have grown")
    quiet_s: float = Field(
        default=60.0, ge=0, description="a planned restart waits until nobody has used its GPUs for so long"
    )
    gpus: bool = Field(default=True, description="Xid, ECC and lost GPUs are watched, and cordoned where they must be")
    evidence: EvidenceConfig = EvidenceConfig()

    def bounds(self) -> Bounds:
        return Bounds(
            stall_s=self.stall_s,
            stall_young_s=max(self.stall_s, self.stall_young_s),
            young_s=self.young_s,
            stall_warned_s=min(self.stall_s, self.stall_warned_s),
            probe_every_s=self.probe_every_s,
            window_s=self.window_s,
            windows=self.windows,
            baseline_windows=self.baseline_windows,
            throughput_share_min=self.throughput_share_min,
            acceptance_min=self.acceptance_min,
            drafts_min=self.drafts_min,
        )

    def residue(self) -> ResidueBounds | None:
        if self.residue_growth_gib is None:
            return None
        return ResidueBounds(int(self.residue_growth_gib * _GIB), self.residue_cycles_min)


class WebhookConfig(Section):
    """Who is told of incidents, by POST of JSON."""

    url: HttpUrl
    secret_env: str | None = Field(
        default=None, description="environment variable with the secret that signs the body (HMAC-SHA256)"
    )
    events: tuple[Literal["incident.opened", "incident.closed"], ...] = Field(
        default=("incident.opened", "incident.closed"), min_length=1
    )
    deadline_s: float = Field(default=10.0, gt=0, description="for one attempt")
    attempts_max: int = Field(default=6, ge=1, description="with pauses of 1, 2, 4, ... s, 60 at most")
