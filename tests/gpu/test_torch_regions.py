"""Real torch on a real GPU: `pytest -m gpu tests/gpu`."""

from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

OnGpu = Callable[..., str]


def test_temporaries_freed_under_running_kernels_do_not_fault(on_gpu: OnGpu) -> None:
    on_gpu("""
        with memory.region("weights"):
            for _ in range(200):
                torch.randn(2048, 7168, device="cuda")
        torch.cuda.synchronize()
    """)


def test_temporaries_of_several_streams_do_not_fault(on_gpu: OnGpu) -> None:
    on_gpu("""
        streams = [torch.cuda.Stream() for _ in range(4)]
        with memory.region("weights"):
            for i in range(200):
                with torch.cuda.stream(streams[i % 4]):
                    torch.randn(2048, 7168, device="cuda").mul_(2)
                if i % 10 == 0:
                    memory.trim()
        torch.cuda.synchronize()
    """)


@pytest.mark.parametrize("mib", [64, 1024, 8192])
def test_content_is_equal_after_sleeps_and_wakes(on_gpu: OnGpu, mib: int) -> None:
    on_gpu(f"""
        with memory.region("weights"):
            weights = [words(min({mib}, 256) * MIB, seed) for seed in range(max(1, {mib} // 256))]
        for cycle in range(3):
            torch.cuda.empty_cache()
            before = free()  # each time anew: the first comparison loads kernels, which take memory of their own
            memory.sleep()
            assert free() - before > 0.97 * {mib} * MIB, "the bytes did not go back"
            memory.wake()
            for seed, tensor in enumerate(weights):
                assert torch.equal(tensor, words(tensor.numel() * 8, seed)), (cycle, seed)
    """)


def test_a_prepared_first_sleep_copies_nothing(on_gpu: OnGpu) -> None:
    on_gpu("""
        with memory.region("weights"):
            weights = words(GIB, 1)
        memory.prepare()
        report = memory.sleep()
        assert report.bytes_copied == 0, report
        memory.wake()
        assert torch.equal(weights, words(GIB, 1))
    """)


def test_what_changed_after_prepare_is_kept(on_gpu: OnGpu) -> None:
    on_gpu("""
        with memory.region("weights"):
            weights = words(GIB, 1)
        memory.prepare()
        weights[12345] ^= 1
        expected = words(GIB, 1)
        expected[12345] ^= 1
        memory.sleep()
        memory.wake()
        assert torch.equal(weights, expected)
    """)


def test_the_load_leaves_no_temporaries(on_gpu: OnGpu) -> None:
    on_gpu("""
        before = free()
        with memory.region("weights"):
            kept = []
            for _ in range(8):
                wide = torch.empty(10240, 10240, dtype=torch.bfloat16, device="cuda")
                kept.append(wide.to(torch.float8_e4m3fn))
                del wide
        taken = before - free()
        weights = sum(t.numel() for t in kept)
        assert weights <= taken <= weights + 300 * MIB, (taken, weights)
    """)


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_expandable_segments_are_off_inside_and_back_after(on_gpu: OnGpu, name: str) -> None:
    on_gpu(
        """
        def expandable():
            return torch.cuda.memory._snapshot()["allocator_settings"]["expandable_segments"]
        torch.zeros(1, device="cuda")
        assert expandable()
        with memory.region("weights"):
            assert not expandable()
            weights = words(GIB, 1)
        assert expandable()
        assert memory.memory_usage()[0].bytes_allocated >= GIB
        outside = torch.zeros(256 * MIB, dtype=torch.uint8, device="cuda")
        memory.sleep()
        memory.wake()
        assert torch.equal(weights, words(GIB, 1))
        assert not outside.any()
        """,
        **{name: "expandable_segments:True,max_split_size_mb:512"},
    )


def test_nested_regions_keep_their_tags_or_are_refused(on_gpu: OnGpu) -> None:
    said = on_gpu("""
        try:
            with memory.region("runtime"):
                outer = torch.zeros(64 * MIB, dtype=torch.uint8, device="cuda")
                with memory.region("kv_cache"):
                    inner = torch.zeros(512 * MIB, dtype=torch.uint8, device="cuda")
                after = torch.zeros(64 * MIB, dtype=torch.uint8, device="cuda")
        except NestedRegion as error:
            print("refused:", error)
        else:
            usage = {row.tag: row.bytes_allocated for row in memory.memory_usage()}
            assert usage["kv_cache"] == 512 * MIB, usage
            assert usage["runtime"] == 128 * MIB, usage
            print("nested")
    """)
    assert "nested" in said or "refused" in said


