"""Judgements of one engine's environment: its packages, its files, its command. No I/O."""

from collections.abc import Iterator, Mapping

from rotator.config import EngineConfig
from rotator.core.placement import gib
from rotator.doctor.facts import Facts, Launch, Model, Shard, Software, is_here
from rotator.doctor.findings import Finding, broken, note, risk

# Model types whose sparse-attention indexer calls DeepGEMM at run time (vLLM's `sparse_attn_indexer`; a build without
# it starts, loads for minutes and fails in the profile run).
_NEEDS_DEEP_GEMM = ("deepseek_v32", "deepseek_v4", "glm_moe_dsa")
DEEP_GEMM = ("deep_gemm", "vllm.third_party.deep_gemm")  # a package of its own, or what vLLM's wheel brings
_SHOWN_MAX = 5
_RESTORE = (
    "a package that is taken away takes its program along, and a backup of its files alone does not bring it back"
)


# -- software ----------------------------------------------------------------------------------------------------------


def judge_software(facts: Facts) -> Iterator[Finding]:
    """Is it a CUDA build, for this driver, with what the model needs; and does the known-broken table know better?"""
    driver_cuda = facts.gpus.cuda_driver if facts.gpus else None
    configs = {e.name: e for e in facts.engines}
    for seen in facts.software or ():
        yield from _torch(seen, driver_cuda)
        yield from _deep_gemm(seen)
        if (config := configs.get(seen.engine)) is not None:
            yield from _allocator(seen, config)
        for row in seen.known_broken:
            yield (broken if row.certain else risk)(
                "software.known-broken",
                f"engine '{seen.engine}': {row.says}",
                f"{_versions(seen)}; known-broken table: {row.name} ({row.source})",
                row.fix,
                engine=seen.engine,
                stops_launch=row.certain,
            )


def _torch(seen: Software, driver_cuda: tuple[int, int] | None) -> Iterator[Finding]:
    version = seen.packages.get("torch")
    if version is None or seen.torch_cuda is None:
        return
    if seen.torch_cuda == "":
        yield broken(
            "software.torch-cpu",
            f"engine '{seen.engine}': its torch {version} is a build without CUDA",
            f"{seen.prefix}: torch/version.py says cuda = None (an installer took it from PyPI's CPU index)",
            f"`uv pip install --python {seen.python} --reinstall torch=={version.partition('+')[0]} "
            "--extra-index-url https://download.pytorch.org/whl/cu130 --index-strategy unsafe-best-match`",
            engine=seen.engine,
            stops_launch=True,
        )
        return
    wanted = _numbers(seen.torch_cuda)
    if wanted and driver_cuda and wanted[0] > driver_cuda[0]:
        yield broken(
            "software.driver-too-old",
            f"engine '{seen.engine}': its torch is built for CUDA {seen.torch_cuda}, the driver runs up to "
            f"{driver_cuda[0]}.{driver_cuda[1]}",
            f"torch {version} in {seen.prefix}; NVML tells the driver's CUDA",
            f"install a driver for CUDA {wanted[0]}, or the torch of CUDA {driver_cuda[0]}; "
            f"cuda-compat-{wanted[0]} bridges it "
            "on data-centre GPUs",
            engine=seen.engine,
        )


def _deep_gemm(seen: Software) -> Iterator[Finding]:
    if seen.prefix and seen.model_type in _NEEDS_DEEP_GEMM and not seen.modules.intersection(DEEP_GEMM):
        yield broken(
            "software.deep-gemm",
            f"engine '{seen.engine}': its model ({seen.model_type}) needs DeepGEMM, which its environment lacks",
            f"neither {' nor '.join(DEEP_GEMM)} in {seen.prefix}; it would load for minutes and then fail",
            "`git clone --recursive https://github.com/deepseek-ai/DeepGEMM && "
            f"{seen.python} -m pip install --no-deps --no-build-isolation ./DeepGEMM`",
            engine=seen.engine,
            stops_launch=True,
        )


