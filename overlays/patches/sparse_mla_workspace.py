"""Sparse MLA takes workspaces that fit consumer Blackwell, and never more rows than they hold (vLLM #42856)."""

from __future__ import annotations

import ast
import contextlib
import inspect
from collections.abc import Callable
from typing import Any

from overlays.errors import ShapeUnknown
from overlays.patch import Files, Patch, Target, Verdict, bug, fixed, unknown
from overlays.probing import Anything, stub
from overlays.source import Function, Source, type_of_function

# Multiples of max_model_len on SM12x, as measured in the field for 95 GiB cards (vLLM #42856). One is enough to be
# right: what does not fit into a workspace is done in more steps.
INDEXER_ROWS, GATHER_ROWS = 8, 2
INDEXER_ROW_BYTES, GATHER_ROW_BYTES = 132, 576 * 2  # 128 fp8 + a scale; 576 bf16

CONTEXT = 1 << 20  # tokens; DeepSeek V4's, where stock takes 11 GiB
GIB = 1 << 30


def edit(files: Files) -> None:
    bound(files.source("indexer"), "get_max_prefill_buffer_size", INDEXER_ROWS)
    bound(files.source("gather"), "get_prefill_workspace_size", GATHER_ROWS)
    count_as_the_buffer_does(files.source("indexer"))


def bound(source: Source, name: str, rows: int) -> None:
    """Make `return max_model_len * 40` another multiple on SM12x."""
    function = source.function(name)
    last = function.body[-1]
    if not (isinstance(last, ast.Return) and isinstance(last.value, ast.BinOp) and isinstance(last.value.op, ast.Mult)):
        raise ShapeUnknown(f"{source.path}: {name} does not end with a product")
    factors = [part for part in (last.value.left, last.value.right) if isinstance(part, ast.Constant)]
    if len(factors) != 1:
        raise ShapeUnknown(f"{source.path}: {name} does not multiply by a number")
    stock = source.text_of(factors[0])
    source.insert_before(
        last,
        """
        # SM12x has no room for as much, and what does not fit is done in more steps.
        from vllm.platforms import current_platform
        """,
    )
    source.replace(factors[0], f"({rows} if current_platform.is_device_capability_family(120) else {stock})")


def count_as_the_buffer_does(source: Source) -> None:
    """The indexer's buffer is divided by the compression of its layer (DeepSeek V4); its planner's bound has to be as
    well, or a plan has more rows than the buffer. vLLM does so itself from 0.32."""
    builder = source.klass("DeepseekV32IndexerMetadataBuilder")
    if "self.compress_ratio" not in source.text_of(builder):
        return
    for method in builder.body:
        if not isinstance(method, type_of_function) or method.name == "__init__":
            continue
        for node in reads(method):
            source.replace(node, "(self.max_prefill_buffer_size // self.compress_ratio)")


def reads(method: Function) -> list[ast.Attribute]:
    return [
        node
        for node in ast.walk(method)
        if isinstance(node, ast.Attribute)
        and node.attr == "max_prefill_buffer_size"
        and isinstance(node.ctx, ast.Load)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    ]


def probe(files: Files) -> Verdict:
    indexer, gather = workspaces(files, family=120)
    taken = f"{(indexer * INDEXER_ROW_BYTES + gather * GATHER_ROW_BYTES) / GIB:.1f} GiB"
    if indexer > 16 * CONTEXT or gather > 2 * CONTEXT:  # what vLLM itself takes for long contexts from 0.32
        return bug(f"on SM12x a context of {CONTEXT} tokens takes workspaces of {taken}")
    if min(indexer, gather) < CONTEXT:
        return unknown("a workspace does not hold one request")
    planned, held = planned_rows(files)
    if planned > held:
        return bug(f"a step may be planned with {planned} rows, and its buffer has {held}")
    return fixed(f"on SM12x a context of {CONTEXT} tokens takes workspaces of {taken}")


