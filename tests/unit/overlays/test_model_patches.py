"""The patches outside the sleep allocator, on modules of vLLM's shape."""

import ast
from types import SimpleNamespace

import pytest

from overlays.build import Result, apply_all, try_patch
from overlays.patch import Patch
from overlays.patches import hybrid_state, hybrid_wake, mxfp4_loader, sparse_mla_workspace, triton_shared_memory
from overlays.patches._states import State
from overlays.probing import load
from overlays.sources import Memory
from tests.overlay_files import (
    GATHER,
    INDEXER,
    LOADER,
    MXFP4,
    OUTPUT_KERNEL,
    RUNNER,
    STATE_KERNEL,
    STOCK,
    WORKER,
)

PATCHES = {
    patch.name: patch
    for patch in (
        hybrid_wake.PATCH,
        hybrid_state.PATCH,
        sparse_mla_workspace.PATCH,
        triton_shared_memory.PATCH,
        mxfp4_loader.PATCH,
    )
}


def build(version: str = "0.26.0", **changed: str) -> Memory:
    """vLLM as shipped, with some files replaced (`runner=...`) by name of the constants above."""
    paths = {"runner": RUNNER, "worker": WORKER, "indexer": INDEXER, "gather": GATHER, "mxfp4": MXFP4}
    paths |= {"loader": LOADER, "state": STATE_KERNEL, "output": OUTPUT_KERNEL}
    return Memory(STOCK | {paths[name]: text for name, text in changed.items()}, version)


def patched(patch: Patch, source: Memory) -> dict[str, bytes]:
    made = apply_all(source, [patch])
    assert made.outcomes[0].result is Result.APPLIED, made.outcomes[0].reason
    return made.files


