"""Every rule about one engine's job, in the order in which an operator would meet the problems. Pure."""

import re
from collections.abc import Callable, Iterator

from rotator.jobs.findings import Finding
from rotator.jobs.known_broken import Situation, found, match
from rotator.jobs.view import Facts, View, settings

LOOPBACK = ("127.0.0.1", "localhost", "::1")
CLIENT_KILL_TIMEOUT_S = 30.0  # Nomad's own default of max_kill_timeout
_SHELLS = ("sh", "bash", "dash", "zsh", "ash")
_ALLOCATOR_SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_GB10 = "field report of May 2026: DeepSeek V4 Flash on two GB10"
_CRASH = "field report of 2026-05-10: four failed starts left 15 GB on each GPU, and nothing could start any more"

Settings = dict[str, str]
Rule = Callable[[View, Facts, Settings], Iterator[Finding]]


def check(view: View, facts: Facts) -> tuple[Finding, ...]:
    """All findings. A warning whose rule the job gives a reason for is meant, and left out."""
    named = settings(view)
    all_found = [finding for rule in _RULES for finding in rule(view, facts, named)]
    return tuple(f for f in all_found if f.is_error or f.rule not in view.why)


# -- GPUs ------------------------------------------------------------------------------------------------------------


def _devices(view: View, facts: Facts, named: Settings) -> Iterator[Finding]:
    if view.has_device:
        yield Finding(
            "device-block",
            view.place,
            "a device block takes the GPUs for this job alone",
            "remove it, name the GPUs in NVIDIA_VISIBLE_DEVICES, and let the job gpu-lease hold them",
            "Nomad: a device goes to one allocation only",
        )
    visible = view.env.get("NVIDIA_VISIBLE_DEVICES")
    if visible == "all" or (visible is None and view.gpus is None and not view.is_partial):
        shown = "is all" if visible else "is not set, which images take as all"
        fix = "name the UUIDs of this engine's GPUs"
        source = "NVIDIA container runtime: every GPU is opened, also those of other engines"
        yield Finding("gpus-all", view.place, f"NVIDIA_VISIBLE_DEVICES {shown}", fix, source)


def _ranks(view: View, facts: Facts, named: Settings) -> Iterator[Finding]:
    sizes = [named.get(f"--{kind}-parallel-size", "1") for kind in ("tensor", "pipeline", "data")]
    if view.gpus is None or not all(size.isdigit() for size in sizes):
        return
    needed = int(sizes[0]) * int(sizes[1]) * int(sizes[2])
    if view.nodes == 1 and (nodes := _number(named.get("--nnodes"))):
        needed //= nodes  # a task of one node names its own GPUs only
    if needed != len(view.gpus):
        problem = f"TP {sizes[0]} × PP {sizes[1]} × DP {sizes[2]} need {needed} GPUs and {len(view.gpus)} are named"
        fix = "name as many GPUs, or change the sizes"
        yield Finding("gpu-count", view.place, problem, fix, "vLLM: one rank a GPU")


def _share(view: View, facts: Facts, named: Settings) -> Iterator[Finding]:
    share = named.get("--gpu-memory-utilization", "1")
    if share in ("0", "0.0") or (share.replace(".", "", 1).isdigit() and float(share) > 1):
        fix = "give a share of the whole GPU, as 0.9"
        yield Finding("gpu-share", view.place, f"--gpu-memory-utilization {share} is no share", fix, "vLLM refuses it")


# -- sleep -----------------------------------------------------------------------------------------------------------


def _sleep(view: View, facts: Facts, named: Settings) -> Iterator[Finding]:
    if "--enable-sleep-mode" not in named and not view.is_partial:
        fix = "add it, or the engine cannot sleep"
        yield Finding("sleep-mode", view.place, "--enable-sleep-mode is missing", fix, "vLLM's documentation")
    if view.env.get("VLLM_SERVER_DEV_MODE") != "1" and not (view.is_partial and not view.env):
        fix = 'add VLLM_SERVER_DEV_MODE = "1", or /sleep and /wake_up do not exist'
        yield Finding("dev-mode", view.place, "VLLM_SERVER_DEV_MODE is not 1", fix, "vLLM 0.19 to 0.33")
    transfer = named.get("--kv-transfer-config", "")
    if "--kv-offloading-size" in named or "OffloadingConnector" in transfer:
        fix = "remove one: the offload is dead after a wake"
        yield Finding("kv-offload", view.place, "sleep mode together with native KV offload", fix, "vLLM #45268")
    for name in _ALLOCATOR_SETTINGS:
        if "expandable_segments:true" in view.env.get(name, "").replace(" ", "").lower():
            fix = "set it to expandable_segments:False"
            problem = f"{name} turns expandable segments on, which sleep mode cannot use"
            yield Finding("expandable-segments", view.place, problem, fix, "vLLM #40812, PyTorch #147851")


