"""How much shared memory Triton gives two of vLLM's kernels, against what `overlays/payload/shared_memory.py` says.

    python -m bench.shared_memory --vllm VLLM_FOLDER [--write bench/shared_memory.csv] [--sm 90 --sm 120]

Compiles the kernels of a vLLM (a folder with its files; nothing of it is imported) for each architecture and each
configuration, and compares. Needs `triton`, and no GPU. Exit code 1 if an estimate would prune a configuration that
fits some GPU, or is too small above the 48 KiB that every GPU has.
"""

import argparse
import csv
import importlib
import itertools
import sys
import tempfile
import types
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any

from overlays.patches.triton_shared_memory import KERNELS
from overlays.payload import shared_memory
from overlays.probing import Anything, stub


@dataclass(frozen=True)
class Launch:
    """One configuration of one kernel. Sizes in elements; `block_k` is 0 where the kernel has none."""

    kernel: str  # "state" or "output", as in the patch
    sm: int  # 90 for compute capability 9.0
    chunk: int
    head: int
    block_k: int
    block_v: int
    warps: int
    stages: int
    element_bytes: int = 2
    key_gates: int = 0
    bytes: int = 0  # as Triton says; 0 if not asked

    @property
    def kwargs(self) -> dict[str, int]:
        return {"BV": self.block_v} | ({"BK": self.block_k} if self.block_k else {})

    @property
    def num_warps(self) -> int:
        return self.warps

    @property
    def num_stages(self) -> int:
        return self.stages

    @property
    def estimate_bytes(self) -> int:
        estimate = getattr(shared_memory, KERNELS[self.kernel].estimate)
        tensor = stub("k", element_size=lambda: self.element_bytes)
        gates = {"g": None, "gk": tensor} if self.key_gates else {"g": tensor, "gk": None}
        arguments = {"BT": self.chunk, "K": self.head, "k": tensor, **gates}
        return int(estimate(self, arguments, shared_memory.Gpu((self.sm // 10, self.sm % 10))))

    @property
    def wrong(self) -> bool:
        if self.bytes > max(self.estimate_bytes, shared_memory.ANY_GPU_KIB * shared_memory.KIB):
            return True
        limits = (
            shared_memory.Gpu(known).budget_bytes for known in shared_memory.OPTIN_KIB if known[0] == self.sm // 10
        )
        return any(self.bytes <= limit < self.estimate_bytes for limit in limits)


def launches(architectures: list[int]) -> Iterator[Launch]:
    """What the released kernels are tuned over, for the heads that models have, and some beside it. Of Turing only a
    few: Triton stages nothing there, and takes half a minute for each."""
    for sm, stages in itertools.product([sm for sm in architectures if sm < 80], (2, 4)):
        yield Launch("state", sm, 64, 128, 0, 32, 4, stages)
        yield Launch("state", sm, 64, 128, 0, 64, 4, stages)
        yield Launch("output", sm, 64, 128, 64, 64, 4, stages)
    architectures = [sm for sm in architectures if sm >= 80]
    for sm, head, blocks, stages in itertools.product(architectures, (64, 128, 256), (32, 64), (2, 3, 4)):
        yield Launch("state", sm, 64, head, 0, blocks, 4, stages)
    for sm, block_v, warps in itertools.product(architectures, (32, 64), (2, 4)):
        yield Launch("state", sm, 64, 128, 0, block_v, warps, 4)
        yield Launch("state", sm, 64, 128, 0, block_v, warps, 3, key_gates=1)
        yield Launch("state", sm, 32, 128, 0, block_v, warps, 4)
    for sm, head, block_k, block_v, stages in itertools.product(
        architectures, (128, 256), (32, 64, 128), (32, 64, 128), (2, 3, 4)
    ):
        yield Launch("output", sm, 64, head, block_k, block_v, 4, stages)
    for sm, warps, chunk in itertools.product(architectures, (2, 8), (32, 64)):
        yield Launch("output", sm, chunk, 128, 64, 64, warps, 4)
    for sm, kernel in itertools.product(architectures, ("state", "output")):
        yield Launch(kernel, sm, 64, 128, 64 if kernel == "output" else 0, 64, 4, 3, element_bytes=4)


class Compiler:
    """Triton over the kernels of one vLLM folder."""

    def __init__(self, vllm: Path, scratch: Path) -> None:
        self._triton = importlib.import_module("triton")
        package = scratch / "kernels_under_test"
        package.mkdir()
        (package / "__init__.py").write_text("")
        for name, text in SURROUNDINGS.items():
            (package / f"{name}.py").write_text(text)
        for kernel in KERNELS.values():
            found = next((vllm / path for path in kernel.target.paths if (vllm / path).is_file()), None)
            if found is None:
                raise SystemExit(f"{vllm} has no {kernel.file}; name a folder that holds vllm/")
            (package / kernel.file).write_bytes(found.read_bytes())
        sys.path.insert(0, str(scratch))
        sys.modules |= self._fakes()
        self._functions = {
            role: self._function(importlib.import_module(f"kernels_under_test.{kernel.file[:-3]}"), kernel.name)
            for role, kernel in KERNELS.items()
        }

    def shared_bytes(self, launch: Launch) -> int:
        function = self._functions[launch.kernel]
        half = "bf16" if launch.sm >= 80 else "fp16"  # Turing has no bf16
        tensor = f"*{'fp32' if launch.element_bytes == 4 else half}"
        types_ = {"q": tensor, "k": tensor, "v": tensor, "w": tensor, "v_new": tensor, "h": tensor, "o": tensor}
        types_ |= {"h0": "*fp32", "ht": "*fp32", "cu_seqlens": "*i32", "chunk_offsets": "*i32", "chunk_indices": "*i32"}
        types_ |= {"scale": "fp32", "T": "i32", "gk" if launch.key_gates else "g": "*fp32"}
        flags = {name: True for name in function.arg_names if name.startswith(("USE_", "STORE_", "SAVE_", "IS_"))}
        flags |= {"USE_G": not launch.key_gates, "USE_GK": bool(launch.key_gates), "USE_EXP2": False}
        values = {"H": 32, "Hg": 16, "K": launch.head, "V": 128, "BT": launch.chunk, **launch.kwargs, **flags}
        constants = {name: values.get(name) for name in function.arg_names if name not in types_}
        signature = {name: types_.get(name, "constexpr") for name in function.arg_names}
        aligned = {
            (index,): [["tt.divisibility", 16]]
            for index, name in enumerate(function.arg_names)
            if signature[name].startswith("*")
        }
        compiler = importlib.import_module("triton.compiler")
        target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", launch.sm, 32)
        source = compiler.ASTSource(function, signature, constants, aligned)
        options = {"num_warps": launch.warps, "num_stages": launch.stages}
        return int(self._triton.compile(source, target=target, options=options).metadata.shared)

    def _function(self, module: types.ModuleType, name: str) -> Any:
        function = getattr(module, name)
        while not isinstance(function, self._triton.runtime.JITFunction):
            function = function.fn
        return function

    def _fakes(self) -> dict[str, Any]:
        """vLLM and torch as far as the kernels' files look at them."""
        triton_utils = stub("triton_utils", triton=self._triton, tl=importlib.import_module("triton.language"))
        torch = Anything("torch")
        return {"torch": torch, "vllm": Anything("vllm"), "vllm.triton_utils": triton_utils}


SURROUNDINGS = {
    "op": "import triton.language as tl\nexp = tl.exp\nexp2 = tl.exp2\n",
    "index": "prepare_chunk_indices = prepare_chunk_offsets = None\n",
    "utils": "FLA_CHUNK_SIZE = 64\nFLA_GDN_FIX_BT = use_cuda_graph = is_nvidia_hopper = False\n"
    "def check_shared_mem(*_):\n    return True\n",
}


def read(path: Path) -> list[Launch]:
    """The launches that were written with `--write`."""
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        return [Launch(row["kernel"], *(int(row[field.name]) for field in fields(Launch)[1:])) for row in rows]


def write(path: Path, done: list[Launch]) -> None:
    with path.open("w", newline="") as file:
        rows = csv.DictWriter(file, list(asdict(done[0])), lineterminator="\n")
        rows.writeheader()
        rows.writerows(asdict(launch) for launch in done)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", type=Path, required=True, help="a folder that holds vllm/")
    parser.add_argument("--sm", type=int, action="append", help="an architecture; default 75, 80, 90, 100, 120")
    parser.add_argument("--write", type=Path, help="keep Triton's answers as CSV")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        compiler = Compiler(arguments.vllm, Path(scratch))
        asked = dict.fromkeys(launches(arguments.sm or [75, 80, 90, 100, 120]))
        done = [replace(launch, bytes=compiler.shared_bytes(launch)) for launch in asked]
    for launch in done:
        if launch.wrong:
            print(f"{astuple(launch)}: estimated at {launch.estimate_bytes}")
    wrong = sum(launch.wrong for launch in done)
    largest = max(done, key=lambda launch: launch.bytes)
    version = importlib.import_module("triton").__version__
    exact = sum(abs(launch.estimate_bytes - launch.bytes) <= 32 for launch in done)
    print(f"triton {version}: {len(done)} configurations of up to {largest.bytes} bytes")
    print(f"estimates: {exact} within 32 bytes, {wrong} wrong where it counts")
    if arguments.write:
        write(arguments.write, done)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
