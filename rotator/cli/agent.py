"""``rotator agent``: run this machine's agent, and make the certificates that service and agents know each other by."""

import re
from pathlib import Path
from typing import Annotated

import typer

from rotator.cli.errors import PROBLEM, USAGE, fail
from rotator.config import ConfigError
from rotator.config_nodes import NODE_NAME

agent_app = typer.Typer(
    help="The agent of a machine with GPUs that a service elsewhere rotates.", rich_markup_mode=None
)


@agent_app.callback(invoke_without_command=True)
def agent(
    context: typer.Context,
    path: Annotated[Path, typer.Option("--config", "-c", help="the agent's file")] = Path("agent.yaml"),
) -> None:
    """Run the agent until SIGTERM, or one of the commands below."""
    if context.invoked_subcommand is not None:
        return
    from rotator.agent.run import serve  # imports every part: other commands start quicker without

    try:
        code = serve(path)
    except ConfigError as e:
        fail(PROBLEM, *e.problems)
    raise typer.Exit(code)


@agent_app.command()
def certs(
    node: Annotated[
        list[str] | None,
        typer.Option(help="NAME=HOST[,HOST...]: a node and the names or addresses at which its agent is reached"),
    ] = None,
    out: Annotated[Path, typer.Option(help="folder to keep them in")] = Path("tls"),
    renew: Annotated[bool, typer.Option("--renew", help="make all but the authority and the token anew")] = False,
) -> None:
    """Make an authority, certificates for the service and each node, and a token. What exists is kept."""
    from rotator.agent.certs import make

    try:
        written = make(out, dict(_node(word) for word in node or ()), renew=renew)
    except ConfigError as e:
        fail(PROBLEM, *e.problems)
    for path in written:
        typer.echo(path)
    typer.echo(
        "service: ca.pem, service.pem, service.key, token; each agent: ca.pem, <node>.pem, <node>.key, token; "
        "ca.key stays where it is safe"
    )


def _node(word: str) -> tuple[str, list[str]]:
    name, _, hosts = word.partition("=")
    if not re.fullmatch(NODE_NAME, name) or name in ("ca", "service", "token") or not all(hosts.split(",")):
        fail(USAGE, f"--node {word}: give NAME=HOST[,HOST...], as gpu2=10.0.0.2")
    return name, hosts.split(",")
