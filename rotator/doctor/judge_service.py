"""Judgements of what the service stands on: ports, the ledger, Nomad, the other nodes. No I/O."""

from collections.abc import Iterator

from rotator.config import GIB
from rotator.core.placement import gib
from rotator.doctor.facts import Facts, LedgerFacts, NomadFacts, NomadNode, Port
from rotator.doctor.findings import Finding, Repair, RepairKind, broken, note, risk

FREE_MIN_BYTES = GIB
_SAME = ("nvidia driver", "vllm", "torch", "nccl", "flashinfer", "deep_gemm", "rotator")


# -- network -----------------------------------------------------------------------------------------------------------


def judge_network(facts: Facts) -> Iterator[Finding]:
    """The ports that the service and its engines listen on are theirs."""
    if facts.ports is None:
        return
    serving = facts.ports.service_pid is not None
    for port in facts.ports.ports:
        if port.holder is None or port.holder_engine == port.of:
            continue  # free, or its own
        if port.of == "bind":
            if not serving:
                yield broken(
                    "network.bind",
                    f"port {port.port} of the service is taken",
                    f"held by {port.holder}, and no service holds the ledger",
                    f"`sudo ss -ltnp 'sport = :{port.port}'` tells who; stop that, or change bind.port",
                )
            continue
        yield _taken(port, serving)


def _taken(port: Port, serving: bool) -> Finding:
    what = f"port {port.port} of engine '{port.of}' is taken by another"
    if port.kept and not serving:
        return broken(
            "network.kept-port",
            what,
            f"held by {port.holder}; the ledger keeps the port for the engine",
            "let go of it, and the next start gets another: `rotator doctor --fix`",
            engine=port.of,
            repair=Repair(RepairKind.FORGET_PORT, port.of, f"let go of port {port.port}, kept for engine '{port.of}'"),
            stops_launch=True,
        )
    fix = f"`sudo ss -ltnp 'sport = :{port.port}'` tells who; stop that, or change 'port' of engine '{port.of}'"
    return broken("network.port", what, f"held by {port.holder}", fix, engine=port.of, stops_launch=True)


# -- ledger ------------------------------------------------------------------------------------------------------------


def judge_ledger(facts: Facts) -> Iterator[Finding]:
    """It is whole, of a schema that this release knows, and has room."""
    ledger = facts.ledger
    if ledger is None:
        return
    for folder, problem in ledger.folders:
        missing = problem == "missing"
        yield (risk if missing else broken)(
            "ledger.folder",
            f"{folder} {'does not exist yet' if missing else 'cannot be used'}",
            problem,
            f"`mkdir -p {folder}`" if missing else f"`sudo chown -R $(id -un) {folder}`, or change state_dir",
            repair=Repair(RepairKind.MAKE_DIRECTORY, folder, f"make {folder}") if missing else None,
        )
    if ledger.free_bytes is not None and ledger.free_bytes < FREE_MIN_BYTES:
        yield (broken if ledger.free_bytes < FREE_MIN_BYTES // 16 else risk)(
            "ledger.space",
            f"{gib(ledger.free_bytes)} are left on the disk of the ledger: without room no transition starts",
            ledger.place,
            "make room (old logs, incident bundles), or lower ledger.retention_days and devices.sample_retention_h",
        )
    if ledger.is_file and ledger.exists:
        yield from _file(ledger)
    elif not ledger.is_file and ledger.unreadable:
        fix = "start that database, or leave ledger.url out"
        yield broken("ledger.unreachable", "the ledger's database does not open", ledger.unreadable, fix)


def _file(ledger: LedgerFacts) -> Iterator[Finding]:
    restore = (
        "stop the service, then `rotator ledger-restore BACKUP`; "
        f"without a backup move {ledger.place} away: a new one is begun"
    )
    if ledger.unreadable or ledger.damage:
        evidence = ledger.unreadable or f"PRAGMA quick_check: {'; '.join(ledger.damage[:3])}"
        yield broken("ledger.damaged", "the ledger is damaged", f"{ledger.place}: {evidence}", restore)
    elif not ledger.schema_known:
        yield broken(
            "ledger.newer",
            f"the ledger is of a newer rotator (schema {ledger.schema}, this one knows up to {ledger.schema_head})",
            ledger.place,
            "upgrade rotator again, or `rotator ledger-restore` a backup from before the upgrade",
        )
    elif ledger.schema and ledger.schema != ledger.schema_head:
        yield note(
            "ledger.older",
            f"the ledger is of an older release (schema {ledger.schema}): the next start brings it to "
            f"{ledger.schema_head}",
            ledger.place,
            "`rotator ledger-backup ledger-before-upgrade.db` first: an older rotator cannot read it afterwards",
        )