def _level_2(view: View, facts: Facts, named: Settings) -> Iterator[Finding]:
    if 2 not in facts.situation.levels:
        return
    if facts.situation.quantization not in (None, "none"):
        problem = f"sleep level 2 for {facts.situation.quantization} weights loses their scales"
        source = "vLLM #28783, #57163, #45617"
        yield Finding("level-2", view.place, problem, "sleep at level 1", source)
    if facts.is_hybrid:
        problem = "sleep level 2 for a model with recurrent state: its state is not rebuilt"
        source = "vLLM #41602; field report of May 2026: Qwen3-Next released nothing"
        yield Finding("level-2", view.place, problem, "sleep at level 1", source)


def _memory(view: View, facts: Facts, named: Settings) -> Iterator[Finding]:
    masters, memory = facts.masters_mib, view.memory_mib
    if masters is not None and memory is not None and memory < masters + 4096 and 1 in facts.situation.levels:
        problem = (
            f"memory of {memory} MiB is below the {masters} MiB that the masters take asleep, and 4 GiB to live on"
        )
        fix = f"give at least {masters + 4096} MiB"
        yield Finding("memory-masters", view.place, problem, fix, "vLLM #16663, #56410: masters are locked host RAM")
    if memory is not None and facts.host_memory_mib is not None and memory > facts.host_memory_mib:
        problem = f"memory of {memory} MiB is more than the node's {facts.host_memory_mib} MiB"
        yield Finding("memory-node", view.place, problem, "give less: Nomad can place it nowhere", "Nomad's scheduler")
    if facts.unified_memory and 1 in facts.situation.levels:
        problem = "on unified memory a sleep at level 1 moves weights within the same RAM, and a wake can kill the host"
        fix = "let it be stopped instead, and say so under 'why'"
        source = "vLLM #50011, #57629"
        yield Finding("unified-memory", view.place, problem, fix, source, is_error=False)
    if view.memlock is None and not view.is_partial:
        fix = 'add ulimit { memlock = "-1" }'
        source = "vLLM's sleep mode pins its masters"
        yield Finding("memlock", view.place, "locked memory is bounded", fix, source, is_error=False)


# -- models ----------------------------------------------------------------------------------------------------------


def _deepseek(view: View, facts: Facts, named: Settings) -> Iterator[Finding]:
    if not _is_dsv4(view, facts):
        return
    if not named.get("--kv-cache-dtype", "").startswith("fp8") and not (view.is_partial and not _has(named, "kv")):
        problem = "DeepSeek V4 without an fp8 KV cache fails when the model is built"
        yield Finding(
            "dsv4-kv-fp8", view.place, problem, "add --kv-cache-dtype fp8", "vLLM #41834: asserted by its attention"
        )
    if "--enforce-eager" in named and "--enforce-eager" not in view.why:
        problem = "--enforce-eager on DeepSeek V4, and nobody says why"
        fix = "remove it, or say why under 'why' of the recipe or the site"
        yield Finding("dsv4-eager", view.place, problem, fix, f"{_GB10}: 44 tok/s fell to 25")


def _has(named: Settings, part: str) -> bool:
    return any(part in name for name in named if name.startswith("--"))


def _is_dsv4(view: View, facts: Facts) -> bool:
    if facts.situation.family is not None:
        return facts.situation.family == "deepseek-v4"
    return bool(re.search(r"deepseek[-_ ]?v4|\bdsv?4\b", " ".join(view.words), re.IGNORECASE))


def _multimodal(view: View, facts: Facts, named: Settings) -> Iterator[Finding]:
    if named.get("--api-server-count", "1") in ("1", "") or facts.is_multimodal is False:
        return
    fix = "give --api-server-count 1: several lose track of the multimodal cache across a sleep"
    is_error = facts.is_multimodal is True
    yield Finding("api-servers", view.place, "more than one API server", fix, "vLLM #42995", is_error)


def _broken(view: View, facts: Facts, named: Settings) -> Iterator[Finding]:
    known = facts.situation
    sizes = [_number(named.get(f"--{kind}-parallel-size")) for kind in ("tensor", "pipeline")]
    ranks = known.ranks if known.ranks is not None else (sizes[0] or 1) * (sizes[1] or 1)
    asked = Situation(
        known.vllm or _version_of(view.image),
        known.arch,
        known.family,
        known.quantization,
        ranks,
        known.pipeline if known.pipeline is not None else _number(named.get("--pipeline-parallel-size")),
        known.levels,
        known.allocator,
        known.overlay,
        named,
    )
    for entry in match(asked):
        yield found(entry, view.place)


def _version_of(image: str | None) -> str | None:
    """The release that a tag tells of, as ``vllm/vllm-openai:v0.20.2-cu129`` does."""
    told = re.search(r"vllm[^:@]*:v?(\d+\.\d+(?:\.\d+)?)(?![\d.])", image or "")
    return told[1] if told else None


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() else None


# -- the process -----------------------------------------------------------------------------------------------------