def _allocator(seen: Software, config: EngineConfig) -> Iterator[Finding]:
    """Flags of the fleet file that only rotator's allocator can honour."""
    flags = [f for f in ("elastic", "disk", "keeps_masters") if getattr(config, f)]
    if flags and seen.packages and "rotator" not in seen.packages:
        yield risk(
            "software.allocator",
            f"engine '{seen.engine}' counts on rotator's allocator ({', '.join(flags)}), which its environment lacks",
            f"no distribution 'rotator' in {seen.prefix}: stock vLLM would sleep, and free something else",
            f"`{seen.python} -m pip install rotator`, or take {' and '.join(flags)} out of the fleet file",
            engine=seen.engine,
        )


def _versions(seen: Software) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(seen.packages.items())) or "versions unknown"


def _numbers(text: str) -> tuple[int, int] | None:
    major, _, minor = text.partition(".")
    return (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else None


# -- files -------------------------------------------------------------------------------------------------------------


def judge_files(facts: Facts) -> Iterator[Finding]:
    """Model folders are whole, overlays hold what their manifest says."""
    files = facts.files
    if files is None:
        return
    for model in files.models:
        yield from _model(model)
    for overlay in files.overlays:
        if overlay.found != overlay.wanted:
            found = "is missing" if overlay.found is None else f"has sha256 {overlay.found[:16]}…"
            yield broken(
                "files.overlay",
                f"engine '{overlay.engine}': {overlay.path} of its overlay {found}, not what was built",
                f"the manifest of {overlay.overlay} says {overlay.wanted[:16]}…",
                "build the overlay again into a new folder, and name that one: an overlay is never edited",
                engine=overlay.engine,
                stops_launch=True,
            )
    for engine, manifest, problem in files.overlay_troubles:
        yield broken(
            "files.manifest",
            f"engine '{engine}': the manifest of its overlay cannot be used",
            f"{manifest}: {problem}",
            "build the overlay again (`python -m overlays build`), or take overlay_manifest out",
            engine=engine,
            stops_launch=True,
        )


def _model(model: Model) -> Iterator[Finding]:
    name = f"engine '{model.engine}'"
    if not model.exists:
        fix = f"download it to {model.path} (`hf download <model> --local-dir {model.path}`), or fix the path"
        what, evidence = f"{name}: its model is not there", model.trouble or f"{model.path} does not exist"
        yield broken("files.model-missing", what, evidence, fix, engine=model.engine, stops_launch=True)
        return
    again = f"`hf download <model> --local-dir {model.path}` goes on where it stopped"
    if bad := [_bad(s) for s in model.shards if _bad(s)]:
        more = f" and {len(bad) - _SHOWN_MAX} more" if len(bad) > _SHOWN_MAX else ""
        yield broken(
            "files.model-incomplete",
            f"{name}: {len(bad)} of {len(model.shards)} files of its weights are missing or cut off",
            f"{model.path}: {'; '.join(bad[:_SHOWN_MAX])}{more}",
            again,
            engine=model.engine,
            stops_launch=True,
        )
    if not model.has_config:
        what, evidence = f"{name}: its model has no config.json", f"{model.path} holds weights only"
        yield broken("files.model-config", what, evidence, again, engine=model.engine, stops_launch=True)
    if model.trouble:
        what = f"{name}: its model's index cannot be read"
        yield broken("files.model-index", what, model.trouble, again, engine=model.engine, stops_launch=True)
    if model.incomplete and not bad:
        shown = ", ".join(model.incomplete[:_SHOWN_MAX])
        what = f"{name}: a download into its model's folder was not finished"
        yield note("files.model-download", what, f"{model.path}: {shown}", again, engine=model.engine)
    if model.has_config and not model.has_tokenizer:
        what, evidence = f"{name}: its model's folder has no tokenizer", f"{model.path}: no tokenizer.json or the like"
        yield risk("files.tokenizer", what, evidence, f"{again}; or give --tokenizer", engine=model.engine)


def _bad(shard: Shard) -> str:
    """What is wrong with one file of the weights; empty for a good one."""
    if shard.bytes is None:
        return f"{shard.name} is missing"
    if shard.wanted_bytes is None:
        return f"{shard.name} is no safetensors file (a pointer of git LFS?), {shard.bytes} bytes"
    if shard.bytes != shard.wanted_bytes:
        return f"{shard.name} has {gib(shard.bytes)} ({shard.bytes} bytes) of {shard.wanted_bytes} bytes"
    return f"{shard.name} lacks {shard.absent_tensors} tensors that the index promises" if shard.absent_tensors else ""


# -- launch ------------------------------------------------------------------------------------------------------------


def judge_launch(facts: Facts) -> Iterator[Finding]:
    """Each command can be run, and what runs is what the fleet file says."""
    configs: Mapping[str, EngineConfig] = {e.name: e for e in facts.engines if is_here(e)}
    for launch in facts.launches.launches if facts.launches else ():
        if launch.problem:
            yield _cannot_run(launch)
        elif launch.running is not None and launch.expected and launch.engine in configs:
            yield from _drift(launch)
        if launch.recipe:
            yield note(
                "launch.recipe",
                f"engine '{launch.engine}' departs from its recipe",
                "; ".join(launch.recipe[:_SHOWN_MAX]),
                "fine if that is meant; else see `rotator jobs diff`",
                engine=launch.engine,
            )


def _cannot_run(launch: Launch) -> Finding:
    name, program = f"engine '{launch.engine}'", launch.program
    exit_code = "what a shell calls exit 127: no engine crash, nothing starts at all"
    match launch.problem:
        case "missing" if launch.package_version is not None:
            what = (
                f"{name}: its program {program} is gone, though {launch.package} {launch.package_version} is installed"
            )
            evidence = f"{exit_code}; {_RESTORE}"
            fix = _entry_point(launch)
        case "missing":
            what, evidence = f"{name}: its program {program} is not there", exit_code
            fix = "install it, or give its full path in 'command'"
        case "interpreter-missing":
            what = f"{name}: {program} names an interpreter that is not there: {launch.interpreter}"
            evidence = f"its first line; {exit_code}"
            fix = f"make the environment again, or correct the first line of {program}"
        case "import-missing":
            what = f"{name}: {program} is there, but the package {launch.package} that it starts is not"
            evidence = f"nothing named {launch.package} in the environment of {launch.interpreter or program}"
            fix = f"`{launch.interpreter or 'python'} -m pip install {launch.package}`, or restore its files"
        case "workdir-missing":
            what, evidence = f"{name}: its workdir is not there", program
            fix = "create it, or correct 'workdir'"
        case "folder":
            what, evidence, fix = (
                f"{name}: {program} is a folder",
                "exit 126 in a shell",
                "name the program in 'command'",
            )
        case _:
            what, evidence = f"{name}: {program} is not executable", "what a shell calls exit 126: no engine crash"
            fix = f"`chmod +x {program}`"
    return broken(f"launch.{launch.problem}", what, evidence, fix, engine=launch.engine, stops_launch=True)


def _entry_point(launch: Launch) -> str:
    """The command that writes a vanished entry point again."""
    python = launch.interpreter or "python"
    reinstall = f"`{python} -m pip install --no-deps --force-reinstall {launch.package}=={launch.package_version}`"
    if launch.package != "vllm":
        return reinstall
    lines = f"#!{python}\\nimport sys\\nfrom vllm.entrypoints.cli.main import main\\nsys.exit(main())\\n"
    return f"`printf '{lines}' > {launch.program} && chmod +x {launch.program}`; or {reinstall}"


def _drift(launch: Launch) -> Iterator[Finding]:
    running, expected = launch.running or (), launch.expected
    if tuple(running[-len(expected) :]) == expected:
        return  # an interpreter may stand before it
    gone = [w for w in expected if w not in running]
    extra = [w for w in running if w not in expected]
    if not gone and not extra:
        return
    evidence = "; ".join(
        words
        for words in (
            f"the fleet file also says {' '.join(gone[:_SHOWN_MAX])}" if gone else "",
            f"it runs with {' '.join(extra[:_SHOWN_MAX])}" if extra else "",
        )
        if words
    )
    yield risk(
        "launch.drift",
        f"engine '{launch.engine}' runs with other arguments than the fleet file says",
        evidence,
        f"`rotator restart {launch.engine}` when it suits",
        engine=launch.engine,
    )
