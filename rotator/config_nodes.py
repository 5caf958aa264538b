"""The section ``nodes``: other machines whose GPUs this service rotates, each by its agent."""

from pathlib import Path
from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, HttpUrl, model_validator

from rotator.config_base import Section

NODE_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1", "[::1]")


class NodeConfig(Section):
    """One machine with GPUs and a ``rotator agent``. The service's own needs no entry: its GPUs have bare names."""

    name: str = Field(pattern=NODE_NAME, description="its GPUs are `<name>/<index>` or `<name>/<UUID>`")
    agent: HttpUrl = Field(description="where its agent listens, e.g. https://10.0.0.5:8411")
    pool: str | None = Field(
        default=None, pattern=NODE_NAME, description="an engine that names a pool gets one of its nodes"
    )
    ca: Path | None = Field(default=None, description="certificate of who signed the agent's; `rotator agent certs`")
    cert: Path | None = Field(default=None, description="this service's own certificate, shown to the agent")
    key: Path | None = Field(default=None, description="and its private key")
    token_file: Path = Field(description="file with the word that both sides know; `rotator agent certs` makes one")
    gpus: Literal["all"] | tuple[int | str, ...] = Field(
        default="all", description="its NVML indices or UUIDs that the service may use"
    )
    host_memory_gib: float | None = Field(
        default=None, gt=0, description="budget for masters in its RAM; 80 % of it if absent"
    )

    @property
    def url(self) -> str:
        """The agent's origin, without a slash at its end."""
        return str(self.agent).rstrip("/")

    @model_validator(mode="after")
    def _guarded(self) -> Self:
        parts = urlsplit(str(self.agent))
        if parts.path not in ("", "/") or parts.query:
            raise ValueError(f"agent {self.agent}: give its address alone, as https://host:port")
        if parts.scheme == "https":
            missing = [name for name in ("ca", "cert", "key") if getattr(self, name) is None]
            if missing:
                raise ValueError(
                    f"an agent over https needs {', '.join(missing)} too: `rotator agent certs` makes them all"
                )
        elif (parts.hostname or "") not in LOOPBACK_HOSTS:
            raise ValueError(f"agent {self.agent}: plain http is for loopback only: give https and certificates")
        return self


def unknown_names(nodes: tuple[NodeConfig, ...]) -> str | None:
    """What is wrong with the nodes' names together, in words; None where nothing is."""
    names = [node.name for node in nodes]
    pools = {node.pool for node in nodes}
    for name in names:
        if names.count(name) > 1:
            return f"nodes: '{name}' is named twice: rename one"
        if name in pools:
            return f"nodes: '{name}' is both a node and a pool: rename one"
    urls = [node.url for node in nodes]
    for url in urls:
        if urls.count(url) > 1:
            return f"nodes: two of them have the agent {url}: each node has its own"
    return None


def split_gpu(name: int | str) -> tuple[str, str]:
    """A GPU's name as (node, index or UUID); the node is empty where the name tells none."""
    node, _, gpu = str(name).rpartition("/")
    return node, gpu
