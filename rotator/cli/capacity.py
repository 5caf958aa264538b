"""``rotator capacity``: what fits together on a box."""

import asyncio
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.text import Text

from rotator import config
from rotator.adapters.fleet_devices import looked_through
from rotator.adapters.ledger_reader import LedgerReader
from rotator.check.planned import is_allowed, is_measured, ledger_url, placed, planned_engines, planned_gpus
from rotator.cli import render
from rotator.cli.errors import PROBLEM, fail
from rotator.cli.local import CONFIG_DEFAULT, ConfigPath
from rotator.cli.options import AsJson, print_json
from rotator.cli.render import gib
from rotator.cli.surroundings import Machine
from rotator.config import GIB, ConfigError, FleetConfig
from rotator.config_nodes import split_gpu
from rotator.core.capacity import Capacity, Elastic, Never, Size, Together
from rotator.core.capacity import capacity as judge
from rotator.ports import DeviceError, GpuInfo, LedgerError

_INVENTORY_S = 10.0
_HOST_SHARE = 0.8


def capacity(
    path: ConfigPath = CONFIG_DEFAULT,
    gpu_gib: Annotated[
        float | None, typer.Option("--gpu-gib", min=1, help="plan for GPUs of this size instead of those here")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Which engines fit together awake, whose weights fit with one KV cache, who never can, and the host RAM needed."""
    try:
        fleet = config.load(path)
    except ConfigError as e:
        fail(PROBLEM, *e.problems)
    inventory = _gpus(fleet, gpu_gib)
    infos, fleet = {info.id: info for info in inventory}, placed(fleet, inventory)
    known = Machine().remembered(ledger_url(fleet))
    engines = planned_engines(fleet, infos, known)
    if len(engines) < len(fleet.engines):
        missing = sorted({e.name for e in fleet.engines} - {e.name for e in engines})
        fail(PROBLEM, f"{', '.join(missing)}: on GPUs that are not there: see `rotator check`, or give --gpu-gib")
    found = judge(planned_gpus(fleet, infos), engines, _host_budget(fleet))
    measured = {e.name for e in engines if is_measured(e, known)}
    if as_json:
        print_json({**asdict(found), "measured": sorted(measured)})
    else:
        labels = {info.id: f"GPU {info.index}" for info in infos.values()}
        render.console().print(_shown(found, measured, labels))


def _gpus(fleet: FleetConfig, gpu_gib: float | None) -> list[GpuInfo]:
    """The GPUs asked for, those of this machine, or those that the ledger remembers."""
    if gpu_gib is not None:
        names = sorted({str(name) for engine in fleet.engines for name in engine.gpus}, key=lambda n: (len(n), n))
        total = int(gpu_gib * GIB)
        return [_imagined(name, i, total) for i, name in enumerate(names)]
    try:
        inventory = asyncio.run(looked_through(fleet, lambda devices: devices.inventory(deadline_s=_INVENTORY_S)))
    except ConfigError as e:
        fail(PROBLEM, *e.problems)
    except DeviceError as e:
        inventory = _remembered_gpus(fleet)
        if not inventory:
            fail(PROBLEM, f"the GPUs cannot be listed ({e}): run this where they are, or give --gpu-gib")
    return [info for info in inventory if is_allowed(fleet, info)]


def _imagined(name: str, place: int, total_bytes: int) -> GpuInfo:
    """A GPU of that name, where only its size is told."""
    node, gpu = split_gpu(name)
    return GpuInfo(name, int(gpu) if gpu.isdecimal() else place, "", total_bytes, node=node)


def _remembered_gpus(fleet: FleetConfig) -> tuple[GpuInfo, ...]:
    try:
        reader = LedgerReader(ledger_url(fleet))
        try:
            return reader.gpus()
        finally:
            reader.close()
    except LedgerError:
        return ()


def _host_budget(fleet: FleetConfig) -> int:
    if fleet.host_memory_gib is not None:
        return int(fleet.host_memory_gib * GIB)
    return int(_HOST_SHARE * Machine().host_memory().total_bytes)


# -- as tables -------------------------------------------------------------------------------------------------------


def _shown(found: Capacity, measured: set[str], labels: Mapping[str, str]) -> Group:
    parts: list[Any] = [_sizes(found.sizes, measured)]
    if not all(s.kv_known for s in found.sizes):
        parts.append(Text("  ? estimated from residue and masters: give footprint.kv_gib", style="dim"))
    parts.append(_sets(found.together, labels))
    if found.never:
        parts.append(Text("never awake together", style="bold"))
        parts += [Text(f"  {_never(n, labels)}") for n in found.never]
    parts.append(_elastic(found.elastic))
    parts.append(_host(found))
    if found.is_cut:
        parts.append(Text("there are more sets than are listed", style="yellow"))
    return Group(*parts)


def _sizes(sizes: tuple[Size, ...], measured: set[str]) -> Any:
    columns = ("engine", "GPUs#", "awake GiB", "weights GiB", "KV GiB", "asleep GiB", "masters GiB", "bytes are")
    rows = (
        (
            s.engine,
            len(s.gpus),
            gib(max(s.awake_bytes)),
            gib(max(s.weights_bytes)),
            gib(max(s.kv_bytes)) + ("" if s.kv_known else "?"),
            gib(max(s.residue_bytes)),
            gib(s.host_bytes),
            "measured" if s.engine in measured else "configured",
        )
        for s in sizes
    )
    return render.table("footprints, a GPU (masters: in all)", columns, rows)


def _sets(together: tuple[Together, ...], labels: Mapping[str, str]) -> Any:
    rows = (
        (
            " + ".join(t.engines),
            ", ".join(f"{labels.get(gpu, gpu)} {gib(max(0, left))}" for gpu, left in t.free_bytes.items()),
            _to_stop(t, labels),
        )
        for t in together
    )
    return render.table("awake together", ("engines", "left beside all sleepers, GiB", "sleepers to be stopped"), rows)


def _to_stop(t: Together, labels: Mapping[str, str]) -> str:
    short = {gpu: -left for gpu, left in t.free_bytes.items() if left < 0}
    return ", ".join(f"{gib(size)} GiB on {labels.get(gpu, gpu)}" for gpu, size in short.items())


def _never(n: Never, labels: Mapping[str, str]) -> str:
    lacking = f"{gib(n.lacking_bytes)} GiB are lacking on {labels.get(n.gpu, n.gpu)}"
    if n.other is None:
        return f"{n.engine}, not even alone: {lacking}"
    return f"{n.engine} and {n.other}: {lacking}"


def _elastic(sets: tuple[Elastic, ...]) -> Any:
    if not sets:
        return Text("no engines whose weights fit together take turns", style="dim")
    rows = (
        (
            " + ".join(e.engines),
            gib(e.kv_max_bytes),
            gib(e.kv_now_bytes),
            "as they are" if e.fits_now else f"with KV caches of at most {gib(e.kv_max_bytes)} GiB a GPU",
        )
        for e in sets
    )
    title = "swap without moving weights (elastic engines: one KV cache at a time)"
    return render.table(title, ("engines", "KV up to GiB", "KV now GiB", "possible"), rows)


def _host(found: Capacity) -> Text:
    left = found.host_budget_bytes - found.masters_bytes
    line = f"host RAM: all masters need {gib(found.masters_bytes)} GiB of {gib(found.host_budget_bytes)} GiB"
    if left >= 0:
        return Text(f"{line}, {gib(left)} GiB are left")
    return Text(f"{line}: {gib(-left)} GiB are lacking, so some sleep deeper or stop", style="yellow")
