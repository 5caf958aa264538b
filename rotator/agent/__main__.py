"""``python -m rotator.agent -c agent.yaml``: the agent without the command line around it, which is slower."""

import argparse
import sys
from pathlib import Path

from rotator.agent.run import serve
from rotator.config import ConfigError


def main() -> int:
    parser = argparse.ArgumentParser(prog="rotator.agent", description="Run this machine's agent until SIGTERM.")
    parser.add_argument("-c", "--config", type=Path, default=Path("agent.yaml"), help="the agent's file")
    try:
        return serve(parser.parse_args().config)
    except ConfigError as e:
        print("\n".join(f"rotator: {line}" for line in e.problems), file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
