"""The page's sections as HTML, made from what the model holds. Pure: the same look gives the same text."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rotator.web.page.swaps import PHASES, SwapLine
from rotator.web.page.text import (
    FOREIGN_COLOR,
    GIB,
    MOVING,
    badge,
    bar,
    clock,
    esc,
    gib,
    residency,
    seconds,
    since,
    swatch,
    table,
    until,
    words,
)

Look = Mapping[str, Any]
QUEUE_SHOWN = 50
SWAPS_SHOWN = 20
_SAME_S = 60.0
EMPTY = '<p class="empty">{}</p>'
_DEVICE, _HOST = "var(--accent)", "var(--calm)"


def status(look: Look, reachable: bool) -> str:
    if not reachable:
        return badge("not ready", "service") + '<span class="dim">the service does not answer</span>'
    readiness, info = look["readiness"], look["info"]
    told = "".join(f'<span class="dim">{esc(r)}</span>' for r in readiness["reasons"])
    word = badge("ready" if readiness["ready"] else "not ready", "service")
    return f'{word}<span class="dim">v{esc(info["version"])} · up {since(info["started_at"])}</span>{told}'


def alarms(look: Look) -> int:
    """What wants a person's look now."""
    who = {e["name"] for e in look["engines"] if e["state"] in ("failed", "quarantined")}
    who |= {g["id"] for g in look["gpus"] if g["health"] == "unknown"}
    who |= {i["engine"] or i["gpu"] or i["id"] for i in look["incidents"] if i["closed_wall_s"] is None}
    return len(who)


def tiles(look: Look) -> str:
    engines, host = look["engines"], look["info"]["host_memory"]
    awake = sum(e["state"] == "awake" for e in engines)
    moving = sum(e["state"] in MOVING for e in engines)
    frozen = sum(e["frozen"] for e in engines)
    used = sum(g["used_bytes"] or 0 for g in look["gpus"])
    total = sum(g["total_bytes"] for g in look["gpus"])
    cells = [
        ("Awake", f"{awake}", f"of {len(engines)} engines" + (f", {moving} moving" if moving else "")),
        ("Waiting", f"{look['queue_length']}", "requests in line"),
        ("In flight", f"{sum(e['in_flight'] for e in engines)}", f"requests, {frozen} frozen"),
        ("VRAM", f"{gib(used)}", f"of {gib(total)} GiB"),
        ("Host RAM", f"{gib(host['masters_bytes'])}", f"of {gib(host['budget_bytes'])} GiB for masters"),
        ("Alerts", f"{alarms(look)}", "engines or GPUs"),
    ]
    bad = ' class="alarm"' if alarms(look) else ""
    return (
        "<dl>"
        + "".join(
            f"<div{bad if name == 'Alerts' else ''}><dt>{name}</dt><dd><b>{value}</b> <span>{more}</span></dd></div>"
            for name, value, more in cells
        )
        + "</dl>"
    )


# -- engines ---------------------------------------------------------------------------------------------------------


def engine_name(e: Look, color: str) -> str:
    aliases = f'<span class="dim"> {esc(", ".join(e["aliases"]))}</span>' if e["aliases"] else ""
    tags = '<span class="tag">pinned</span>' if e["pinned"] else ""
    if e["held_by"]:
        tags += f'<span class="tag">held: {esc(e["held_by"])}</span>'
    gpus = ", ".join(map(str, e["gpu_indices"]))
    place = f"GPU {gpus}" if len(e["gpu_indices"]) == 1 else f"GPUs {gpus}"
    return (
        f'<div class="name">{swatch(color)}<b>{esc(e["name"])}</b>{aliases}{tags}</div><div class="dim">{place}</div>'
    )


def engine_state(e: Look, progress: Look | None) -> str:
    bad = e["state"] in ("failed", "quarantined") or (e["state"] == "stopping" and e["failures"])
    why = f'<div class="{"why bad" if bad else "why"}">{esc(e["reason"])}</div>' if e["reason"] else ""
    why += "".join(f'<div class="why warn-text">{esc(note)}</div>' for note in e["notes"])
    retry = f'<div class="why">again {until(e["retry_at_wall_s"])}</div>' if e["retry_at_wall_s"] else ""
    told = f"{since(e['since_wall_s'])} · canary {esc(e['canary'])}"
    done = _progress(progress) if progress and e["state"] in MOVING else ""
    return f'<div>{badge(e["state"])} <span class="dim">{told}</span></div>{done}{why}{retry}'