def _process(view: View, facts: Facts, named: Settings) -> Iterator[Finding]:
    if view.env.get("VLLM_WORKER_MULTIPROC_METHOD") == "fork":
        problem = "VLLM_WORKER_MULTIPROC_METHOD is fork: workers crash with 'ShmRingBuffer' has no 'shared_memory'"
        yield Finding("fork", view.place, problem, "remove it: vllm serve chooses spawn itself", _GB10)
    if _is_shell(view.words) and re.search(r"[{\[]\s*\\?['\"]", " ".join(view.words[1:])):
        problem = "JSON passes through a shell, which takes its quotes: vLLM then falls back without a word"
        fix = "run vllm itself, with every argument a list element"
        yield Finding("json-shell", view.place, problem, fix, f"{_GB10}, failure 6")
    host = named.get("--host")
    if host in LOOPBACK or "--headless" in named or (host is None and view.is_partial):
        return
    shown = f"--host {host} is not loopback" if host else "--host is missing, so it listens on every interface"
    fix = "give --host 127.0.0.1: /collective_rpc runs code for whoever reaches it"
    yield Finding("loopback", view.place, shown, fix, "vLLM's development endpoints")


def _is_shell(words: tuple[str, ...]) -> bool:
    return bool(words) and words[0].rsplit("/", 1)[-1] in _SHELLS


def _image(view: View, facts: Facts, named: Settings) -> Iterator[Finding]:
    if view.image is not None and not re.search(r"@sha256:[0-9a-f]{64}$", view.image):
        fix = "name it by digest: repository@sha256:…"
        source = f"{_GB10}: a build was taken for another by its tag"
        yield Finding("image-digest", view.place, f"image {view.image} is named by a tag, which can move", fix, source)
    if view.is_readonly and "/root/.cache" not in " ".join(view.writable) and not view.is_partial:
        fix = "mount a directory of the host there: compiled kernels then stay over restarts, too"
        source = "field report of May 2026: FlashInfer compiles there on a read-only root"
        yield Finding("writable-cache", view.place, "/root/.cache cannot be written", fix, source, is_error=False)


# -- the job ---------------------------------------------------------------------------------------------------------


def _ends(view: View, facts: Facts, named: Settings) -> Iterator[Finding]:
    bound = facts.max_kill_timeout_s if facts.max_kill_timeout_s is not None else CLIENT_KILL_TIMEOUT_S
    if view.kill_timeout_s is not None and view.kill_timeout_s > bound:
        problem = f"kill_timeout of {view.kill_timeout_s:g} s is above the client's max_kill_timeout of {bound:g} s"
        fix = "raise max_kill_timeout on the client, or give less: the client cuts it short without a word"
        is_error = facts.max_kill_timeout_s is not None
        yield Finding("kill-timeout", view.place, problem, fix, "Nomad: max_kill_timeout is 30 s by default", is_error)
    if view.logs_mb is not None and view.disk_mb is not None and view.logs_mb >= view.disk_mb:
        problem = f"log files of up to {view.logs_mb} MB do not fit the ephemeral disk of {view.disk_mb} MB"
        fix = "raise ephemeral_disk, or keep fewer or smaller files"
        yield Finding("logs-disk", view.place, problem, fix, "Nomad: the disk is 300 MB by default")


def _restarts(view: View, facts: Facts, named: Settings) -> Iterator[Finding]:
    if view.is_ours:
        return
    restart, again = view.restart or {}, view.reschedule or {}
    if restart.get("attempts") != 0 or restart.get("mode", "fail") != "fail":
        fix = 'give restart { attempts = 0  mode = "fail" }: the service starts it again'
        yield Finding("crash-loop", view.place, "Nomad would restart it after a crash", fix, _CRASH)
    if again.get("attempts") != 0 or again.get("unlimited") is not False:
        fix = "give reschedule { attempts = 0  unlimited = false }"
        yield Finding("crash-loop", view.place, "Nomad would place it anew after a crash", fix, _CRASH)
    if (view.update or {}).get("auto_revert"):
        fix = "give auto_revert = false"
        problem = "Nomad would start an old version behind the service's back"
        yield Finding("auto-revert", view.place, problem, fix, "Nomad: auto_revert registers the last stable version")
    if (view.update or {}).get("canary"):
        fix = "give canary = 0"
        yield Finding(
            "canary", view.place, "a canary would start a second engine on the same GPUs", fix, "Nomad: update"
        )
    if view.count not in (None, 1):
        problem = f"count is {view.count}: all would take the same GPUs and the same port"
        yield Finding("count", view.place, problem, "give count = 1", "Nomad: count copies of a group")


def _watches(view: View, facts: Facts, named: Settings) -> Iterator[Finding]:
    if view.has_check_restart:
        fix = "remove it: the service judges engines by what they answer"
        problem = "check_restart would shoot a sleeping or compiling engine"
        yield Finding("check-restart", view.place, problem, fix, "vLLM: /health may hang while it compiles (#49237)")
    if any(mode not in ("noop", "") for mode in view.change_modes):
        fix = 'give change_mode = "noop"'
        problem = "a changed template would restart or signal the engine"
        yield Finding("template-mode", view.place, problem, fix, "Nomad: change_mode is restart by default")


_RULES: tuple[Rule, ...] = (
    *(_devices, _ranks, _share, _sleep, _level_2, _memory),
    *(_deepseek, _multimodal, _broken),
    *(_process, _image, _ends, _restarts, _watches),
)
