"""What is known of a machine, as values. None means: nobody could tell. A part that was not looked at is absent as a
whole; ``Facts.troubles`` says why a probe failed. Sizes are bytes, times are Unix seconds."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rotator.config import EngineConfig, FleetConfig
from rotator.ports import GpuInfo


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel that is installed. ``modules`` are its NVIDIA modules' files, ``version`` what the module says it is."""

    release: str
    modules: tuple[str, ...] = ()
    version: str | None = None
    menu_entry: str | None = None  # how the boot menu calls it


@dataclass(frozen=True, slots=True)
class KernelFacts:
    running: str
    installed: tuple[Kernel, ...] = ()
    next_release: str | None = None  # what a reboot starts
    next_because: str = ""
    module_version: str | None = None  # of the loaded module: /sys/module/nvidia/version
    boots_here: bool = True  # False in a container, which sees neither /boot nor modules


@dataclass(frozen=True, slots=True)
class PciGpu:
    """An NVIDIA GPU on the bus. Speeds are in GT/s. ``port_*`` belong to the slot above it."""

    bus_id: str
    driver: str | None = None
    speed: float | None = None
    speed_max: float | None = None
    width: int | None = None
    width_max: int | None = None
    port_speed_max: float | None = None
    port_width_max: int | None = None
    iommu: str | None = None  # the kind of its IOMMU group: identity, DMA, DMA-FQ


@dataclass(frozen=True, slots=True)
class DriverFacts:
    proc_version: str | None = None  # /proc/driver/nvidia/version: the loaded module
    library_version: str | None = None  # of libnvidia-ml.so.1
    libraries: tuple[str, ...] = ()  # every libnvidia-ml that was found, for evidence
    nodes: tuple[str, ...] = ()  # /dev/nvidia*
    firmware: tuple[str, ...] = ()  # versions below /lib/firmware/nvidia with GSP firmware
    open_module: bool = False
    nouveau: bool = False
    pci: tuple[PciGpu, ...] = ()


@dataclass(frozen=True, slots=True)
class GpuState:
    """``by_pid`` as in GpuReading. ``fabric`` is NVML's state of its NVLink fabric, where it has one."""

    info: GpuInfo
    used_bytes: int | None = None
    by_pid: Mapping[int, int] | None = None
    fabric: str | None = None
    trouble: str = ""


@dataclass(frozen=True, slots=True)
class GpuFacts:
    gpus: tuple[GpuState, ...] = ()
    error: str | None = None  # NVML as a whole does not answer
    cuda_driver: tuple[int, int] | None = None  # the newest CUDA that the driver can run
    no_peer: tuple[tuple[int, int, str], ...] = ()  # pairs of indices without peer access, and why


@dataclass(frozen=True, slots=True)
class Process:
    pid: int
    name: str
    state: str
    ppid: int = 0
    pgrp: int = 0
    user: str = ""
    engine: str = ""  # the mark of one of rotator's engines
    service: str = ""
    command: str = ""
    gpus: tuple[int, ...] = ()  # minor numbers of /dev/nvidia* that it holds open


@dataclass(frozen=True, slots=True)
class ShmSegment:
    """A file in /dev/shm. ``held_by`` are processes that have it mapped or open."""

    name: str
    bytes: int
    uid: int
    age_s: float
    held_by: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ProcessFacts:
    """``sees_all`` is False where processes may exist that nobody here can see (a container, another user's)."""

    processes: tuple[Process, ...] = ()
    shm: tuple[ShmSegment, ...] = ()
    shm_total_bytes: int | None = None
    shm_free_bytes: int | None = None
    sees_all: bool = True
    own_uid: int = 0
    service_id: str = ""


@dataclass(frozen=True, slots=True)
class HostFacts:
    total_bytes: int
    available_bytes: int
    free_bytes: int = 0
    cached_bytes: int = 0
    huge_reserved_bytes: int = 0
    huge_free_bytes: int = 0
    thp: str = ""  # always, madvise, never
    memlock_bytes: int | None = None  # None: no limit
    files_max: int | None = None
    clock_synchronized: bool | None = None
    now_wall_s: float = 0.0
    rtc_wall_s: float | None = None


@dataclass(frozen=True, slots=True)
class KnownTrouble:
    """A row of the known-broken table that fits an engine. ``certain``: it was seen not to start like this."""

    name: str
    says: str
    fix: str
    source: str
    certain: bool = False


@dataclass(frozen=True, slots=True)
class Software:
    """An engine's Python environment, read from its files. ``torch_cuda`` is "" for a build without CUDA."""

    engine: str
    prefix: str | None = None
    python: str | None = None
    packages: Mapping[str, str] = field(default_factory=dict)
    torch_cuda: str | None = None
    modules: frozenset[str] = frozenset()  # of those looked for, which can be imported
    known_broken: tuple[KnownTrouble, ...] = ()
    model_type: str = ""  # as its model's config.json says


@dataclass(frozen=True, slots=True)
class Shard:
    """``wanted_bytes`` is what its own header says; None for one whose header cannot be read."""

    name: str
    bytes: int | None
    wanted_bytes: int | None = None
    absent_tensors: int = 0  # that the index promises and its header does not hold


