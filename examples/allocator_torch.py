"""A model on the GPU that sleeps in host memory and comes back, with nothing but torch and the allocator.

    python examples/allocator_torch.py [--gib 8]

Needs a GPU, torch 2.10 or newer and this package installed (`pip install '.[torch]'`).
"""

import argparse

import torch

import allocator


class Model(torch.nn.Module):
    def __init__(self, gib: float) -> None:
        super().__init__()
        layers = max(1, int(gib * (1 << 30) / (8192 * 8192 * 2)))
        made = [torch.nn.Linear(8192, 8192, bias=False, dtype=torch.bfloat16, device="cuda") for _ in range(layers)]
        self.layers = torch.nn.ModuleList(made)

    @torch.inference_mode()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.nn.functional.rms_norm(layer(x), (8192,))
        return x


def gib_used() -> float:
    free, total = torch.cuda.mem_get_info()
    return float(total - free) / (1 << 30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=8.0)
    gib = parser.parse_args().gib

    memory = allocator.TorchAllocator()
    with memory.region("weights"):
        model = Model(gib)
    with memory.region("kv_cache"):
        cache = torch.zeros(2 << 30, dtype=torch.uint8, device="cuda")
    question = torch.randn(4, 8192, dtype=torch.bfloat16, device="cuda")
    answer = model(question)
    print(f"awake:  {gib_used():5.1f} GiB used")

    memory.prepare()  # masters now, so that the first sleep copies nothing; wait=False does it while the model serves
    slept = memory.sleep(level=1)
    print(f"asleep: {gib_used():5.1f} GiB used, after {1000 * slept.seconds:.1f} ms, {slept.bytes_copied} bytes copied")
    woke = memory.wake()
    print(f"awake:  {gib_used():5.1f} GiB used, after {1000 * woke.seconds:.1f} ms at {woke.gib_s:.1f} GiB/s")

    print("the same answer:", torch.equal(model(question), answer))
    print("the cache was discarded and is zero:", not bool(cache.any()))
    for row in memory.memory_usage():
        print(
            f"{row.tag:9} on device {row.device}: {row.state}, {row.bytes_allocated} bytes in {row.segments} segments"
        )


if __name__ == "__main__":
    main()