def test_a_graph_replays_alike_across_a_sleep(on_gpu: OnGpu) -> None:
    on_gpu("""
        with memory.region("weights"):
            weight = torch.randn(4096, 4096, device="cuda")
        x = torch.randn(64, 4096, device="cuda")
        graph = torch.cuda.CUDAGraph()
        x @ weight
        with memory.graph_pool() as pool, torch.cuda.graph(graph, pool=pool):
            y = torch.relu(x @ weight) @ weight
        assert any(row.tag == "cudagraph" and row.segments for row in memory.memory_usage())
        graph.replay()
        torch.cuda.synchronize()
        expected = y.clone()
        for _ in range(3):
            memory.sleep()
            memory.wake()
            y.zero_()
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(y, expected)
    """)


def test_freeing_during_a_capture_does_not_spoil_it(on_gpu: OnGpu) -> None:
    on_gpu("""
        with memory.region("weights"):
            weight = torch.randn(4096, 4096, device="cuda")
            dying = [torch.zeros(64 * MIB, dtype=torch.uint8, device="cuda") for _ in range(4)]
        x = torch.randn(64, 4096, device="cuda")
        x @ weight
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = x @ weight
            dying.clear()
            torch.cuda.memory.empty_cache()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.allclose(y, x @ weight)
        memory.trim()
    """)


def test_a_wake_onto_a_full_device_stays_asleep_and_succeeds_later(on_gpu: OnGpu) -> None:
    on_gpu("""
        with memory.region("weights"):
            weights = words(8 * GIB, 1)
        torch.cuda.empty_cache()
        memory.sleep()
        foreign = torch.zeros(free() - 4 * GIB, dtype=torch.uint8, device="cuda")
        left = []
        for attempt in range(3):
            try:
                memory.wake()
            except OutOfMemory as error:
                assert error.bytes_wanted > error.bytes_free, error
            else:
                raise AssertionError("it woke where there was no room")
            left.append(free())
        assert left[0] == left[1] == left[2], left
        assert "weights" in memory.asleep_tags()
        del foreign
        torch.cuda.empty_cache()
        memory.wake()
        assert torch.equal(weights, words(8 * GIB, 1))
    """)


def test_an_elastic_sleep_takes_the_cache_and_leaves_the_weights(on_gpu: OnGpu) -> None:
    on_gpu("""
        with memory.region("weights"):
            weights = words(GIB, 1)
        with memory.region("kv_cache"):
            cache = torch.ones(2 * GIB, dtype=torch.uint8, device="cuda")
        before = free()
        memory.sleep(bytes_wanted=GIB)
        assert free() - before >= GIB
        assert memory.wake().bytes_copied == 0, "the weights were to stay"
        assert torch.equal(weights, words(GIB, 1))
        assert not cache[GIB:].any(), "what was given back comes back as zeros"
    """)


def test_exiting_with_live_tensors_and_graphs_is_clean(on_gpu: OnGpu) -> None:
    on_gpu("""
        with memory.region("weights"):
            weights = words(GIB, 1)
        graph = torch.cuda.CUDAGraph()
        x = torch.zeros(64, device="cuda")
        with memory.graph_pool() as pool, torch.cuda.graph(graph, pool=pool):
            y = x + 1
        graph.replay()
        memory.prepare(wait=False)
    """)


def test_exiting_asleep_is_clean(on_gpu: OnGpu) -> None:
    on_gpu("""
        with memory.region("weights"):
            weights = words(GIB, 1)
        memory.sleep()
    """)


