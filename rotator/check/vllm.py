"""What is wrong with a vLLM command line for an engine that shall take turns. Reads words; runs nothing."""

from collections.abc import Iterator, Mapping

from rotator.check.findings import Finding, error, warning
from rotator.config import EngineConfig

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_ALLOCATOR_SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def is_vllm(command: tuple[str, ...]) -> bool:
    """Whether the words start vLLM's own server, by its program or one of its modules."""
    return any(w == "vllm" or w.endswith("/vllm") or w.startswith("vllm.entrypoints") for w in command)


def flag(command: tuple[str, ...], *names: str) -> str | None:
    """A flag's value, "" for one without; the last one wins, as in vLLM. None where it is absent."""
    found = None
    for i, word in enumerate(command):
        name, has_value, value = word.partition("=")
        if name.replace("_", "-") not in names:
            continue
        following = command[i + 1] if i + 1 < len(command) else ""
        found = value if has_value else "" if following.startswith("--") else following
    return found


def memory_share(command: tuple[str, ...]) -> float:
    """The share of each GPU that the engine will take; vLLM's own default where the command names none."""
    try:
        return float(flag(command, "--gpu-memory-utilization") or 0.92)
    except ValueError:
        return 0.92


def check_command(engine: EngineConfig, inherited: Mapping[str, str]) -> Iterator[Finding]:
    """Findings about one engine whose launcher starts vLLM; ``inherited`` is what its environment begins with."""
    command, env = engine.command, {**inherited, **engine.env}
    place = f"engine '{engine.name}'"
    if flag(command, "--enable-sleep-mode") is None:
        yield error(f"{place}.command", "--enable-sleep-mode is missing", "add it, or the engine cannot sleep")
    if env.get("VLLM_SERVER_DEV_MODE") != "1":
        fix = 'add VLLM_SERVER_DEV_MODE: "1", or /sleep and /wake_up do not exist'
        yield error(f"{place}.env", "VLLM_SERVER_DEV_MODE is not 1", fix)
    yield from _addresses(engine, place)
    yield from _ranks(engine, place)
    yield from _names(engine, place)
    yield from _pairs_that_break(command, env, place)


def _addresses(engine: EngineConfig, place: str) -> Iterator[Finding]:
    host, port = flag(engine.command, "--host"), flag(engine.command, "--port")
    if host not in _LOOPBACK:
        shown = f"--host {host} is not loopback" if host else "--host is missing, so it listens on every interface"
        fix = "its development endpoints run code for whoever reaches them: give --host 127.0.0.1"
        yield error(f"{place}.command", shown, fix)
    if port is None:
        yield error(f"{place}.command", "--port is missing", "give --port {port}: the service fills it in")
    elif port != "{port}" and port != str(engine.port):
        fix = "give --port {port}, or the same number as 'port'"
        yield error(f"{place}.command", f"--port {port} is not where the service looks for it", fix)


def _ranks(engine: EngineConfig, place: str) -> Iterator[Finding]:
    try:
        tp = int(flag(engine.command, "--tensor-parallel-size", "-tp") or 1)
        pp = int(flag(engine.command, "--pipeline-parallel-size", "-pp") or 1)
        dp = int(flag(engine.command, "--data-parallel-size", "-dp") or 1)
    except ValueError:
        yield error(f"{place}.command", "a parallel size is no number", "give --tensor-parallel-size a whole number")
        return
    if tp * pp * dp != len(engine.gpus):
        problem = f"TP {tp} × PP {pp} × DP {dp} need {tp * pp * dp} GPUs and 'gpus' names {len(engine.gpus)}"
        yield error(f"{place}.gpus", problem, "name as many GPUs, or change the sizes")
    if engine.tp is not None and engine.tp != tp:
        yield error(f"{place}.tp", f"is {engine.tp} and the command says {tp}", "make them equal, or leave 'tp' out")
    if pp > 1:
        fix = "rehearse many swaps before you rely on it, or use tensor parallelism alone"
        yield warning(f"{place}.command", "pipeline parallel engines were seen to break after a few sleeps", fix)


def _names(engine: EngineConfig, place: str) -> Iterator[Finding]:
    words = engine.command
    named = [i for i, w in enumerate(words) if w.partition("=")[0].replace("_", "-") == "--served-model-name"]
    if named:
        at = named[-1]
        value = words[at].partition("=")[2]
        rest = words[at + 1 :]
        ends = next((i for i, w in enumerate(rest) if w.startswith("-")), len(rest))
        served: tuple[str, ...] = (value,) if value else rest[:ends]
    else:
        served = tuple(w for w in (model_argument(words),) if w)
    served = tuple(w.replace("{name}", engine.name) for w in served)
    if served and engine.model not in served:
        fix = "add --served-model-name {name}, or say in 'served_model' what it serves"
        yield error(f"{place}.command", f"it serves {' and '.join(served)}, not {engine.model}", fix)


def model_argument(command: tuple[str, ...]) -> str | None:
    """The model that the command names, by --model or as the word after ``serve``."""
    if given := flag(command, "--model"):
        return given
    after = command[command.index("serve") + 1 :] if "serve" in command else ()
    return after[0] if after and not after[0].startswith("-") else None


def _pairs_that_break(command: tuple[str, ...], env: Mapping[str, str], place: str) -> Iterator[Finding]:
    offload = flag(command, "--kv-offloading-size")
    if offload is not None or "OffloadingConnector" in (flag(command, "--kv-transfer-config") or ""):
        fix = "remove one: the offload is dead after a wake"
        yield error(f"{place}.command", "native KV offloading together with sleep", fix)
    for name in _ALLOCATOR_SETTINGS:
        if "expandable_segments:true" in env.get(name, "").replace(" ", "").lower():
            fix = "set it to expandable_segments:False for this engine"
            yield error(f"{place}.env", f"{name} turns expandable segments on, which sleep mode cannot use", fix)
    if (flag(command, "--api-server-count") or "1") not in ("1", ""):
        fix = "give --api-server-count 1: several lose track of the multimodal cache across a sleep"
        yield warning(f"{place}.command", "more than one API server", fix)
    if flag(command, "--enable-lora") is not None:
        fix = "compare each adapter's answers before and after a sleep"
        yield warning(f"{place}.command", "LoRA adapters were seen to be lost by a sleep", fix)
    if "CUDA_VISIBLE_DEVICES" in env and env["CUDA_VISIBLE_DEVICES"] != "{gpus}":
        fix = "remove it: the service sets it from 'gpus'"
        yield warning(f"{place}.env", "CUDA_VISIBLE_DEVICES is set by hand", fix)
