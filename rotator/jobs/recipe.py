"""A recipe: how one model is served by vLLM, every value with where it is known from."""

import json
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, Self, TypeVar

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from pydantic import BaseModel, Field, model_validator

from rotator.config_base import Section
from rotator.jobs.files import jobs_folder, parse_as, read_text
from rotator.jobs.findings import JobsError

Arch = Literal["sm80", "sm89", "sm90", "sm100", "sm103", "sm120", "sm121"]
Family = Literal["deepseek-v4", "glm-5", "mimo-v2.5", "qwen3.6", "qwen3-vl", "qwen3-next", "gemma-4", "nemotron-omni"]
Quantization = Literal["none", "fp8", "nvfp4"]
Attention = Literal["full", "sliding", "sparse-mla", "hybrid"]
Value = bool | int | float | str | dict[str, Any] | list[str | int | float] | None

NAME = r"^[a-z0-9][a-z0-9._-]{0,63}$"
FLAG = Annotated[str, Field(pattern=r"^--?[A-Za-z0-9][A-Za-z0-9._-]*$")]
ENV_NAME = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
UNMEASURED = "not measured; "

T = TypeVar("T")


class Fact(Section, Generic[T]):
    """One value and where it is known from."""

    value: T
    source: str = Field(min_length=1, description="a key of 'sources', then detail; or 'not measured; …'")


class Setting(Section):
    """One argument or environment variable. true is a bare flag, null takes an earlier layer's away."""

    value: Value
    source: str = Field(min_length=1, description="a key of 'sources', then detail; or 'not measured; …'")
    why: str | None = Field(default=None, description="why it departs from what is usual")


class Layer(Section):
    """Arguments and environment variables; a later layer's win."""

    args: dict[FLAG, Setting] = Field(default={}, description="vLLM's flags; a mapping is passed as JSON, in one word")
    env: dict[ENV_NAME, Setting] = Field(default={})


class Gate(Layer):
    """A path that is off unless a site names it in 'gates'."""

    about: str
    needs: str | None = Field(default=None, description="what must be there before it is switched on")


class ArchLayer(Layer):
    """What an architecture adds, and whether it was seen to serve there."""

    seen: Fact[str] = Field(description="on what hardware it was seen to serve, by whom")
    gates: dict[str, Gate] = Field(default={})


class Profile(Layer):
    """One way to trade latency, throughput and context."""

    about: str


class Recipe(Section):
    """One model on vLLM."""

    name: str = Field(pattern=NAME)
    title: str
    family: Family
    sources: dict[str, str] = Field(min_length=1, description="short names of what the values are known from")
    model: Fact[str] = Field(description="its name on Hugging Face; a site says in which directory it lies")
    quantization: Fact[Quantization]
    attention: Fact[Attention] = Field(description="hybrid: with recurrent state (Mamba, gated delta networks)")
    multimodal: Fact[bool]
    weights_gib: Fact[float] = Field(description="weights of all ranks together, which is what masters take asleep")
    vllm: Fact[str] = Field(description="versions it needs, as a Python version specifier")
    tensor_parallel: Fact[int]
    pipeline_parallel: Fact[int] | None = None
    sleep_levels: Fact[list[Literal[1, 2]]]
    start_deadline_s: Fact[float] = Field(description="from the process to the first answer, at the worst")
    args: dict[FLAG, Setting] = Field(default={})
    env: dict[ENV_NAME, Setting] = Field(default={})
    arch: dict[Arch, ArchLayer] = Field(min_length=1)
    profiles: dict[str, Profile] = Field(default={})
    default_profile: str | None = None
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for place, source in _sources_in(self):
            if not source.startswith(UNMEASURED) and re.split(r"[\s,:;(]", source, maxsplit=1)[0] not in self.sources:
                raise ValueError(f"{place}: source '{source}' is no key of 'sources': name one, or '{UNMEASURED}…'")
        if self.default_profile is not None and self.default_profile not in self.profiles:
            raise ValueError(
                f"default_profile '{self.default_profile}' is no profile: name one of {list(self.profiles)}"
            )
        if self.profiles and self.default_profile is None:
            raise ValueError("there are profiles and no default_profile: name one")
        try:
            SpecifierSet(self.vllm.value)
        except InvalidSpecifier:
            raise ValueError(f"vllm: '{self.vllm.value}' is no version specifier: write it as '>=0.24'") from None
        return self

    def layers(self, arch: Arch, profile: str | None, gates: tuple[str, ...]) -> tuple[Layer, ...]:
        """The layers for one engine, weakest first. Raises JobsError for a profile or gate that is not there."""
        base = Layer(args=self.args, env=self.env)
        found: list[Layer] = [base]
        layer = self.arch.get(arch)
        found += [layer] if layer else []
        chosen = profile or self.default_profile
        if chosen is not None:
            found.append(_named(self.profiles, chosen, f"recipe '{self.name}' has no profile"))
        known = layer.gates if layer else {}
        found += [_named(known, gate, f"recipe '{self.name}' has on {arch} no gate") for gate in gates]
        return tuple(found)


def _named(those: Mapping[str, T], name: str, problem: str) -> T:
    if name not in those:
        raise JobsError(f"{problem} '{name}': name one of {', '.join(those) or 'none'}")
    return those[name]


def _sources_in(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Fact | Setting):
        yield place, value.source
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _sources_in(getattr(value, name), f"{place}.{name}".lstrip("."))
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _sources_in(inner, f"{place}.{name}")


def words(flag: str, value: Value) -> tuple[str, ...]:
    """One setting as words of a command line. JSON is one word: no shell ever takes it apart."""
    match value:
        case None | False:
            return ()
        case True:
            return (flag,)
        case dict():
            return (flag, json.dumps(value, sort_keys=True, separators=(",", ":")))
        case list():
            return (flag, *map(str, value))
    return (flag, str(value))


def env_word(value: Value) -> str | None:
    """One setting as an environment variable's text; None where it is taken away."""
    match value:
        case None:
            return None
        case bool():
            return "1" if value else "0"
        case dict() | list():
            return json.dumps(value, sort_keys=True, separators=(",", ":"))
    return str(value)


def load_recipe(name: str) -> Recipe:
    """A recipe of the catalogue by its name, or one's own by the path of its file. Raises JobsError."""
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = jobs_folder() / "catalogue" / f"{name}.yaml"
        if not path.is_file():
            known = ", ".join(p.stem for p in _catalogue_files())
            raise JobsError(f"recipe '{name}': is not in the catalogue: name one of {known}, or a file ending in .yaml")
    try:
        seen = path.stat()
    except OSError as e:
        raise JobsError(f"{path}: cannot be read ({e.strerror}): check the path") from None
    return _read(path, seen.st_mtime_ns, seen.st_size)


@lru_cache(maxsize=64)
def _read(path: Path, _mtime_ns: int, _size: int) -> Recipe:
    """One operation asks for a recipe several times: it is parsed again only when its file has changed."""
    return parse_as(Recipe, read_text(path), str(path))


def load_catalogue() -> dict[str, Recipe]:
    """Every recipe that is shipped, by name. Raises JobsError."""
    return {path.stem: load_recipe(path.stem) for path in _catalogue_files()}


def _catalogue_files() -> list[Path]:
    return sorted((jobs_folder() / "catalogue").glob("*.yaml"))