def replaced(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1
    return text.replace(old, new)


@pytest.mark.parametrize("name", PATCHES)
def test_a_stock_build_has_the_bug_and_is_patched(name: str) -> None:
    outcome = try_patch(PATCHES[name], build())
    assert outcome.result is Result.APPLIED, outcome.reason


@pytest.mark.parametrize("name", PATCHES)
def test_a_patched_build_is_taken_for_upstream_and_left_alone(name: str) -> None:
    files = patched(PATCHES[name], build())
    once_more = apply_all(Memory({**STOCK, **files}, "0.26.0"), [PATCHES[name]])
    assert once_more.outcomes[0].result is Result.UPSTREAM
    assert once_more.files == {}


@pytest.mark.parametrize("name", PATCHES)
def test_a_release_that_nobody_looked_at_is_not_applicable(name: str) -> None:
    assert try_patch(PATCHES[name], build("0.99.0")).result is Result.NOT_APPLICABLE


def test_all_of_them_go_into_one_build() -> None:
    made = apply_all(build(), list(PATCHES.values()))
    assert [outcome.result for outcome in made.outcomes] == [Result.APPLIED] * len(PATCHES)


class TestHybridWake:
    def run(self, text: bytes, caches: list[object]) -> None:
        module = load(text, RUNNER)
        vars(module)["is_quantized_kv_cache"] = lambda dtype: True
        runner = SimpleNamespace(cache_config=SimpleNamespace(cache_dtype="fp8"), kv_caches=caches)
        module.GPUModelRunner.init_fp8_kv_scales(runner)

    def test_lists_and_tuples_of_states_and_plain_caches_are_zeroed_once(self) -> None:
        states = [State() for _ in range(5)]
        caches = [states[0], [states[1], states[2]], None, (states[3], states[4])]
        self.run(patched(hybrid_wake.PATCH, build())[RUNNER], caches)
        assert [state.zeroed for state in states] == [1] * 5

    def test_a_release_that_takes_lists_is_upstream(self) -> None:
        text = replaced(
            STOCK[RUNNER],
            "                entry.zero_()",
            "                parts = entry if isinstance(entry, list) else [entry]\n"
            "                for part in parts:\n                    part.zero_()",
        )
        assert try_patch(hybrid_wake.PATCH, build(runner=text)).result is Result.UPSTREAM

    def test_a_release_without_the_reset_is_not_applicable(self) -> None:
        outcome = try_patch(hybrid_wake.PATCH, build(runner="class GPUModelRunner:\n    pass\n"))
        assert outcome.result is Result.NOT_APPLICABLE

    def test_a_reset_written_in_another_way_fails_closed(self) -> None:
        text = replaced(STOCK[RUNNER], "entry.zero_()", "clear(entry)") + "\ndef clear(entry):\n    entry.zero_()\n"
        assert try_patch(hybrid_wake.PATCH, build(runner=text)).result is Result.FAILED


class TestHybridState:
    def test_shared_pages_are_zeroed_once_and_attention_is_left_alone(self) -> None:
        files = patched(hybrid_state.PATCH, build())
        view = SimpleNamespace(load=lambda role, modules: load(files[WORKER], WORKER, modules))
        attention, states = hybrid_state.wake(view, None)  # only `load` of it is used
        assert attention.zeroed == 0
        assert [state.zeroed for state in states] == [1, 1]

    def test_a_wake_that_zeroes_before_it_maps_is_no_fix(self) -> None:
        early = "        for layer in self.vllm_config.compilation_config.static_forward_context.values():\n"
        early += "            [part.zero_() for part in layer.kv_cache or ()]\n"
        text = replaced(STOCK[WORKER], "        self._get_sleep", f"{early}        self._get_sleep")
        assert try_patch(hybrid_state.PATCH, build(worker=text)).result is Result.FAILED

    def test_a_wake_through_the_allocator_itself_is_patched_too(self) -> None:
        text = replaced(
            STOCK[WORKER],
            "        self._get_sleep_mode_backend().resume(tags)",
            "        from vllm.device_allocator.cumem import CuMemAllocator\n\n"
            "        allocator = CuMemAllocator.get_instance()\n        allocator.wake_up(tags)",
        )
        assert try_patch(hybrid_state.PATCH, build("0.19.1", worker=text)).result is Result.APPLIED

    def test_a_wake_that_nobody_knows_fails_closed(self) -> None:
        text = replaced(STOCK[WORKER], "        self._get_sleep_mode_backend().resume(tags)", "        self.rise(tags)")
        assert try_patch(hybrid_state.PATCH, build(worker=text)).result is Result.FAILED


class TestSparseMlaWorkspace:
    def rows(self, files: dict[str, bytes], family: int) -> tuple[int, int]:
        view = SimpleNamespace(
            load=lambda role, modules: load(files[INDEXER if role == "indexer" else GATHER], f"vllm/{role}.py", modules)
        )
        return sparse_mla_workspace.workspaces(view, family)  # only `load` of it is used

    @pytest.mark.parametrize(("family", "multiples"), [(120, (8, 2)), (80, (40, 5)), (90, (40, 5)), (100, (40, 5))])
    def test_only_consumer_blackwell_gets_smaller_workspaces(self, family: int, multiples: tuple[int, int]) -> None:
        rows = self.rows(patched(sparse_mla_workspace.PATCH, build()), family)
        assert rows == tuple(multiple * sparse_mla_workspace.CONTEXT for multiple in multiples)

    def test_without_compression_the_plan_is_left_as_it_was(self) -> None:
        text = STOCK[INDEXER]
        for line in text.splitlines(keepends=True):
            if "compress_ratio" in line or "isinstance" in line:
                text = text.replace(line, "")
        files = patched(sparse_mla_workspace.PATCH, build("0.19.1", indexer=text))
        assert b"self.max_prefill_buffer_size,\n" in files[INDEXER]

    def test_a_plan_beyond_the_buffer_is_a_bug_even_with_small_workspaces(self) -> None:
        indexer = replaced(STOCK[INDEXER], "max_model_len * 40", "max_model_len * 8")
        gather = replaced(STOCK[GATHER], "max_model_len * 5", "max_model_len * 2")
        made = apply_all(build(indexer=indexer, gather=gather), [sparse_mla_workspace.PATCH])
        assert "a step may be planned" in made.outcomes[0].reason

    def test_a_factor_in_the_configuration_is_upstream(self) -> None:
        factor = "vllm_config.attention_config.sparse_mla_prefill_workspace_factor"
        indexer = replaced(STOCK[INDEXER], "max_model_len * 40", f"max_model_len * 8 * {factor}")
        indexer = replaced(indexer, "(vllm_config)\n        self.compress", "(vllm_config) // 4\n        self.compress")
        length = "vllm_config.model_config.max_model_len"
        gather = f"def get_prefill_workspace_size(vllm_config):\n    return {length} * {factor}\n"
        outcome = try_patch(sparse_mla_workspace.PATCH, build("0.32.0", indexer=indexer, gather=gather))
        assert outcome.result is Result.UPSTREAM, outcome.reason

    def test_a_workspace_smaller_than_one_request_is_not_understood(self) -> None:
        gather = replaced(STOCK[GATHER], "max_model_len * 5", "max_model_len // 2")
        indexer = replaced(STOCK[INDEXER], "max_model_len * 40", "max_model_len * 8")
        outcome = try_patch(sparse_mla_workspace.PATCH, build(gather=gather, indexer=indexer))
        assert outcome.result is Result.FAILED

    @pytest.mark.parametrize("text", ["max_model_len * factor()", "40 + max_model_len", "40 * 2"])
    def test_another_formula_fails_closed(self, text: str) -> None:
        indexer = replaced(STOCK[INDEXER], "max_model_len * 40", text) + "\n\ndef factor():\n    return 40\n"
        assert try_patch(sparse_mla_workspace.PATCH, build(indexer=indexer)).result is Result.FAILED


class TestTritonSharedMemory:
    def test_the_pruner_travels_as_a_file_of_its_own(self) -> None:
        files = patched(triton_shared_memory.PATCH, build())
        assert sorted(files) == sorted([triton_shared_memory.ADDED, STATE_KERNEL, OUTPUT_KERNEL])

    def test_what_travels_imports_nothing_but_the_standard_library_and_torch(self) -> None:
        tree = ast.parse(patched(triton_shared_memory.PATCH, build())[triton_shared_memory.ADDED])
        roots = {
            (node.module or "").partition(".")[0] if isinstance(node, ast.ImportFrom) else node.names[0].name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
        }
        assert roots <= {"__future__", "collections", "dataclasses", "logging", "torch", "typing"}

    def test_kernels_are_found_where_older_releases_keep_them(self) -> None:
        old = "vllm/model_executor/layers/fla/ops"
        files = {path: text for path, text in STOCK.items() if "flash_linear" not in path}
        files |= {f"{old}/chunk_delta_h.py": STOCK[STATE_KERNEL], f"{old}/chunk_o.py": STOCK[OUTPUT_KERNEL]}
        outcome = try_patch(triton_shared_memory.PATCH, Memory(files, "0.25.0"))
        assert outcome.result is Result.APPLIED, outcome.reason

    def test_kernels_that_moved_are_found_by_their_name(self) -> None:
        files = {path: text for path, text in STOCK.items() if "flash_linear" not in path}
        files |= {"vllm/kernels/chunk_delta_h.py": STOCK[STATE_KERNEL], "vllm/kernels/chunk_o.py": STOCK[OUTPUT_KERNEL]}
        outcome = try_patch(triton_shared_memory.PATCH, Memory(files, "0.33.1"))
        assert outcome.result is Result.APPLIED, outcome.reason

    def test_a_pruner_that_lets_too_large_ones_through_fails_closed(self) -> None:
        lax = "key=['K'], prune_configs_by={'early_config_prune': lambda configs, named, **more: configs}"
        text = replaced(STOCK[STATE_KERNEL], 'key=["K"]', lax)
        assert try_patch(triton_shared_memory.PATCH, build(state=text)).result is Result.FAILED

    def test_a_kernel_that_is_not_tuned_any_more_is_left_alone(self) -> None:
        files = patched(triton_shared_memory.PATCH, build(output=untuned(STOCK[OUTPUT_KERNEL])))
        assert OUTPUT_KERNEL not in files

    def test_without_any_tuned_kernel_it_is_not_applicable(self) -> None:
        source = build(output=untuned(STOCK[OUTPUT_KERNEL]), state=untuned(STOCK[STATE_KERNEL]))
        assert try_patch(triton_shared_memory.PATCH, source).result is Result.NOT_APPLICABLE


def untuned(text: str) -> str:
    return text.replace(text[text.index("@triton.autotune") : text.index("@triton.jit")], "")


class TestMxfp4Loader:
    def test_every_method_of_the_file_is_patched(self) -> None:
        text = STOCK[MXFP4] + STOCK[MXFP4].replace("import torch", "").replace("Mxfp4MoE", "GptOssMxfp4MoE")
        files = patched(mxfp4_loader.PATCH, build(mxfp4=text))
        assert files[MXFP4].count(b"torch.cuda.empty_cache()") == 2

    def test_only_weights_are_dropped_and_not_the_layer(self) -> None:
        assert b"del w13, w2, bias\n" in patched(mxfp4_loader.PATCH, build())[MXFP4]

    def test_a_loader_that_empties_the_cache_is_upstream(self) -> None:
        text = STOCK[LOADER] + "            import torch\n\n            torch.accelerator.empty_cache()\n"
        assert try_patch(mxfp4_loader.PATCH, build(loader=text)).result is Result.UPSTREAM

    def test_emptying_while_the_originals_are_still_held_is_no_fix(self) -> None:
        text = STOCK[MXFP4] + "        torch.cuda.empty_cache()\n"
        assert try_patch(mxfp4_loader.PATCH, build(mxfp4=text)).result is Result.FAILED

    def test_weights_that_are_used_after_the_conversion_are_not_dropped(self) -> None:
        text = STOCK[MXFP4] + "        return w13\n"
        assert try_patch(mxfp4_loader.PATCH, build(mxfp4=text)).result is Result.FAILED

    def test_a_file_without_such_methods_is_not_applicable(self) -> None:
        assert try_patch(mxfp4_loader.PATCH, build(mxfp4="import torch\n")).result is Result.NOT_APPLICABLE
