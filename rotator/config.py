"""The one configuration file, typed. Unknown keys are errors; every message says where and what to do."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    HttpUrl,
    ValidationError,
    field_validator,
    model_validator,
)

from rotator.config_base import Section
from rotator.config_calendar import CalendarConfig
from rotator.config_nodes import NodeConfig, split_gpu, unknown_names
from rotator.config_nomad import JobConfig, NomadConfig
from rotator.config_policies import PoliciesConfig
from rotator.config_security import BindConfig as BindConfig
from rotator.config_security import HttpConfig as HttpConfig
from rotator.config_security import KeyConfig as KeyConfig
from rotator.config_telemetry import LogConfig, TelemetryConfig
from rotator.config_text import TextProblem, problem_lines, read_mapping
from rotator.config_watchdog import WatchdogConfig, WebhookConfig
from rotator.core.values import Level

GIB = 1 << 30
ENGINE_NAME = r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,127}$"


class ConfigError(Exception):
    """The file cannot be used. ``problems`` are one line each: where, what, the fix."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def _word(value: Any) -> Any:
    """YAML reads a bare 4 or 0.9 as a number; in a command or an environment it is the text that was meant."""
    if isinstance(value, bool) or value is None:
        shown = {True: "true", False: "false", None: "null"}[value]
        raise ValueError(f'YAML reads a bare {shown} as no text: put it in quotes, as "1" or "{shown}"')
    return str(value) if isinstance(value, int | float) else value


Word = Annotated[str, BeforeValidator(_word)]


class DevicesConfig(Section):
    gpus: Literal["all"] | tuple[int | str, ...] = Field(
        default="all", description="NVML indices or UUIDs that the service may use"
    )
    reserve_gib: float = Field(default=1.0, ge=0, description="bytes a GPU that no plan may use, in GiB")
    read_deadline_s: float = Field(
        default=2.0, gt=0, description="a device query that takes longer makes the GPU UNKNOWN"
    )
    sample_every_s: float = Field(default=1.0, gt=0, description="how often each GPU is read")
    sample_retention_h: float = Field(
        default=72.0, gt=0, description="how long VRAM samples stay in the ledger, in hours"
    )


class FootprintConfig(Section):
    """What is known before the first measurement, in GiB a GPU. The service measures and then believes its measures."""

    awake_gib: float = Field(gt=0)
    residue_gib: float = Field(default=2.0, ge=0)
    host_gib: float | None = Field(
        default=None, ge=0, description="host RAM for the masters at level 1, all ranks together"
    )
    kv_gib: float = Field(default=0.0, ge=0, description="KV cache a GPU: what an elastic engine frees first")


class OverridesConfig(Section):
    """Changes to a request's JSON body: ``defaults`` where the client is silent, ``set`` always, ``remove`` always."""

    defaults: dict[str, Any] = Field(default={})
    set: dict[str, Any] = Field(default={})
    remove: tuple[str, ...] = ()

    @property
    def any(self) -> bool:
        return bool(self.defaults or self.set or self.remove)


class FallbackConfig(Section):
    """Where a request goes when its model cannot be had. Always visible: header, events, metrics."""

    model: str | None = Field(default=None, description="another model of this service")
    url: HttpUrl | None = Field(default=None, description="base URL of an outside OpenAI endpoint, ending before /v1")
    upstream_model: str | None = Field(default=None, description="the model's name there")
    api_key_env: str | None = Field(default=None, description="environment variable that holds the outside key")

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.model is None) == (self.url is None):
            raise ValueError("give exactly one of 'model' and 'url'")
        return self


_MAX_NUM_SEQS_DEFAULT = 256  # vLLM's own


def _max_num_seqs(command: tuple[str, ...]) -> int | None:
    flag = "--max-num-seqs"
    for i, word in enumerate(command):
        name, _, value = word.partition("=")
        if name == flag:
            text = value or (command[i + 1] if i + 1 < len(command) else "")
            if text.isdigit() and int(text) > 0:
                return int(text)
    return None