@dataclass(frozen=True, slots=True)
class Model:
    engine: str
    path: str
    exists: bool
    shards: tuple[Shard, ...] = ()
    incomplete: tuple[str, ...] = ()  # downloads that were not finished
    has_config: bool = True
    has_tokenizer: bool = True
    model_type: str = ""
    trouble: str = ""


@dataclass(frozen=True, slots=True)
class OverlayFile:
    """A file that an overlay's manifest names. ``found`` is its hash, None where it is not there."""

    overlay: str
    path: str
    wanted: str
    found: str | None
    engine: str = ""


@dataclass(frozen=True, slots=True)
class FileFacts:
    models: tuple[Model, ...] = ()
    overlays: tuple[OverlayFile, ...] = ()
    overlay_troubles: tuple[tuple[str, str, str], ...] = ()  # engine, manifest, what is wrong with it


@dataclass(frozen=True, slots=True)
class Launch:
    """How an engine would be started. ``problem`` is why its program cannot run: missing, folder, not-executable,
    interpreter-missing, import-missing, workdir-missing; "" where nothing stands in the way."""

    engine: str
    program: str
    problem: str = ""
    interpreter: str = ""
    package: str = ""  # what its entry point imports, or would
    package_version: str | None = None  # of that package in the same environment; None where it is not there
    expected: tuple[str, ...] = ()  # the words that the fleet file says
    running: tuple[str, ...] | None = None  # those of the process that runs now
    recipe: tuple[str, ...] = ()  # differences from the recipe it names, one line each


@dataclass(frozen=True, slots=True)
class LaunchFacts:
    launches: tuple[Launch, ...] = ()


@dataclass(frozen=True, slots=True)
class Port:
    port: int
    of: str  # "bind" or an engine's name
    holder: str | None = None  # who listens there, in words
    holder_engine: str = ""  # the mark of that process
    kept: bool = False  # by the ledger, not by the fleet file


@dataclass(frozen=True, slots=True)
class PortFacts:
    ports: tuple[Port, ...] = ()
    service_pid: int | None = None  # who holds the ledger


@dataclass(frozen=True, slots=True)
class LedgerFacts:
    """``place`` is its file, or its URL without a password."""

    place: str
    is_file: bool = True
    exists: bool = False
    bytes: int = 0
    schema: str = ""
    schema_known: bool = True
    schema_head: str = ""
    held_by: int | None = None
    damage: tuple[str, ...] = ()
    unreadable: str = ""
    newest_wall_s: float | None = None
    free_bytes: int | None = None
    folders: tuple[tuple[str, str], ...] = ()  # folders that the service needs, and what is wrong with each ("missing")


@dataclass(frozen=True, slots=True)
class NomadNode:
    name: str
    id: str
    status: str = "ready"
    eligible: bool = True
    docker: bool = True
    volumes: bool | None = None
    runtimes: tuple[str, ...] = ()
    host_networks: tuple[str, ...] = ()
    max_kill_timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class NomadFacts:
    address: str = ""
    error: str = ""
    nodes: tuple[NomadNode, ...] = ()
    stop_grace_s: float = 0.0  # the longest of the engines that it runs
    drifts: tuple[tuple[str, tuple[str, ...], str], ...] = ()  # engine, changed fields, why nobody can tell


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """``versions`` by node and package; ``errors`` by node."""

    versions: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    errors: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything that was gathered. ``fleet`` is None where there is no fleet file to look at."""

    fleet: FleetConfig | None = None
    kernel: KernelFacts | None = None
    driver: DriverFacts | None = None
    gpus: GpuFacts | None = None
    processes: ProcessFacts | None = None
    host: HostFacts | None = None
    software: tuple[Software, ...] | None = None
    files: FileFacts | None = None
    launches: LaunchFacts | None = None
    ports: PortFacts | None = None
    ledger: LedgerFacts | None = None
    nomad: NomadFacts | None = None
    nodes: NodeFacts | None = None
    troubles: Mapping[str, str] = field(default_factory=dict)

    @property
    def engines(self) -> tuple[EngineConfig, ...]:
        return self.fleet.engines if self.fleet else ()

    def infos(self, engine: EngineConfig) -> tuple[GpuInfo, ...]:
        """The GPUs of this machine that an engine names."""
        known = self.gpus.gpus if self.gpus else ()
        return tuple(g.info for name in engine.gpus for g in known if str(name) in (str(g.info.index), g.info.id))


def is_here(engine: EngineConfig) -> bool:
    """Whether the engine runs on this machine, and not on another node."""
    return engine.node is None and not any("/" in str(gpu) for gpu in engine.gpus)


def model_folder(engine: EngineConfig, named: str | None) -> Path | None:
    """Where the engine's model files lie; None for a name that a hub resolves."""
    if engine.model_path is not None:
        return engine.model_path
    if named and named.startswith(("/", "./", "../")):
        return Path(engine.workdir or ".") / named
    return None