# -- Nomad -------------------------------------------------------------------------------------------------------------


def judge_nomad(facts: Facts) -> Iterator[Finding]:
    """It answers, and its clients allow what engine jobs need."""
    nomad = facts.nomad
    if nomad is None:
        return
    if nomad.error:
        fix = "start it, or correct section 'nomad' of the fleet file (or NOMAD_ADDR, NOMAD_TOKEN)"
        yield broken("nomad.unreachable", f"Nomad at {nomad.address} does not answer", nomad.error, fix)
        return
    if not nomad.nodes:
        yield broken("nomad.no-clients", "Nomad has no client", nomad.address, "start one: `nomad agent -client …`")
    for node in nomad.nodes:
        yield from _client(node, nomad)
    for engine, lines, trouble in nomad.drifts:
        if trouble:
            what = f"engine '{engine}': no job can be made from its recipe"
            yield risk("nomad.job", what, trouble, "`rotator jobs lint` and `rotator jobs render`", engine=engine)
        elif lines:
            what = f"engine '{engine}' is registered otherwise than its recipe and site say"
            fix = f"`rotator jobs diff {engine}`; `rotator jobs run {engine}` brings it in, or correct the site file"
            yield risk("nomad.drift", what, "; ".join(lines[:5]), fix, engine=engine)


def _client(node: NomadNode, nomad: NomadFacts) -> Iterator[Finding]:
    if node.status != "ready" or not node.eligible:
        state = node.status if node.status != "ready" else "not eligible for new work"
        fix = f"`nomad node status {node.id[:8]}`, then `nomad node eligibility -enable {node.id[:8]}`"
        yield risk("nomad.client", f"Nomad's client {node.name} is {state}", f"node {node.id[:8]}", fix)
        return
    where = "the client's configuration"
    lacking = []
    if not node.docker:
        lacking.append(
            ("the docker driver is not healthy", f"start docker there; `nomad node status -verbose {node.id[:8]}`")
        )
    if node.docker and node.volumes is False:
        lacking.append(
            (
                "docker may not mount host paths",
                f'plugin "docker" {{ config {{ volumes {{ enabled = true }} }} }} in {where}',
            )
        )
    if node.docker and node.runtimes and "nvidia" not in node.runtimes:
        lacking.append(
            ("docker has no runtime nvidia", "`sudo nvidia-ctk runtime configure --runtime=docker`, restart docker")
        )
    if "loopback" not in node.host_networks:
        lacking.append(
            ("it has no host network 'loopback'", f'host_network "loopback" {{ interface = "lo" }} in {where}')
        )
    for what, fix in lacking:
        yield risk("nomad.settings", f"Nomad's client {node.name}: {what}", f"node {node.id[:8]}'s attributes", fix)
    longest = node.max_kill_timeout_s
    if longest is not None and longest < nomad.stop_grace_s:
        yield risk(
            "nomad.kill-timeout",
            f"Nomad's client {node.name} kills after {longest:g} s, and engines may take {nomad.stop_grace_s:g} "
            "s to stop",
            f"max_kill_timeout of node {node.id[:8]}",
            f'max_kill_timeout = "{nomad.stop_grace_s:g}s" in {where}, restart the client',
        )


# -- nodes -------------------------------------------------------------------------------------------------------------


def judge_nodes(facts: Facts) -> Iterator[Finding]:
    """Every node's agent answers, and packages that ranks share are of one version everywhere."""
    nodes = facts.nodes
    if nodes is None:
        return
    for node, error in nodes.errors.items():
        fix = f"start its agent on {node} (`rotator agent`), and check section 'nodes' of the fleet file"
        yield broken("nodes.unreachable", f"the agent of node {node} does not answer", error, fix)
    for package in dict.fromkeys(p for known in nodes.versions.values() for p in known):
        found = {node: known.get(package, "none") for node, known in nodes.versions.items()}
        if len(set(found.values())) < 2:
            continue
        shared = any(word in package.lower() for word in _SAME)
        yield (broken if "nccl" in package.lower() else risk if shared else note)(
            "nodes.versions",
            f"{package} differs between nodes: ranks of one engine must not",
            ", ".join(f"{node}: {version}" for node, version in sorted(found.items())),
            "bring all nodes to one image or one lock file, then restart the engines that span them",
        )