@pytest.mark.parametrize("wait", [True, False])
def test_masters_of_weights_are_packed_and_come_back_bit_for_bit(on_gpu: OnGpu, wait: bool) -> None:
    on_gpu(f"""
        import time
        def weights(seed):
            generator = torch.Generator(device="cuda").manual_seed(seed)
            normal = torch.randn(128 * MIB + 8 * seed + 1, generator=generator, device="cuda", dtype=torch.bfloat16)
            return normal * 0.02 * 4 ** seed
        with memory.region("weights"):
            made = [weights(seed) for seed in range(8)]
        memory.prepare(wait={wait})
        while memory.prepare_status().running:
            time.sleep(0.01)
        assert memory.prepare_status().error is None
        nbytes = sum(2 * t.numel() for t in made)
        used = memory.host_memory().bytes_used
        assert 0.68 * nbytes < used < 0.73 * nbytes, used / nbytes
        for cycle in range(3):
            memory.sleep()
            torch.empty(20 * GIB, dtype=torch.uint8, device="cuda").fill_(cycle + 1)
            torch.cuda.empty_cache()
            memory.wake()
            for seed, tensor in enumerate(made):
                assert torch.equal(tensor.view(torch.int16), weights(seed).view(torch.int16)), (cycle, seed)
    """)


def test_every_value_there_is_survives_packing(on_gpu: OnGpu) -> None:
    """Zeros, denormals, infinities, NaNs, noise between weights, and lengths that end within a tile."""
    on_gpu("""
        generator = torch.Generator(device="cuda").manual_seed(1)
        def bits(kind, count):
            words = torch.empty(count, dtype=torch.int16, device="cuda")
            noise = words.random_(-(1 << 15), 1 << 15, generator=generator).clone()
            normal = torch.randn(count, generator=generator, device="cuda", dtype=torch.bfloat16).view(torch.int16)
            where = torch.rand(count, generator=generator, device="cuda")
            match kind:
                case "normal": return normal
                case "noise": return noise
                case "zeros": return torch.where(where < 0.1, 0, normal)
                case "huge": return torch.where(where < 0.05, noise | 0x7F80, normal)
                case "tiny": return torch.where(where < 0.05, noise & 0x807F, normal)
                case "bursts": return torch.where((torch.arange(count, device="cuda") // 3000) % 5 == 0, noise, normal)
        expected = [bits(kind, count) for kind in ("normal", "noise", "zeros", "huge", "tiny", "bursts")
                    for count in (1, 4095, 4096, 4097, 100_003, 16 * MIB - 5, 40 * MIB + 77)]
        with memory.region("weights"):
            made = [e.clone() for e in expected]
            odd = torch.arange(3 * MIB + 1, device="cuda").to(torch.uint8)
        for level in range(2):
            report = memory.sleep()
            memory.wake()
            assert all(torch.equal(a, b) for a, b in zip(made, expected))
            assert torch.equal(odd, torch.arange(3 * MIB + 1, device="cuda").to(torch.uint8))
        usage = memory.host_memory().bytes_used
        assert usage < 0.95 * sum(2 * e.numel() for e in expected), usage
    """)


def test_weights_that_lost_a_part_of_packed_chunks_get_it_back(on_gpu: OnGpu) -> None:
    on_gpu("""
        made = torch.randn(GIB, generator=torch.Generator(device="cuda").manual_seed(2), device="cuda").bfloat16()
        with memory.region("weights"):
            kept = made.clone()
        for wanted in (100 * MIB, 300 * MIB, 1500 * MIB):
            report = memory.sleep(bytes_wanted=wanted)
            assert report.bytes_kept > 0
            memory.wake()
            assert torch.equal(kept.view(torch.int16), made.view(torch.int16)), wanted
    """)


def test_packed_masters_on_disk_come_back(on_gpu: OnGpu, tmp_path: Path) -> None:
    on_gpu(f"""
        memory.close()
        memory = TorchAllocator(Allocator(spill_dir={str(tmp_path)!r}))
        made = torch.randn(GIB, generator=torch.Generator(device="cuda").manual_seed(2), device="cuda").bfloat16()
        with memory.region("weights"):
            kept = made.clone()
        memory.place_masters("disk")
        memory.sleep()
        assert memory.host_memory().bytes_spilled < 1.5 * GIB
        assert memory.wake().bytes_spilled == 2 * GIB
        assert torch.equal(kept.view(torch.int16), made.view(torch.int16))
    """)