def _progress(told: Look) -> str:
    done, total, eta_s = told.get("done_bytes"), told.get("total_bytes"), told.get("eta_s")
    size = f"{gib(done)} of {gib(total)} GiB" if done is not None and total else ""
    left = f"{seconds(eta_s)} left" if eta_s is not None else ""
    drawn = bar([(_DEVICE, float(done or 0))], float(total)) if size and total else ""
    return f'<div class="mem">{drawn}<span>{" · ".join(t for t in (size, left) if t)}</span></div>'


def engine_memory(e: Look) -> str:
    held, awake, rest = sum(e["held_bytes"]), sum(e["awake_bytes"]), sum(e["residue_bytes"])
    known = "" if e["footprint_measured"] else " (planned)"
    return (
        f'<div class="mem"><span>{residency(e)}</span>{bar([(_DEVICE, held)], awake)}'
        f"<span>{gib(held)} GiB</span></div>"
        f'<div class="dim">awake {gib(awake)} · asleep {gib(rest)} · host {gib(e["host_bytes"])} GiB{known}</div>'
    )


def engine_work(e: Look) -> str:
    frozen = f", {e['frozen']} frozen" if e["frozen"] else ""
    eta = "now" if e["eta_s"] == 0 else seconds(e["eta_s"])
    return (
        f"<div><b>{e['in_flight']}</b> in flight{frozen} · <b>{e['waiting']}</b> waiting</div>"
        f'<div class="dim">serves {"" if e["eta_s"] == 0 else "in "}{eta} · wake {seconds(e["wake_s"])}'
        f" · sleep {seconds(e['sleep_s'])}</div>"
    )


# -- GPUs and host ---------------------------------------------------------------------------------------------------


def gpu_head(g: Look, colors: Mapping[str, str]) -> str:
    parts = [(colors.get(name, FOREIGN_COLOR), float(size)) for name, size in g["by_engine"].items()]
    parts.append((FOREIGN_COLOR, float(g["foreign_bytes"])))
    why = f'<div class="why bad">{esc(g["reason"])}</div>' if g["reason"] else ""
    swap = ' · <span class="warn-text">swap under way</span>' if g["claimed_by"] else ""
    return (
        f'<div class="gpu-head"><h3>{gpu_title(g)}</h3>{badge(g["health"], "health")}'
        f'<span class="dim grow" title="{esc(g["name"])}">{esc(g["name"].removeprefix("NVIDIA "))}{swap}</span>'
        f'<span class="num"><b>{gib(g["used_bytes"])}</b> of {gib(g["total_bytes"])} GiB</span></div>'
        f"{bar(parts, g['total_bytes'])}{why}"
    )


def gpu_title(g: Look) -> str:
    """Its number, and its machine where the fleet has several."""
    node, several, _ = g["id"].rpartition("/")
    return esc(f"{node} GPU {g['index']}" if several else f"GPU {g['index']}")


def legend(look: Look, colors: Mapping[str, str]) -> str:
    names = [f"<span>{swatch(colors[e['name']])}{esc(e['name'])}</span>" for e in look["engines"]]
    names.append(f"<span>{swatch(FOREIGN_COLOR)}foreign processes</span>")
    names.append('<span><i class="swatch reserve"></i>reserve</span>')
    return f'<div class="legend" aria-hidden="true">{"".join(names)}</div>'


def gpu_table(g: Look, curves: Mapping[str, Sequence[float | None]], span: str) -> str:
    """The chart in words: who holds what now, and between what and what it was."""
    rows = []
    now = {**g["by_engine"], "(foreign)": g["foreign_bytes"]}
    for name, size in now.items():
        seen = [v for v in curves.get(name, ()) if v is not None] or [size / (1 << 30)]
        label = "foreign processes" if name == "(foreign)" else name
        rows.append((esc(label), gib(size), f"{min(seen):.1f}", f"{max(seen):.1f}"))
    rows.append(("reserve", gib(g["reserve_bytes"]), "", ""))
    columns = ("holder", "now GiB#", f"least in {span}#", f"most in {span}#")
    return table(f"VRAM of GPU {g['index']}", columns, rows)


