"""A site: the nodes, images and engines of one place, and where on it each recipe's model, cache and overlay lie."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rotator.config_base import Section
from rotator.jobs.files import parse_as, read_text
from rotator.jobs.recipe import ENV_NAME, FLAG, NAME, Arch, Value

GpuUuid = Annotated[str, Field(pattern=r"^(GPU|MIG)-[0-9A-Za-z-]+$")]
HostPath = Annotated[str, Field(pattern=r"^/[^:]*$", description="an absolute path on the node")]
_JOB_ID = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"


class LinkSite(Section):
    """The link between nodes that share an engine: RoCE, and the interface that NCCL and Gloo meet over."""

    address: str = Field(description="this node's address on that link")
    socket_interface: str = Field(description="for NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME")
    rdma_devices: tuple[str, ...] = Field(min_length=1, description="for NCCL_IB_HCA")


class NodeSite(Section):
    """One Nomad client."""

    node_pool: str = "default"
    arch: Arch
    gpus: tuple[GpuUuid, ...] = Field(min_length=1, description="UUIDs, as `nvidia-smi -L` tells them")
    gpu_memory_mib: int = Field(ge=1024, description="of each GPU; on unified memory, of the node")
    host_memory_mib: int = Field(ge=1024)
    unified_memory: bool = Field(default=False, description="GPU and host share their RAM (GB10)")
    max_kill_timeout_s: float = Field(default=30, gt=0, description="the Nomad client's own setting")
    cache_root: HostPath = Field(description="one directory an engine is made below it; must be writable")
    spill_root: HostPath | None = Field(default=None, description="for masters on disk: one directory an engine")
    link: LinkSite | None = None


class ImageSite(Section):
    """An image, and the vLLM in it."""

    ref: str = Field(min_length=1, description="repository@sha256:…; a tag can change under a running fleet")
    vllm: str = Field(min_length=1, description="the vLLM in it, as `vllm --version` tells it")
    entrypoint: tuple[str, ...] = Field(default=("vllm", "serve"), min_length=1)


class OverlaySite(Section):
    """A bundle of patched vLLM files, mounted read-only over those of the image."""

    root: HostPath = Field(description="the bundle's directory, named by its content")
    files: dict[str, HostPath] = Field(min_length=1, description="file in the bundle -> path inside the image")


class LeaseSite(Section):
    image: str = Field(min_length=1, description="an image whose entry point sleeps, by digest")
    nodes: tuple[str, ...] = Field(min_length=1)


class RotatorSite(Section):
    """The service as a Nomad job."""

    image: str = Field(min_length=1)
    node: str
    port: int = Field(default=8400, ge=1, le=65535)
    config_dir: HostPath = Field(description="holds fleet.yaml")
    state_dir: HostPath = Field(description="state_dir of fleet.yaml is /var/lib/rotator inside")
    nomad_address: str = "http://127.0.0.1:4646"
    host_pids: bool = Field(default=True, description="needs allowed_modes pid = host on the client")
    mounts: dict[HostPath, HostPath] = Field(default={}, description="further directories, read-only")
    env: dict[ENV_NAME, str] = Field(default={})
    cpu: int = Field(default=1000, ge=1)
    memory_mib: int = Field(default=1024, ge=64)
    job_id: str = Field(default="rotator", pattern=_JOB_ID)


class AgentsSite(Section):
    """The agents of other nodes, as one system job."""

    image: str = Field(min_length=1, description="the service's image, by digest")
    nodes: tuple[str, ...] = Field(min_length=1, description="where one is to run; not on the service's own node")
    config_dir: HostPath = Field(default="/etc/rotator", description="on each node: agent.yaml and what it names")
    mounts: dict[HostPath, HostPath] = Field(default={}, description="further directories, read-only")
    cpu: int = Field(default=500, ge=1)
    memory_mib: int = Field(default=512, ge=64)
    job_id: str = Field(default="rotator-agent", pattern=_JOB_ID)


class EngineSite(Section):
    """One engine: which recipe, where, with what of its own."""

    recipe: str = Field(description="a name of the catalogue, or a recipe file's path")
    profile: str | None = None
    gates: tuple[str, ...] = ()
    nodes: tuple[str, ...] = Field(min_length=1, max_length=2, description="one node, or head and worker")
    gpus: tuple[GpuUuid, ...] = Field(default=(), description="on one node; all of the node's if absent")
    image: str = Field(description="a name of 'images'")
    model_dir: HostPath = Field(description="on two nodes the same path on both")
    port: int = Field(ge=1, le=65535)
    master_port: int = Field(default=29501, ge=1, le=65535, description="on two nodes: where the ranks meet")
    served_name: str | None = Field(default=None, description="the engine's name if absent")
    job_id: str | None = Field(default=None, pattern=_JOB_ID, description="vllm-<name> if absent")
    tensor_parallel: int | None = Field(default=None, ge=1, description="the recipe's if absent")
    pipeline_parallel: int | None = Field(default=None, ge=1)
    allocator: Literal["rotator", "stock"] = Field(
        default="rotator", description="stock rounds each locked allocation up to a power of two"
    )
    sleep_levels: tuple[Literal[1, 2], ...] = Field(default=(), description="the recipe's if empty")
    overlay: OverlaySite | None = None
    args: dict[FLAG, Value] = Field(default={}, description="over the recipe's; null takes one away")
    env: dict[ENV_NAME, Value] = Field(default={}, description="over the recipe's; null takes one away")
    why: dict[str, str] = Field(default={}, description="argument or variable -> why it departs from the recipe")
    cpu: int = Field(default=4000, ge=100, description="MHz, as shares: an engine may use more while others sleep")
    memory_mib: int | None = Field(default=None, ge=1, description="weights and what else an engine needs if absent")
    shm_mib: int = Field(default=16384, ge=64)
    tmp_mib: int = Field(default=8192, ge=64)
    free_mib: int | None = Field(default=None, ge=1, description="VRAM to wait for; what vLLM will ask for if absent")
    gate_s: float = Field(default=120, ge=2, description="how long to wait for it")
    kill_timeout_s: float = Field(default=120, gt=0)
    ipc_host: bool = Field(default=False, description="needs allowed_modes ipc = host on the client")


class Site(Section):
    """One place."""

    namespace: str = "default"
    nodes: dict[str, NodeSite] = Field(min_length=1)
    images: dict[str, ImageSite] = Field(min_length=1)
    engines: dict[Annotated[str, Field(pattern=NAME)], EngineSite] = Field(min_length=1)
    lease: LeaseSite | None = None
    agents: AgentsSite | None = None
    rotator: RotatorSite | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name, engine in self.engines.items():
            place = f"engine '{name}'"
            for node in engine.nodes:
                self._node(node, place)
            if engine.image not in self.images:
                raise ValueError(f"{place}: image '{engine.image}' is not in 'images': add it, or name another")
            if len(set(engine.nodes)) != len(engine.nodes):
                raise ValueError(f"{place}: 'nodes' names a node twice: name head and worker")
            self._gpus(place, engine)
        for node in self.lease.nodes if self.lease else ():
            self._node(node, "lease")
        for node in self.agents.nodes if self.agents else ():
            self._node(node, "agents")
        if self.rotator:
            self._node(self.rotator.node, "rotator")
        return self

    def _node(self, name: str, place: str) -> None:
        if name not in self.nodes:
            raise ValueError(f"{place}: node '{name}' is not in 'nodes': add it, or name another")

    def _gpus(self, place: str, engine: EngineSite) -> None:
        if len(engine.nodes) == 2:
            if engine.gpus:
                raise ValueError(f"{place}: 'gpus' is for one node: on two, each node's one GPU is taken: remove it")
            for name in engine.nodes:
                node = self.nodes[name]
                if len(node.gpus) != 1 or node.link is None:
                    raise ValueError(f"{place}: node '{name}' must have one GPU and a 'link' to share an engine")
            return
        known = self.nodes[engine.nodes[0]].gpus
        for gpu in engine.gpus:
            if gpu not in known:
                raise ValueError(f"{place}: GPU {gpu} is not of node '{engine.nodes[0]}': name one of its own")
        if len(set(engine.gpus)) != len(engine.gpus):
            raise ValueError(f"{place}: 'gpus' names a GPU twice: remove one")

    def gpus_of(self, engine: EngineSite) -> tuple[str, ...]:
        """The GPUs an engine runs on, the head's first."""
        if engine.gpus:
            return engine.gpus
        return tuple(gpu for node in engine.nodes for gpu in self.nodes[node].gpus)


def load_site(path: Path) -> Site:
    """Read and validate a site file; recipe files are relative to it. Raises JobsError with one line a problem."""
    site = parse_as(Site, read_text(path), str(path))
    base = path.resolve().parent
    engines = {name: _with_recipe_in(base, engine) for name, engine in site.engines.items()}
    return site.model_copy(update={"engines": engines})


def _with_recipe_in(base: Path, engine: EngineSite) -> EngineSite:
    if not engine.recipe.endswith((".yaml", ".yml")):
        return engine
    return engine.model_copy(update={"recipe": str(base / engine.recipe)})
