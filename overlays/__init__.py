"""Patched vLLM files as read-only mounts: built beside an installation, never into it.

Knows neither the service nor the allocator. `docs/overlays.md` tells how to use it, `overlays/patches` holds the
patches, one a file.
"""

__version__ = "0.1.0"