class EngineConfig(Section):
    name: str = Field(pattern=ENGINE_NAME, description="the engine's name, and the model name that clients ask for")
    aliases: tuple[str, ...] = ()
    served_model: str | None = Field(
        default=None, description="the name the engine itself serves; its own name if absent"
    )
    gpus: tuple[int | str, ...] = Field(
        min_length=1, description="NVML indices or UUIDs, of another node as `node/0`; as many as TP × PP"
    )
    node: str | None = Field(
        default=None, description="the node (or pool of nodes) of those `gpus` that name none; this machine if absent"
    )
    tp: int | None = Field(default=None, ge=1, description="tensor parallel size; as many as GPUs if absent")
    launcher: Literal["process", "attach", "nomad"] = "process"
    command: tuple[Word, ...] = Field(
        default=(), description="program and arguments; {port}, {name} and {gpus} are filled in"
    )
    env: dict[str, Word] = Field(default={}, description="added to what engines inherit of the service's")
    workdir: str | None = None
    port: int | None = Field(default=None, ge=1, le=65535, description="loopback port; chosen once and kept if absent")
    url: HttpUrl | None = Field(default=None, description="for launcher 'attach': where the engine runs")
    job: JobConfig | None = Field(default=None, description="for launcher 'nomad': what Nomad is to run")
    api_key_env: str | None = Field(
        default=None,
        description="for launchers 'attach' and 'nomad': environment variable of the service that holds the engine's "
        "own API key; for 'process' each launch makes one",
    )
    model_path: Path | None = Field(default=None, description="checked to exist before a launch")
    overlay_manifest: Path | None = Field(
        default=None,
        description="manifest.json of the overlay bundle that its workers must run, or it is quarantined",
    )
    sleep_levels: tuple[Literal[1, 2], ...] = Field(
        default=(1,), min_length=1, description="levels it may use, preferred first"
    )
    elastic: bool = Field(default=False, description="its allocator can free by bytes (KV cache first, then weights)")
    disk: bool = Field(default=False, description="its allocator can keep the weights' masters on disk")
    keeps_masters: bool = Field(
        default=False, description="its allocator keeps the weights' masters in host RAM while it is awake"
    )
    in_flight_max: int | None = Field(
        default=None, ge=1, description="requests it serves at once; more wait in line here, in fair shares of clients"
    )
    pin: bool = False
    priority: int = Field(default=0, ge=-100, le=100)
    preload: bool = Field(default=False, description="start it at service start, before anyone asks")
    start_deadline_s: float = Field(default=1800, gt=0)
    wake_deadline_s: float = Field(default=180, gt=0)
    sleep_deadline_s: float = Field(default=300, gt=0)
    stop_grace_s: float = Field(default=20, ge=0)
    drain_bound_s: float | None = Field(default=None, ge=0, description="overrides the policy's")
    wait_deadline_s: float | None = Field(default=None, gt=0, description="overrides the gateway's")
    queue_max: int | None = Field(default=None, ge=1, description="overrides the gateway's")
    overrides: OverridesConfig = OverridesConfig()
    fallback: FallbackConfig | None = None
    footprint: FootprintConfig | None = None

    @property
    def model(self) -> str:
        """The model name that the engine itself answers to."""
        return self.served_model or self.name

    @property
    def levels(self) -> tuple[Level, ...]:
        return tuple(Level(n) for n in self.sleep_levels)

    @property
    def slots(self) -> int:
        """Requests that it serves at once: as configured, else its command's --max-num-seqs, else vLLM's default."""
        return self.in_flight_max or _max_num_seqs(self.command) or _MAX_NUM_SEQS_DEFAULT

    def spec_hash(self) -> str:
        """Identifies what a running engine was started with: a change of it needs a restart of the engine."""
        parts = (
            self.launcher,
            self.command,
            sorted(self.env.items()),
            self.gpus,
            self.workdir,
            str(self.url),
            self.port,
            *((self.node,) if self.node else ()),  # not for all: engines of one machine keep the hash they had
            *((self.job.model_dump(mode="json"),) if self.job else ()),
        )
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    @model_validator(mode="after")
    def _launchable(self) -> Self:
        if self.launcher == "attach" and self.url is None:
            raise ValueError("launcher 'attach' needs 'url': where the engine runs")
        if self.launcher == "process" and not self.command:
            raise ValueError("launcher 'process' needs 'command': a list of program and arguments")
        if self.launcher == "nomad" and (self.job is None or self.port is None):
            raise ValueError(
                "launcher 'nomad' needs 'job' and 'port': what Nomad runs, and the port that it listens on"
            )
        if self.launcher != "nomad" and self.job is not None:
            raise ValueError("'job' is for launcher 'nomad' only: remove it, or set the launcher")
        if self.launcher != "attach" and self.url is not None:
            raise ValueError("'url' is for launcher 'attach' only: this engine gets a loopback port")
        if self.tp is not None and len(self.gpus) % self.tp:
            raise ValueError(f"{len(self.gpus)} GPUs cannot hold whole groups of tp {self.tp}: change 'gpus' or 'tp'")
        if self.launcher == "process" and self.api_key_env is not None:
            raise ValueError("'api_key_env' is for engines that others start: each launch of this one makes a key")
        if len({str(g) for g in self.gpus}) != len(self.gpus):
            raise ValueError("'gpus' names a GPU twice: remove one")
        if len(set(self.sleep_levels)) != len(self.sleep_levels):
            raise ValueError("'sleep_levels' names a level twice: remove one")
        return self


