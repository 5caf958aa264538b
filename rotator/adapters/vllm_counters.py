"""What an engine's /metrics tell of its progress. Names are vLLM's, from 0.19 to 0.33."""

from collections import defaultdict

from prometheus_client.parser import text_string_to_metric_families

from rotator.ports import EngineCounters, EngineUnreachable

# Sample name -> field. The histogram of tokens a step counts its steps, also those of a prefill that is not through.
_FIELDS = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:generation_tokens_total": "generated",
    "vllm:prompt_tokens_total": "prompted",
    "vllm:iteration_tokens_total_count": "steps",
    "vllm:kv_cache_usage_perc": "kv_share",
    "vllm:spec_decode_num_drafts_total": "drafts",
}
_BY_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
_WANTED = (*_FIELDS, _BY_POSITION)
POSITIONS_MAX = 64


def read_counters(text: str, where: str) -> EngineCounters:
    """Only lines that matter are parsed: a page has thousands. Raises EngineUnreachable for what is no such page."""
    lines = [line for line in text.splitlines() if line.startswith(_WANTED)]
    sums: dict[str, float] = defaultdict(float)
    accepted: dict[int, float] = defaultdict(float)
    try:
        for family in text_string_to_metric_families("\n".join(lines) + "\n"):
            for sample in family.samples:
                if sample.name in _FIELDS:
                    sums[_FIELDS[sample.name]] += sample.value
                elif sample.name == _BY_POSITION and int(sample.labels["position"]) < POSITIONS_MAX:
                    accepted[int(sample.labels["position"])] += sample.value
        running, waiting = int(sums.pop("running", 0)), int(sums.pop("waiting", 0))
    except (ValueError, KeyError, IndexError, OverflowError) as e:
        raise EngineUnreachable(f"{where}: its metrics cannot be read ({e}): is it really vLLM?") from None
    by_position = tuple(accepted[i] for i in range(max(accepted, default=-1) + 1))
    return EngineCounters(running=running, waiting=waiting, accepted=by_position, **sums)
