"""Every check of ``rotator check``, in the order in which an operator would meet the problems."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from rotator.check.findings import Finding, Surroundings, error, note, warning
from rotator.check.jobs import check_jobs
from rotator.check.nomad import check_nomad
from rotator.check.planned import is_allowed, ledger_url, names_gpu, placed, planned_engines, planned_gpus
from rotator.check.turns import check_bounds, check_calendar
from rotator.check.vllm import check_command, is_vllm, model_argument
from rotator.config import GIB, EngineConfig, FleetConfig
from rotator.config_nodes import split_gpu
from rotator.core.placement import gib, never_fits
from rotator.core.values import Engine, Gpu, GpuId
from rotator.ports import DeviceError, Devices, GpuInfo

_EMPTY_SHA256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


async def check_fleet(fleet: FleetConfig, devices: Devices, around: Surroundings) -> tuple[Finding, ...]:
    """Check a parsed configuration against the machine. Never raises for what it finds."""
    found = [*_service(fleet, around), *_keys(fleet)]
    for engine in fleet.engines:
        found += _engine(engine, fleet, around)
    found += check_nomad(fleet, around)
    found += check_jobs(fleet, around)
    found += _host_memory(fleet, around)
    found += await _gpus(fleet, devices, around)
    return tuple(found)


# -- the service -----------------------------------------------------------------------------------------------------


def _service(fleet: FleetConfig, around: Surroundings) -> Iterator[Finding]:
    bind = fleet.bind
    if bind.port and (holder := around.port_holder(bind.host, bind.port)):
        own = around.service_pid(ledger_url(fleet), bind.port)
        if own is not None:
            hint = "`rotator reload` takes over what is changed in the file"
            yield note("bind.port", f"{bind.port} is held by this fleet's own service (process {own})", hint)
        else:
            yield error("bind.port", f"{bind.port} is held by {holder}", "stop that, or change bind.port")
    if reason := around.unwritable(fleet.state_dir):
        yield error("state_dir", f"{fleet.state_dir} cannot be written ({reason})", "change its owner or state_dir")
    if fleet.ledger.url and (reason := around.ledger_problem(fleet.ledger.url)):
        yield error("ledger.url", f"does not open ({reason})", "start that database, or leave ledger.url out")


def _keys(fleet: FleetConfig) -> Iterator[Finding]:
    for key in fleet.keys:
        if key.sha256 == _EMPTY_SHA256:
            yield error(f"key '{key.name}'", "is the digest of nothing", "make one with `rotator key`")
    if fleet.keys and not any("admin" in key.scopes for key in fleet.keys):
        yield warning("keys", "none has scope admin", "add one, or nobody can reload, cordon or release over REST")


# -- engines ---------------------------------------------------------------------------------------------------------


def _engine(engine: EngineConfig, fleet: FleetConfig, around: Surroundings) -> Iterator[Finding]:
    place = f"engine '{engine.name}'"
    if engine.overlay_manifest is not None and not around.exists(engine.overlay_manifest):
        problem = f"{engine.overlay_manifest} does not exist"
        yield error(
            f"{place}.overlay_manifest", problem, "build the bundle (python -m overlays build), or fix the path"
        )
    if engine.model_path is not None and not around.exists(engine.model_path):
        yield error(f"{place}.model_path", f"{engine.model_path} does not exist", "download the model, or fix the path")
    if engine.fallback and engine.fallback.api_key_env and not around.env.get(engine.fallback.api_key_env):
        name = engine.fallback.api_key_env
        yield error(f"{place}.fallback", f"{name} is not set", "set it in the service's environment")
    if engine.launcher == "process":
        yield from _process(engine, fleet.state_dir, around, place)


def _process(engine: EngineConfig, state_dir: Path, around: Surroundings, place: str) -> Iterator[Finding]:
    program = engine.command[0]
    path = engine.env.get("PATH", around.env.get("PATH"))
    if reason := around.program_problem(program, engine.workdir, path):
        yield error(f"{place}.command", f"{program} cannot be run ({reason})", "install it, or give its full path")
    holder = around.port_holder("127.0.0.1", engine.port) if engine.port else None
    if engine.port and holder and around.engine_on(engine.port, state_dir) != engine.name:
        fix = "fine if that is this engine, from before; else stop it or change 'port'"
        yield warning(f"{place}.port", f"{engine.port} is held by {holder}", fix)
    if not is_vllm(engine.command):
        return
    yield from check_command(engine, around.env)
    model = model_argument(engine.command)
    if model and model.startswith(("/", "./", "../")) and engine.model_path is None:
        where = Path(engine.workdir or ".") / model
        if not around.exists(where):
            yield error(f"{place}.command", f"model {where} does not exist", "download it, or fix the path")


# -- host RAM --------------------------------------------------------------------------------------------------------


def _host_memory(fleet: FleetConfig, around: Surroundings) -> Iterator[Finding]:
    memory = around.host_memory()
    here = [e for e in fleet.engines if not (e.node or any(split_gpu(gpu)[0] for gpu in e.gpus))]
    masters = {e.name: _masters_bytes(e) for e in here if 1 in e.sleep_levels}
    budget = int(fleet.host_memory_gib * GIB) if fleet.host_memory_gib else int(0.8 * memory.total_bytes)
    if budget > memory.total_bytes:
        problem = f"{gib(budget)} are more than this host's {gib(memory.total_bytes)}"
        yield error("host_memory_gib", problem, f"give at most {memory.total_bytes * 0.9 / GIB:.0f}")
    for engine in here:
        yield from _masters_fit(engine, masters.get(engine.name, 0), budget)
    total = sum(masters.values())
    if total > budget and len(masters) > 1:
        fix = "raise host_memory_gib, or expect some to sleep at level 2 or stop"
        yield warning("host_memory_gib", f"all masters together need {gib(total)} of {gib(budget)}", fix)
    limit = around.memlock_bytes()
    if limit is not None and limit < min(budget, total or budget) and any(masters.values()):
        fix = "set LimitMEMLOCK=infinity for the service (ulimit -l unlimited in a shell)"
        yield warning("memlock", f"a process may lock {gib(limit)} and masters are locked memory", fix)


def _masters_fit(engine: EngineConfig, masters_bytes: int, budget: int) -> Iterator[Finding]:
    if masters_bytes <= budget:
        return
    place, problem = f"engine '{engine.name}'", f"its masters need {gib(masters_bytes)} and the budget is {gib(budget)}"
    if 2 in engine.sleep_levels or engine.launcher != "attach":
        yield warning(place, problem, "it will never sleep at level 1: raise host_memory_gib or drop level 1")
    else:
        yield error(place, problem, "it can never yield: raise host_memory_gib or allow sleep level 2")


def _masters_bytes(engine: EngineConfig) -> int:
    given = engine.footprint.host_gib if engine.footprint else None
    return int(given * GIB) if given else 0


# -- GPUs ------------------------------------------------------------------------------------------------------------


async def _gpus(fleet: FleetConfig, devices: Devices, around: Surroundings) -> list[Finding]:
    try:
        inventory = await devices.inventory(deadline_s=max(10.0, fleet.devices.read_deadline_s))
    except DeviceError as e:
        fix = "install the driver, or run this where the GPUs are"
        return [error("devices", f"the GPUs cannot be listed ({e})", fix)]
    allowed = {i.id: i for i in inventory if is_allowed(fleet, i)}
    fleet = placed(fleet, inventory)
    found = [*_nodes(fleet, inventory)]
    found += list(_missing(fleet, inventory, allowed))
    gpus = planned_gpus(fleet, allowed)
    known = around.remembered(ledger_url(fleet))
    engines = planned_engines(fleet, allowed, known)
    found += [Finding(line) for line in never_fits(gpus, engines)]
    found += _residues(gpus, engines)
    found += check_bounds(fleet, engines, gpus, known)
    found += check_calendar(fleet, engines, gpus, around.now_wall_s())
    found += await _foreign(fleet, devices, allowed, around)
    return found


def _nodes(fleet: FleetConfig, inventory: tuple[GpuInfo, ...]) -> Iterator[Finding]:
    seen = {info.node for info in inventory}
    for node in fleet.nodes:
        if node.name not in seen:
            problem = f"its agent at {node.url} does not answer, or has no GPU"
            yield error(f"node '{node.name}'", problem, "start it there (systemctl status rotator-agent), see its log")


def _missing(fleet: FleetConfig, inventory: tuple[GpuInfo, ...], allowed: Mapping[GpuId, GpuInfo]) -> Iterator[Finding]:
    listed = ", ".join(f"{i.index} ({i.id})" for i in inventory) or "none"
    if fleet.devices.gpus != "all":
        for name in fleet.devices.gpus:
            if not any(names_gpu(name, info) for info in inventory):
                yield error("devices.gpus", f"there is no GPU {name}", f"name one of {listed}")
    for engine in fleet.engines:
        for name in engine.gpus:
            known = next((info for info in inventory if names_gpu(name, info)), None)
            if known is None:
                yield error(f"engine '{engine.name}'.gpus", f"there is no GPU {name}", f"name one of {listed}")
            elif known.id not in allowed:
                problem = f"GPU {name} is not in devices.gpus"
                yield error(f"engine '{engine.name}'.gpus", problem, "add it there, or name another")


def _residues(gpus: Mapping[GpuId, Gpu], engines: list[Engine]) -> Iterator[Finding]:
    """Engines that fit alone, but not beside what the others leave behind when they sleep."""
    for engine in engines:
        for gpu, awake in zip(engine.gpus, engine.awake_bytes, strict=True):
            usable = gpus[gpu].total_bytes - gpus[gpu].reserve_bytes
            others = [e for e in engines if e is not engine and gpu in e.gpus]
            left = sum(e.residue_bytes[e.gpus.index(gpu)] for e in others)
            if awake <= usable < awake + left:
                problem = f"{gib(awake)} do not fit on {gpu} beside {gib(left)} that {len(others)} sleepers keep there"
                fix = "lower its memory utilization, or expect one of them to be stopped for it"
                yield warning(f"engine '{engine.name}'", problem, fix)
                break


async def _foreign(
    fleet: FleetConfig, devices: Devices, allowed: Mapping[GpuId, GpuInfo], around: Surroundings
) -> list[Finding]:
    found = []
    for id, info in allowed.items():
        try:
            reading = await devices.read(id, deadline_s=fleet.devices.read_deadline_s)
        except DeviceError as e:
            fix = "look at the driver's log; engines there will not move while it does not answer"
            found.append(error(f"GPU {info.index}", f"its memory cannot be read ({e})", fix))
            continue
        own = {pid: n for pid, n in (reading.by_pid or {}).items() if around.engine_of(pid, fleet.state_dir)}
        foreign_bytes = reading.used_bytes - sum(own.values())
        if foreign_bytes > GIB:
            pids = ", ".join(map(str, sorted(set(reading.by_pid or ()) - set(own)))) or "unknown"
            fix = "fine if those are this fleet's engines; else every plan has that much less"
            problem = f"{gib(foreign_bytes)} are in use now (processes: {pids})"
            found.append(warning(f"GPU {info.index}", problem, fix))
    return found