def host(look: Look, colors: Mapping[str, str]) -> str:
    memory = look["info"]["host_memory"]
    masters = [(e["name"], e["masters_bytes"]) for e in look["engines"] if e["masters_bytes"]]
    parts = bar([(colors[name], float(size)) for name, size in masters], memory["budget_bytes"])
    each = ", ".join(f"{swatch(colors[n])}{esc(n)} {gib(s)} GiB" for n, s in masters) or "no masters are kept"
    return (
        '<div class="gpu-head"><h3>Host RAM</h3><span class="dim grow">masters of weights</span>'
        f'<span class="num"><b>{gib(memory["masters_bytes"])}</b> of {gib(memory["budget_bytes"])} GiB</span></div>'
        f'{parts}<div class="dim each">{each}</div>'
    )


# -- queue and swaps -------------------------------------------------------------------------------------------------


def queue(look: Look) -> str:
    if not look["queue"]:
        return EMPTY.format("Nobody waits.")
    now = look["wall_s"]
    rows = [
        (
            f"<code>{esc(q['id'])}</code>",
            esc(q["model"]),
            esc(q["engine"]),
            since(now - q["waited_s"]),
            "now" if q["eta_s"] == 0 else seconds(q["eta_s"]),
            seconds(q["deadline_in_s"]),
        )
        for q in look["queue"][:QUEUE_SHOWN]
    ]
    rest = look["queue_length"] - len(rows)
    more = f'<p class="dim">and {rest} more</p>' if rest > 0 else ""
    return table("Requests that wait", ("request", "model", "engine", "waits#", "ETA#", "gives up in#"), rows) + more


def swap_list(lines: Sequence[SwapLine]) -> str:
    if not lines:
        return EMPTY.format("No swap yet.")
    return f'<ol class="swaps">{"".join(map(_swap, lines[:SWAPS_SHOWN]))}</ol>'


def _swap(line: SwapLine) -> str:
    word = {"ok": "ok", "open": "under way"}.get(line.result, line.result)
    took = seconds(line.total_s) if line.result != "open" else since(line.begun_wall_s)
    bad = "bad" if line.result == "failed" else "warn-text"
    error = f'<div class="why {bad}">{esc(line.error)}</div>' if line.error else ""
    return (
        f'<li class="{esc(line.result)}"><div class="swap-head"><span class="dim">{clock(line.begun_wall_s)}</span>'
        f"{badge(word, 'result')}<span class='grow'>{_who(line)}</span><span class='num'>{took}</span></div>"
        f"{_phases(line)}{error}<div class='dim'>{esc(line.reason)}</div></li>"
    )


def _who(line: SwapLine) -> str:
    gives = ", ".join(f"<b>{esc(name)}</b> {_GOES.get(action, esc(action))}" for name, action in line.evicts)
    takes = f"<b>{esc(line.admit)}</b> {_COMES[line.admit_action]}" if line.admit else ""
    return " → ".join(part for part in (gives, takes) if part)


_GOES = {"sleep": "sleeps", "stop": "stops", "sink": "sinks deeper"}
_COMES = {"wake": "wakes", "start": "starts"}


def _phases(line: SwapLine) -> str:
    known = [(p, line.phases_s[p]) for p in PHASES if p in line.phases_s]
    total = sum(s for _, s in known)
    if not total:
        return ""
    cells = "".join(f'<i class="ph-{p}" style="width:{100 * s / total:.2f}%"></i>' for p, s in known)
    said = "".join(f'<span><i class="swatch ph-{p}"></i>{p} {seconds(s)}</span>' for p, s in known)
    return f'<span class="bar" aria-hidden="true">{cells}</span><div class="phases dim">{said}{_moved(line)}</div>'


def _moved(line: SwapLine) -> str:
    """A rate only of what was loaded: a sleep may free bytes that it need not copy."""
    told = f"<span>freed {gib(line.freed_bytes)} GiB</span>" if line.freed_bytes else ""
    if line.taken_bytes:
        took = line.phases_s.get("wake")
        rate = f" at {line.taken_bytes / GIB / took:.0f} GiB/s" if took and took > 0.001 else ""
        told += f"<span>loaded {gib(line.taken_bytes)} GiB{rate}</span>"
    return told


# -- plan, calendar, incidents ---------------------------------------------------------------------------------------


