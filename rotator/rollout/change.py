"""What a target file changes of the fleet, and the fleet file between: some engines new, the others as before."""

import json
from collections.abc import Collection, Mapping
from typing import Any

import yaml

from rotator.config import EngineConfig, FleetConfig
from rotator.config_diff import describe_changes

# What makes a version. Where an engine is (GPUs, port, launcher) is no version, and is no matter of one engine alone.
VERSIONED = frozenset({"command", "env", "workdir", "job", "overlay_manifest", "model_path"})


def changed(old: FleetConfig, new: FleetConfig) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
    """(engine -> the fields of it that differ, what a rollout does not do, a line each)."""
    differences = describe_changes(old, new)
    problems = [f"engine '{n}': added" for n in differences.added] + [
        f"engine '{n}': removed" for n in differences.removed
    ]
    before = {e.name: e for e in old.engines}
    found: dict[str, tuple[str, ...]] = {}
    for engine in new.engines:
        fields = _fields(before.get(engine.name, engine), engine)
        if not fields:
            continue
        found[engine.name] = fields
        problems += [f"engine '{engine.name}'.{f}: changed" for f in fields if f not in VERSIONED]
        if before[engine.name].spec_hash() == engine.spec_hash():
            said = " and ".join(fields)
            problems.append(f"engine '{engine.name}': only {said} differs, so nothing would be started otherwise")
    own = {f"engine '{name}'" for name in found}
    lines = (*differences.live_applied, *differences.service_restart_needed)
    problems += [line for line in lines if line.split(".")[0] not in own]
    return found, tuple(problems)


def _load(text: str) -> Any:
    # The C loader where it is there: the same values, many times faster.
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def _fields(old: EngineConfig, new: EngineConfig) -> tuple[str, ...]:
    return tuple(f for f in EngineConfig.model_fields if getattr(old, f) != getattr(new, f))


def compose(present: str, target: str, engines: Collection[str]) -> str:
    """The present file's text with the sections of ``engines`` as the target has them.

    Sections are exchanged in the text, so that everything else stays as it was written; where a file is written in a
    way that does not allow that (anchors across sections), the whole is written anew. All of the target's text once
    nothing of the present one is left."""
    old, new = _load(present), _load(target)
    sections = {e["name"]: e for e in new["engines"]}
    wanted = {**old, "engines": [sections[e["name"]] if e["name"] in engines else e for e in old["engines"]]}
    for text in (*([present] if wanted == old else []), *([target] if wanted == new else [])):
        return text
    for text in (
        _spliced(present, {name: raw for name, raw in _slices(target).items() if name in engines}),
        _spliced(present, {name: json.dumps(sections[name]) + "\n" for name in engines}),
    ):
        if _reads_as(text, wanted):
            return text
    return yaml.safe_dump(wanted, sort_keys=False, width=120)


def with_site(present: str, engines: Mapping[str, str]) -> str:
    """The present file where the jobs of ``engines`` come from another site file each."""
    data = _load(present)
    for engine in data["engines"]:
        if engine["name"] in engines:
            engine["job"] = {**engine["job"], "site": engines[engine["name"]]}
    return yaml.safe_dump(data, sort_keys=False, width=120)


def _nodes(text: str) -> dict[str, yaml.Node]:
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    for key, value in root.value if isinstance(root, yaml.MappingNode) else ():
        if key.value == "engines" and isinstance(value, yaml.SequenceNode):
            return {_name(node): node for node in value.value}
    return {}


def _name(node: yaml.Node) -> str:
    pairs = node.value if isinstance(node, yaml.MappingNode) else ()
    return next((str(value.value) for key, value in pairs if key.value == "name"), "")


def _slices(text: str) -> dict[str, str]:
    return {name: text[node.start_mark.index : node.end_mark.index] for name, node in _nodes(text).items()}


def _spliced(text: str, sections: Mapping[str, str]) -> str:
    places = [
        (n.start_mark.index, n.end_mark.index, sections[name]) for name, n in _nodes(text).items() if name in sections
    ]
    for start, end, section in sorted(places, reverse=True):
        # A block's end is where the next one begins: its indentation belongs to that one.
        tail = text[start:end]
        kept = tail[len(tail.rstrip()) :] if tail.rstrip() != tail else ""
        text = text[:start] + section.rstrip() + kept + text[end:]
    return text


def _reads_as(text: str, wanted: Any) -> bool:
    try:
        return bool(_load(text) == wanted)
    except yaml.YAMLError:
        return False
