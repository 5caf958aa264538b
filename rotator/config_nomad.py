"""The section ``nomad`` (where Nomad is and who we are to it) and an engine's ``job`` (what Nomad is to run)."""

from pathlib import Path
from typing import Any, Self

from pydantic import Field, HttpUrl, model_validator

from rotator.config_base import Section

ADDRESS = HttpUrl("http://127.0.0.1:4646")


class NomadConfig(Section):
    address: HttpUrl | None = Field(default=None, description=f"NOMAD_ADDR if absent, else {str(ADDRESS).rstrip('/')}")
    namespace: str | None = Field(default=None, min_length=1, description="NOMAD_NAMESPACE if absent, else `default`")
    region: str | None = Field(default=None, min_length=1, description="NOMAD_REGION if absent, else the agent's own")
    token_file: Path | None = Field(
        default=None, description="file that holds the ACL token; read again for every call, as Nomad renews it"
    )
    token_env: str = Field(
        default="NOMAD_TOKEN", description="environment variable that holds the ACL token, where there is no file"
    )
    ca_file: Path | None = Field(
        default=None, description="PEM of the authority that signed Nomad's certificate; NOMAD_CACERT if absent"
    )
    cert_file: Path | None = Field(
        default=None, description="PEM of our client certificate; NOMAD_CLIENT_CERT if absent"
    )
    key_file: Path | None = Field(default=None, description="PEM of its key; NOMAD_CLIENT_KEY if absent")
    insecure_skip_verify: bool = Field(
        default=False, description="true: whoever answers is taken for Nomad. Only for a moment's trial"
    )
    deadline_s: float = Field(default=10, gt=0, description="of one call to Nomad")
    place_deadline_s: float = Field(
        default=60, gt=0, description="how long Nomad may take to find a place for a registered job"
    )
    resync_s: float = Field(
        default=30, gt=0, description="how often allocations are listed where no event told to: events may be lost"
    )

    @model_validator(mode="after")
    def _tls(self) -> Self:
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("'cert_file' and 'key_file' belong together: give both or none")
        if self.insecure_skip_verify and self.ca_file is not None:
            raise ValueError("'insecure_skip_verify' makes 'ca_file' useless: remove one of them")
        return self

    def files_in(self, base: Path) -> "NomadConfig":
        """The same with its files relative to ``base``."""
        named = ((name, getattr(self, name)) for name in ("token_file", "ca_file", "cert_file", "key_file"))
        return self.model_copy(update={name: base / file for name, file in named if file is not None})


class JobConfig(Section):
    """Give ``file`` (with ``variables``) or ``site``."""

    file: Path | None = Field(default=None, description="the job as Nomad reads it (HCL2)")
    variables: dict[str, Any] = Field(
        default={},
        description="its variables; in texts {port}, {name}, {gpus} and {tp} are filled in, and a text that is just "
        "{gpu_uuids} becomes the list of them",
    )
    site: Path | None = Field(default=None, description="site file, from which the job is rendered by its recipe")
    name: str | None = Field(default=None, description="the engine's name in the site file; its own if absent")
    task: str | None = Field(
        default=None, description="the task that is the engine; the only one without a lifecycle if absent"
    )

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.file is None) == (self.site is None):
            raise ValueError("give exactly one of 'file' and 'site'")
        if self.site is not None and self.variables:
            raise ValueError("'variables' are for 'file': a job from a site file gets its values from there")
        if self.file is not None and self.name is not None:
            raise ValueError("'name' is for 'site': the engine's name in the site file")
        return self

    def files_in(self, base: Path) -> "JobConfig":
        named = ((name, getattr(self, name)) for name in ("file", "site"))
        return self.model_copy(update={name: base / file for name, file in named if file is not None})
