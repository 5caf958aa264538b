"""The copy floor: host to device from pinned memory on several GPUs at once, nothing else. GiB/s of each GPU.

python -m bench.allocator_floor --gpus 4 [--gib 4] [--rounds 8]
"""

import argparse
import json
import subprocess
import sys
import time

START_S = 90.0


def rates_gib_s(gpus: int, gib: float, rounds: int) -> list[float]:
    """One process a GPU, all copying in the same seconds. Raises SystemExit when one fails."""
    base = [sys.executable, "-m", "bench.allocator_floor", "--gib", str(gib), "--rounds", str(rounds), "--device"]
    pipe = subprocess.PIPE
    ranks = [subprocess.Popen([*base, str(i)], stdin=pipe, stdout=pipe, text=True) for i in range(gpus)]
    try:
        for rank in ranks:
            assert rank.stdout is not None
            if rank.stdout.readline().strip() != "ready":
                raise SystemExit("a rank of the copy floor did not start")
        for rank in ranks:
            assert rank.stdin is not None
            rank.stdin.write("go\n")
            rank.stdin.flush()
        return [float(json.loads(rank.communicate(timeout=START_S)[0])["gib_s"]) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


def copy(device: int, gib: float, rounds: int) -> None:
    import torch

    nbytes = int(gib * (1 << 30))
    host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(nbytes, dtype=torch.uint8, device=f"cuda:{device}")
    target.copy_(host, non_blocking=True)
    torch.cuda.synchronize(device)
    print("ready", flush=True)
    sys.stdin.readline()
    begun = time.perf_counter()
    for _ in range(rounds):
        target.copy_(host, non_blocking=True)
    torch.cuda.synchronize(device)
    print(json.dumps({"device": device, "gib_s": rounds * gib / (time.perf_counter() - begun)}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--device", type=int)
    parser.add_argument("--gib", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=8)
    args = parser.parse_args()
    if args.device is not None:
        copy(args.device, args.gib, args.rounds)
    else:
        print(json.dumps({"gib_s": [round(rate, 2) for rate in rates_gib_s(args.gpus, args.gib, args.rounds)]}))


if __name__ == "__main__":
    main()
