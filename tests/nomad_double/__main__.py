"""`python -m tests.nomad_double FOLDER [PORT]`: a Nomad to play with, until Ctrl-C. Its raw_exec tasks run."""

import asyncio
import sys
from pathlib import Path

from tests.nomad_double import NomadDouble


async def main(folder: Path, port: int) -> None:
    async with NomadDouble(folder, port=port) as nomad:
        print(f"export NOMAD_ADDR={nomad.address}", flush=True)
        try:
            await asyncio.Event().wait()
        finally:
            for violation in nomad.violations:
                print(f"a real Nomad would not have understood: {violation}", file=sys.stderr)
            nomad.violations.clear()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0))