class GatewayConfig(Section):
    queue_max: int = Field(default=256, ge=1, description="requests that may wait for one model; beyond: 429")
    queue_total_max: int = Field(default=4096, ge=1, description="requests that may wait in all; beyond: 429")
    wait_deadline_s: float = Field(default=600, gt=0, description="how long a request waits for its model at most")
    body_max_mib: float = Field(default=64, gt=0)
    keepalive_s: float = Field(
        default=10, gt=0, description="a stream that stands still gets an SSE comment this often"
    )
    freezes_max: int = Field(
        default=8, ge=0, description="how often one request may be frozen before its engine keeps its turn"
    )
    upstream_connect_s: float = Field(default=5, gt=0)


class CanaryConfig(Section):
    prompt: str = "The capital of France is"
    tokens: int = Field(default=8, ge=1, le=64)
    logprob_tolerance: float = Field(
        default=0.25, gt=0, description="largest allowed difference of a token's log-probability"
    )
    deadline_s: float = Field(default=30, gt=0)
    enabled: bool = True


class RecoveryConfig(Section):
    preflight: bool = Field(
        default=True, description="look before each launch for what surely prevents it, and do not launch then"
    )
    backoff_first_s: float = Field(default=5, gt=0)
    backoff_max_s: float = Field(default=600, gt=0)
    vram_drain_deadline_s: float = Field(
        default=60, gt=0, description="how long a killed engine's bytes may take to come back"
    )
    residue_tolerance_gib: float = Field(
        default=0.5, ge=0, description="how much more than its known residue may stay asleep"
    )
    first_sleep_frees_min: float = Field(
        default=0.5, gt=0, le=1, description="share of the footprint that a first sleep must free"
    )
    health_every_s: float = Field(default=5, gt=0, description="how often an awake engine is asked /health")
    health_failures_max: int = Field(
        default=6, ge=1, description="so many misses in a row and an awake engine is restarted"
    )
    breaker_failures: int = Field(
        default=6, ge=1, description="so many faults within breaker_window_s and an engine is quarantined"
    )
    breaker_window_s: float = Field(default=3600, gt=0, description="within which faults are counted")
    on_shutdown: Literal["leave", "sleep", "stop"] = Field(
        default="leave", description="what SIGTERM does to the engines; who still moves after 120 s is killed"
    )
    shutdown_drain_s: float = Field(
        default=30, ge=0, description="how long work in flight may still take after SIGTERM, before on_shutdown"
    )


class LedgerConfig(Section):
    url: str | None = Field(default=None, description="any SQLAlchemy URL; SQLite in state_dir if absent")
    deadline_s: float = Field(default=5, gt=0)
    retention_days: float = Field(
        default=30, gt=0, description="how long the journal, its decisions and request totals are kept, in days"
    )


class PageConfig(Section):
    """The web page at ``/``."""

    enabled: bool = Field(default=True, description="whether `/` shows the page to browsers")
    viewers_max: int = Field(default=16, ge=1, le=256, description="so many open pages at once; further ones are told")
    session_h: float = Field(default=12.0, gt=0, description="how long a login with a key lasts, in hours")