def workspaces(files: Files, family: int) -> tuple[int, int]:
    """Rows of the indexer's buffer and of the gathered context, on a GPU of this family."""
    indexer = files.load("indexer", platform(family)).get_max_prefill_buffer_size(vllm_config())
    gather = files.load("gather", platform(family)).get_prefill_workspace_size
    takes_config = gather.__code__.co_varnames[0] == "vllm_config"  # from 0.32
    return int(indexer), int(gather(vllm_config() if takes_config else CONTEXT))


def platform(family: int) -> dict[str, object]:
    fake = stub("current_platform", is_device_capability_family=lambda wanted, *_: wanted == family)
    return {"vllm.platforms": stub("platforms", current_platform=fake)}


def vllm_config() -> Anything:
    parallel = dict.fromkeys(
        ("decode_context_parallel_size", "prefill_context_parallel_size", "cp_kv_cache_interleave_size"), 1
    )
    return stub(
        "vllm_config",
        model_config=stub("model_config", max_model_len=CONTEXT),
        # The factor is what 0.32 takes itself for contexts over 256 Ki.
        attention_config=stub(
            "attention_config", sparse_mla_prefill_workspace_factor=2, resolve_indexer_kv_dtype=lambda default: default
        ),
        scheduler_config=stub("scheduler_config", max_num_batched_tokens=64, max_num_seqs=4),
        cache_config=stub("cache_config", block_size=64),
        parallel_config=stub("parallel_config", **parallel),
        speculative_config=None,
    )


class Planned(Exception):
    """Ends the build of a step's metadata where its rows have been planned."""


class Spec:
    """A layer's cache with four tokens to a row. Instances take the place of vLLM's MLAAttentionSpec."""

    compress_ratio = tokens_per_state = 4
    block_size, storage_block_size = 64, 16

    def __getattr__(self, name: str) -> Anything:
        return stub(name)


def planned_rows(files: Files) -> tuple[int, int]:
    """The most rows that the indexer plans into one step, and the rows that its layer's buffer has."""
    module = files.load("indexer", platform(120))
    seen: list[int] = []

    def plan(*args: Any, **kwargs: object) -> None:
        seen.append(args[2])  # sequence lengths, query lengths, the bound on rows
        raise Planned

    vars(module).update(
        MLAAttentionSpec=Spec,
        split_decodes_and_prefills=lambda *args, **kwargs: (0, 1, 0, 16),
        split_indexer_prefill_chunks=plan,
    )
    builder = new_builder(module.DeepseekV32IndexerMetadataBuilder, plan)
    with contextlib.suppress(Planned):
        builder.build(0, stub("common_attn_metadata", num_reqs=1, num_actual_tokens=16))
    ratio = vars(builder).get("compress_ratio", 1)
    return seen[0], module.get_max_prefill_buffer_size(vllm_config()) // ratio


def new_builder(stock: Any, plan: Callable[..., None]) -> Any:
    """The builder under probe, over a base class that knows nothing but its arguments."""
    spec, config = Spec(), vllm_config()
    given = {"vllm_config": config, "kv_cache_spec": spec, "kernel_block_size": None}

    class Rig(stock):  # type: ignore[misc] # the class comes out of the file under probe
        def __getattribute__(self, name: str) -> Any:
            return plan if name == "_split_indexer_prefill_chunks" else super().__getattribute__(name)

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return given[name] if name in given else stub(name)

    needed = inspect.signature(stock.__init__).parameters.values()
    extra = {item.name: 1 for item in needed if item.kind is item.KEYWORD_ONLY and item.default is item.empty}
    return Rig(spec, ["layer"], config, stub("device"), **extra)


PATCH = Patch(
    name="sparse-mla-workspace",
    targets={
        "indexer": Target(paths=("vllm/v1/attention/backends/mla/indexer.py",)),
        "gather": Target(paths=("vllm/v1/attention/backends/mla/flashmla_sparse.py",)),
    },
    releases=">=0.19.1,<0.34",
    why="sparse MLA workspaces made for 140 GiB cards stay allocated in sleep: 7 to 9 GiB a GPU on SM12x",
    drop_when="the oldest release in use is 0.32, which sizes them by the context and lets the configuration say",
    upstream=("vLLM #42856", "vLLM #47654"),
    required=False,
    edit=edit,
    probe=probe,
)
__all__ = ["PATCH"]
