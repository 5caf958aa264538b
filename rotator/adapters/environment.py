"""What an engine's process sees of the environment: a known part of the service's own, then the configuration's, then
the marks. The rest stays behind, for the service's environment may hold keys that no engine needs."""

from collections.abc import Mapping
from types import MappingProxyType

from rotator.adapters.proctable import ENGINE_MARK, SERVICE_MARK
from rotator.ports import LaunchSpec

# One paragraph a reason: where programs, homes and libraries are; languages and clocks; virtual environments;
# certificates of a company's proxy; the box of the simulated driver, found as a library is found.
INHERITED = """
PATH HOME USER LOGNAME SHELL TMPDIR LD_LIBRARY_PATH LD_PRELOAD
LANG LANGUAGE TZ TERM
VIRTUAL_ENV CONDA_PREFIX
SSL_CERT_FILE SSL_CERT_DIR REQUESTS_CA_BUNDLE CURL_CA_BUNDLE
ROTATOR_SIM_BOX
"""
INHERITED_PREFIXES = """
LC_ XDG_
CUDA NVIDIA_ NCCL_ GLOO_ UCX_ NVSHMEM_
VLLM_ HF_ HUGGINGFACE_ TRANSFORMERS_ TORCH PYTORCH_ TRITON_ FLASHINFER_ DG_ LMCACHE_
OMP_ MKL_ OPENBLAS_ NUMBA_ RAY_
"""
INHERITED_ANY_CASE = "http_proxy https_proxy no_proxy all_proxy"

# A process title set by an engine would overwrite the marks that the kernel shows; buffered output is lost in a crash.
DEFAULTS = {"SPT_NOENV": "1", "PYTHONUNBUFFERED": "1"}


def engine_environment(
    own: Mapping[str, str], spec: LaunchSpec, service_id: str, defaults: Mapping[str, str] = MappingProxyType({})
) -> dict[str, str]:
    """The whole environment of an engine; the configuration overrides ``defaults``, but not the marks."""
    inherited = {name: value for name, value in own.items() if is_inherited(name)}
    return {**inherited, **DEFAULTS, **defaults, **spec.env, ENGINE_MARK: spec.engine, SERVICE_MARK: service_id}


def is_inherited(name: str) -> bool:
    return (
        name in INHERITED.split()
        or name.startswith(tuple(INHERITED_PREFIXES.split()))
        or name.lower() in INHERITED_ANY_CASE.split()
    )