def plan(view: Look, of: str) -> str:
    steps = []
    for swap in view["swaps"]:
        steps += [_step(step) for step in (*swap["evict"], swap["admit"]) if step]
        steps.append(f'<li class="dim">{esc(swap["reason"])}</li>')
    for blocked in view["blocked"]:
        until_s = blocked["until_in_s"]
        again = f", looked at again in {seconds(until_s)}" if until_s is not None else ""
        steps.append(
            f"<li><b>{esc(blocked['engine'])} waits</b> "
            f'<span class="dim">{esc(words(str(blocked["kind"])))}{again}</span>'
            f'<div class="why">{esc(blocked["reason"])}</div></li>'
        )
    body = f'<ol class="plan">{"".join(steps)}</ol>' if steps else EMPTY.format("Nothing to do.")
    return f'<p class="dim">{esc(of)}: carried out by nobody.</p>{body}'


def _step(step: Look) -> str:
    return (
        f"<li><b>{esc(words(str(step['action'])))} {esc(step['engine'])}</b> "
        f'<span class="dim">about {seconds(step["expected_s"])}</span>'
        f'<div class="why">{esc(step["reason"])}</div></li>'
    )


def calendar(look: Look) -> str:
    view = look["calendar"]
    entries = sorted([*view["windows"], *view["reservations"]], key=lambda e: float(e["begins_wall_s"]))
    defaults = view["default_engines"]
    told = f'<p class="dim">Returns to {esc(", ".join(defaults))} when nothing else is wanted.</p>' if defaults else ""
    if not entries:
        return EMPTY.format("No windows and no reservations.") + told
    rows = [
        (
            esc(f"window {e['name']}" if e["id"] is None else f"reservation {e['id']}")
            + (f'<div class="dim">{esc(e["note"])}</div>' if e["note"] else ""),
            esc(", ".join(e["engines"])),
            esc(e["begins"]),
            esc(e["ends"]),
            badge("ok", "state").replace(">ok<", ">in force<") if e["in_force"] else '<span class="dim">to come</span>',
        )
        for e in entries
    ]
    zone = f'<p class="dim">Times in {esc(view["timezone"])}.</p>'
    return table("Calendar", ("what", "engines", "from", "until", "state"), rows) + zone + told


def incidents(kept: Sequence[Look], events: Iterable[Look]) -> str:
    """The watchdog's incidents, which outlive the service, and what else happened since it began; newest first."""
    rows = [(i["opened_wall_s"], _incident(i)) for i in kept]
    rows += [(e["at_wall_s"], _alarm(e)) for e in events if not any(_is_told_by(i, e) for i in kept)]
    rows.sort(key=lambda r: -float(r[0]))
    if not rows:
        return EMPTY.format("None since the service began.")
    return f'<ol class="swaps incidents">{"".join(text for _, text in rows)}</ol>'


def _is_told_by(incident: Look, event: Look) -> bool:
    """An engine's end is an event, too: once is enough."""
    near = abs(event["at_wall_s"] - incident["opened_wall_s"]) < _SAME_S
    return near and event["engine"] is not None and event["engine"] == incident["engine"]


def _alarm(e: Look) -> str:
    data = e["data"]
    who = e["engine"] or data.get("gpu") or "service"
    why = data.get("reason") or data.get("error") or ""
    return _entry(e["at_wall_s"], who, e["kind"], "", f'<div class="why">{esc(why)}</div>')


def _incident(i: Look) -> str:
    ended = i["closed_wall_s"] is not None
    word = badge("closed" if ended else i["severity"], "incident")
    lines = [("why", i["reason"]), ("dim", i["action"]), ("why bad" if not ended else "dim", i["advice"])]
    lines.append(("dim", f"ended: {i['outcome']}" if i["outcome"] else ""))
    body = "".join(f'<div class="{style}">{esc(text)}</div>' for style, text in lines if text)
    return _entry(i["opened_wall_s"], i["engine"] or i["gpu"] or "service", i["kind"], word, body)


def _entry(at_wall_s: float, who: str, kind: str, word: str, body: str) -> str:
    return (
        f'<li><div class="swap-head"><span class="dim">{clock(at_wall_s)}</span>{word}<b class="grow">{esc(who)}</b>'
        f'<span class="tag">{esc(kind)}</span></div>{body}</li>'
    )
