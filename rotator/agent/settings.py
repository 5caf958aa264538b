"""The agent's own file. What a request may never choose (paths, hosts, commands) stands here, or nowhere."""

from pathlib import Path
from typing import Self

from pydantic import Field, ValidationError, field_validator, model_validator

from rotator.config import ConfigError
from rotator.config_base import Section
from rotator.config_nodes import NODE_NAME
from rotator.config_text import TextProblem, problem_lines, read_mapping

TOKEN_CHARS_MIN = 32


class AgentConfig(Section):
    """One machine's agent. Relative paths are relative to the file."""

    node: str = Field(pattern=NODE_NAME, description="this machine's name in the fleet file")
    host: str = Field(default="127.0.0.1", description="address to listen on")
    port: int = Field(default=8411, ge=0, le=65535)
    ca: Path | None = Field(default=None, description="certificate of who signed the service's")
    cert: Path | None = Field(default=None, description="this agent's own certificate")
    key: Path | None = Field(default=None, description="and its private key")
    token_file: Path = Field(description="file with the word that both sides know")
    engines: dict[str, int] = Field(
        default={}, description="loopback ports of engines here; the service adds those of its fleet file by itself"
    )
    environments: dict[str, Path] = Field(
        default={}, description="Python environments (their prefix) whose package versions may be asked for, by name"
    )
    body_max_mib: float = Field(default=64, gt=0, description="largest request to an engine")
    requests_max: int = Field(default=4096, ge=1, description="requests to engines at once; beyond: 503")
    connect_s: float = Field(default=5, gt=0, description="how long a connection to an engine may take")
    read_deadline_s: float = Field(default=2, gt=0, description="how long a query of the driver may take")

    @property
    def is_loopback(self) -> bool:
        return self.host in ("localhost", "::1") or self.host.startswith("127.")

    @field_validator("engines")
    @classmethod
    def _ports(cls, engines: dict[str, int]) -> dict[str, int]:
        for name, port in engines.items():
            if not 1 <= port <= 65535:
                raise ValueError(f"engine '{name}': {port} is no port: give 1 to 65535")
        return engines

    @model_validator(mode="after")
    def _guarded(self) -> Self:
        files = (self.ca, self.cert, self.key)
        if any(files) and not all(files):
            raise ValueError("give all of ca, cert and key, or none: `rotator agent certs` makes them")
        if not self.is_loopback and not all(files):
            raise ValueError(
                f"host {self.host} is not loopback: give ca, cert and key (`rotator agent certs` makes them), "
                "or bind to 127.0.0.1"
            )
        return self

    @property
    def is_tls(self) -> bool:
        return self.cert is not None


def load(path: Path) -> AgentConfig:
    """Read the file. Raises ConfigError with one line a problem."""
    try:
        data = read_mapping(path.read_text(encoding="utf-8"))
        config = AgentConfig.model_validate(data)
    except OSError as e:
        raise ConfigError([f"{path}: cannot be read ({e.strerror}): give the file's path with -c"]) from None
    except UnicodeDecodeError as e:
        raise ConfigError([f"{path}: byte {e.start} is not UTF-8: save the file as UTF-8 text"]) from None
    except TextProblem as e:
        raise ConfigError([f"{path}: {e}"]) from None
    except ValidationError as e:
        raise ConfigError(problem_lines(e, data, AgentConfig)) from None
    base = path.resolve().parent
    files = {name: getattr(config, name) for name in ("ca", "cert", "key", "token_file")}
    update: dict[str, object] = {name: base / file for name, file in files.items() if file is not None}
    update["environments"] = {name: base / prefix for name, prefix in config.environments.items()}
    return config.model_copy(update=update)


def read_token(path: Path) -> str:
    """The word in a token file. Raises ConfigError where it cannot be read, is too short, or others may read it."""
    try:
        token = path.read_text(encoding="utf-8").strip()
        mode = path.stat().st_mode
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError([f"token_file {path}: cannot be read ({e}): `rotator agent certs` makes one"]) from None
    if len(token) < TOKEN_CHARS_MIN or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError([f"token_file {path}: give one word of at least {TOKEN_CHARS_MIN} characters"])
    if mode & 0o007:
        raise ConfigError([f"token_file {path}: everybody may read it: chmod 640 (or 600) {path}"])
    return token
