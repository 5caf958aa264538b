"""A Nomad double on a socket: strict about what it is asked, exact in what it answers, with engines as local processes.

    async with NomadDouble(folder) as nomad:
        nomad.teach(hcl, variables, job)      # what Nomad would make of this text
        ... nomad.address ...

Leaving it fails if a client asked for something that no Nomad 2.0 understands: real ones ignore unknown keys silently.
"""

from tests.nomad_double.double import NomadDouble
from tests.nomad_double.golden import golden_key, var_text

__all__ = ["NomadDouble", "golden_key", "var_text"]
