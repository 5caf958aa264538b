"""How engines take turns, typed. Every policy is off by one line: its value that means none."""

from math import inf

from pydantic import Field

from rotator.config_base import Section
from rotator.core.values import Policy


class PoliciesConfig(Section):
    min_stay_s: float = Field(
        default=2.0, ge=0, description="a busy engine keeps its turn this long after a wake; 0: no minimum"
    )
    longest_wait_s: float | None = Field(
        default=600.0, gt=0, description="no wish waits longer, as far as minimum stays and swaps allow; null: no bound"
    )
    priority_worth_s: float = Field(
        default=30.0, ge=0, description="one step of priority weighs like this much waiting"
    )
    urgency: bool = Field(
        default=True,
        description="wishes go by how many they would serve at once, and their wait; false: by the oldest wait",
    )
    ageing_s: float = Field(default=50.0, gt=0, description="so much waiting weighs like one more request")
    turn_margin: float = Field(
        default=3.0,
        ge=1,
        description="to end a turn, a swap must serve so many times as many requests as it interrupts",
    )
    pair_margin: float | None = Field(
        default=2.0,
        ge=1,
        description="the same between two engines whose GPUs nobody else wants, so that nobody else waits for the "
        "swap; null: no other than turn_margin",
    )
    swap_share: float | None = Field(
        default=0.1,
        gt=0,
        lt=1,
        description="of a GPU's time that swaps may cost which interrupt somebody; null: turns are not priced",
    )
    client_waiters_max: int | None = Field(
        default=8, ge=1, description="requests of one client that count at most for a model's turn; null: all of them"
    )
    preempt: bool = Field(
        default=True,
        description="finishing work in flight is priced against freezing it; false: all may finish for drain_bound_s",
    )
    drain_bound_s: float = Field(
        default=5.0,
        ge=0,
        description="in-flight work may finish this long before it is frozen, where nothing is priced",
    )
    drain_max_s: float = Field(
        default=60.0,
        ge=0,
        description="no priced drain is longer, nor one before a window of the calendar freezes what is in flight",
    )
    stall_max_s: float | None = Field(
        default=900.0,
        gt=0,
        description="a stream stands still this long at most, over all its freezes: then its engine is not frozen "
        "again, and if the engine cannot come back it is cut, with the reason; null: no bound",
    )
    recompute_share: float = Field(
        default=0.02,
        ge=0,
        le=1,
        description="of the time a stream has run, what computing it again takes after a freeze",
    )
    wanted_horizon_s: float = Field(
        default=60.0, gt=0, description="an eviction is priced by the chance of a request within this"
    )
    ladder: bool = Field(
        default=True,
        description="idle engines go down the ladder where others want their memory more; false: only by time",
    )
    idle_sleep_s: float | None = Field(
        default=None, gt=0, description="an engine idle this long goes to sleep; null: never"
    )
    idle_sink_s: float | None = Field(
        default=None,
        gt=0,
        description="masters of an engine asleep this long go to disk, where it has one; null: never",
    )
    idle_stop_s: float | None = Field(
        default=None, gt=0, description="an engine asleep this long is stopped; null: never"
    )
    host_high: float = Field(
        default=0.9,
        gt=0,
        le=1,
        description="share of the host budget that masters may fill before some are dropped, where that can be",
    )
    prewake_chance: float | None = Field(
        default=0.6,
        gt=0,
        le=1,
        description="an engine so likely wanted within prewake_horizon_s is woken into room nobody wants; null: off",
    )
    prewake_horizon_s: float = Field(default=300.0, gt=0, description="how far ahead pre-waking looks")
    elastic: bool = Field(
        default=True, description="engines that can free by bytes free no more than is needed; false: they sleep whole"
    )

    def core(self) -> Policy:
        return Policy(
            min_stay_s=self.min_stay_s,
            priority_worth_s=self.priority_worth_s,
            drain_bound_s=self.drain_bound_s,
            longest_wait_s=self.longest_wait_s,
            urgency=self.urgency,
            ageing_s=self.ageing_s,
            turn_margin=self.turn_margin,
            pair_margin=self.pair_margin,
            swap_share=self.swap_share,
            preempt=self.preempt,
            drain_max_s=self.drain_max_s,
            recompute_share=self.recompute_share,
            ladder=self.ladder,
            idle_sleep_s=self.idle_sleep_s,
            idle_sink_s=self.idle_sink_s,
            idle_stop_s=self.idle_stop_s,
            host_high=self.host_high,
            wanted_horizon_s=self.wanted_horizon_s,
            prewake_chance=self.prewake_chance,
            elastic=self.elastic,
        )

    @property
    def stall_bound_s(self) -> float:
        """How long a stream may stand still over all its freezes."""
        return inf if self.stall_max_s is None else self.stall_max_s