class FleetConfig(Section):
    """A fleet: the devices, the engines on them, and how they take turns."""

    bind: BindConfig = BindConfig()
    state_dir: Path = Field(
        default=Path("state"), description="ledger, engine logs; relative to the configuration file"
    )
    devices: DevicesConfig = DevicesConfig()
    host_memory_gib: float | None = Field(
        default=None, gt=0, description="budget for masters in RAM; 80 % of the host if absent"
    )
    nodes: tuple[NodeConfig, ...] = Field(default=(), description="other machines, each with its agent")
    engines: tuple[EngineConfig, ...] = Field(min_length=1)
    gateway: GatewayConfig = GatewayConfig()
    policies: PoliciesConfig = PoliciesConfig()
    calendar: CalendarConfig = CalendarConfig()
    canary: CanaryConfig = CanaryConfig()
    recovery: RecoveryConfig = RecoveryConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    webhooks: tuple[WebhookConfig, ...] = Field(default=(), max_length=16, description="who is told of incidents")
    ledger: LedgerConfig = LedgerConfig()
    nomad: NomadConfig = NomadConfig()
    http: HttpConfig = HttpConfig()
    keys: tuple[KeyConfig, ...] = ()
    page: PageConfig = PageConfig()
    log: LogConfig = LogConfig()
    telemetry: TelemetryConfig = TelemetryConfig()

    @field_validator("engines")
    @classmethod
    def _names_unique(cls, engines: tuple[EngineConfig, ...]) -> tuple[EngineConfig, ...]:
        seen: dict[str, str] = {}
        for engine in engines:
            for name in (engine.name, *engine.aliases):
                if name in seen:
                    raise ValueError(f"'{name}' is both of engine '{seen[name]}' and of '{engine.name}': rename one")
                seen[name] = engine.name
        return engines

    @field_validator("keys")
    @classmethod
    def _keys_unique(cls, keys: tuple[KeyConfig, ...]) -> tuple[KeyConfig, ...]:
        for what, values in (("name", [k.name for k in keys]), ("sha256", [k.sha256 for k in keys])):
            for value in values:
                if values.count(value) > 1:
                    raise ValueError(f"{what} '{value}' is given to more than one key: change or remove one")
        return keys

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = {e.name for e in self.engines}
        ports = [e.port for e in self.engines if e.port is not None]
        for port in ports:
            if ports.count(port) > 1:
                raise ValueError(f"port {port} is given to more than one engine: change one")
        if self.bind.port and self.bind.port in ports:
            raise ValueError(f"port {self.bind.port} is bind.port and an engine's: change one")
        for engine in self.engines:
            if engine.fallback and engine.fallback.model == engine.name:
                raise ValueError(f"engine '{engine.name}': its fallback is itself: name another model")
            if engine.fallback and engine.fallback.model is not None and engine.fallback.model not in names:
                raise ValueError(
                    f"engine '{engine.name}': fallback model '{engine.fallback.model}' is no engine here: name one"
                )
        if (unknown := self.calendar.unknown(names)) is not None:
            raise ValueError(unknown)
        self._check_nodes()
        asked_for = names | {alias for engine in self.engines for alias in engine.aliases}
        for key in self.keys:
            if wrong := sorted(set(key.models or ()) - asked_for):
                raise ValueError(f"key '{key.name}': models: '{wrong[0]}' is no engine or alias here: correct it")
        if not self.bind.is_loopback and not self.keys:
            raise ValueError("bind.host is not loopback and there are no keys: add 'keys' or bind to 127.0.0.1")
        return self

    def _check_nodes(self) -> None:
        if (problem := unknown_names(self.nodes)) is not None:
            raise ValueError(problem)
        nodes = {node.name for node in self.nodes}
        known = nodes | {node.pool for node in self.nodes if node.pool}
        for engine in self.engines:
            if engine.node is not None and engine.node not in known:
                raise ValueError(f"engine '{engine.name}': there is no node or pool '{engine.node}': add it to 'nodes'")
            for gpu in engine.gpus:
                if (node := split_gpu(gpu)[0]) and node not in nodes:
                    raise ValueError(f"engine '{engine.name}': GPU '{gpu}' is on no node of this file: add '{node}'")

    def engine(self, name: str) -> EngineConfig:
        return next(e for e in self.engines if e.name == name)


LoadedFleet = Annotated[FleetConfig, "with its paths made absolute"]


def parse(text: str, *, base: Path, name: str = "") -> LoadedFleet:
    """Parse YAML text. ``base`` is what relative paths are relative to, ``name`` the file's. Raises ConfigError."""
    try:
        data = read_mapping(text)
        fleet = FleetConfig.model_validate(data)
    except TextProblem as e:
        raise ConfigError([f"{name}: {e}" if name else str(e)]) from None
    except ValidationError as e:
        raise ConfigError(problem_lines(e, data, FleetConfig)) from None
    engines = tuple(_absolute(engine, base) for engine in fleet.engines)
    update: dict[str, Any] = {"state_dir": (base / fleet.state_dir).resolve(), "engines": engines}
    update["nomad"] = fleet.nomad.files_in(base)
    if fleet.bind.tls is not None:
        update["bind"] = fleet.bind.model_copy(update={"tls": fleet.bind.tls.files_in(base)})
    if fleet.nodes:
        update["nodes"] = tuple(_node_absolute(node, base) for node in fleet.nodes)
    return fleet.model_copy(update=update)


def _node_absolute(node: NodeConfig, base: Path) -> NodeConfig:
    files = {name: getattr(node, name) for name in ("ca", "cert", "key", "token_file")}
    return node.model_copy(update={name: base / path for name, path in files.items() if path is not None})


def _absolute(engine: EngineConfig, base: Path) -> EngineConfig:
    """Paths in the file are relative to the file, wherever the service is started from."""
    update: dict[str, Any] = {}
    if engine.model_path is not None:
        update["model_path"] = base / engine.model_path
    if engine.workdir is not None:
        update["workdir"] = str(base / engine.workdir)
    if engine.job is not None:
        update["job"] = engine.job.files_in(base)
    return engine.model_copy(update=update) if update else engine


def load(path: Path) -> LoadedFleet:
    """Read and validate the configuration file. Raises ConfigError with one line a problem."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as e:
        raise ConfigError([f"{path}: cannot be read ({e.strerror}): give the file's path with -c"]) from None
    except UnicodeDecodeError as e:
        raise ConfigError([f"{path}: byte {e.start} is not UTF-8: save the file as UTF-8 text"]) from None
    return parse(text, base=path.resolve().parent, name=str(path))
