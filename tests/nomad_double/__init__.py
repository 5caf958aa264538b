"""A Nomad double on a socket: strict about what it is asked, exact in what it answers, with engines as local processes.

    async with NomadDouble(folder) as nomad:
        ... nomad.address ...

Jobs are read by golden parses (kept by the hash of text and variables), else as ``jobspec`` understands them.
`python -m tests.nomad_double FOLDER` runs one to play with.

Leaving it fails if a client asked for something that no Nomad 2.0 understands: real ones ignore unknown keys silently.
"""

from tests.nomad_double.double import NomadDouble
from tests.nomad_double.golden import golden_key, var_text

__all__ = ["NomadDouble", "golden_key", "var_text"]
