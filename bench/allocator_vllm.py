"""Our allocator beside stock's in real vLLM: two engines that take turns on the same GPUs.

    python -m bench.allocator_vllm --allocator both --tp 1 --layers 36 --eager --level 1 --cycles 20 \\
        --vllm-pythonpath /opt/vsite --limit-s 580

One record a phase as a JSON line (also in $OUT, with the ends of the engines' logs), then a table with both side by
side. Each phase has a deadline; when the whole runs out of time, what is left is skipped and named. With --elastic two
engines whose weights fit together swap by their KV cache alone (choose --layers and --util so that they do). Exit code
1 when an answer changed, bytes were left or the plugin was not the one of this checkout.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import dummy_model
from bench.allocator_floor import rates_gib_s
from bench.vllm_engine import REPOSITORY, Answer, Engine, Load, environment, plugin_folder

WIDTHS = {"alpha": 25600, "beta": 25344}  # two sizes: dummy weights of equal shapes would be equal
PROMPTS = {"alpha": "models take turns on the gpus", "beta": "one machine serves more models than fit"}
TOKENS = 8
GIB = 1 << 30
PREPARE_S = 240.0


class OutOfTime(Exception):
    pass


@dataclass
class Bench:
    args: argparse.Namespace
    kind: str
    folder: Path
    weights_bytes: dict[str, int]
    end_s: float
    records: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    golden: dict[str, Answer] = field(default_factory=dict)
    engines: dict[str, Engine] = field(default_factory=dict)

    @property
    def ours(self) -> bool:
        return self.kind == "rotator"

    def record(self, phase: str, **values: Any) -> None:
        row = {"allocator": self.kind, "tp": self.args.tp, "phase": phase, **values}
        self.records.append(row)
        print(json.dumps(row), flush=True)

    def need(self, seconds: float, what: str) -> None:
        left = self.end_s - time.monotonic()
        if left < seconds:
            raise OutOfTime(f"{what} needs {seconds:.0f} s, {left:.0f} s are left")

    # -- phases --

    def start(self, name: str) -> Engine:
        self.need(100, f"starting {name}")
        settings = {"ROTATOR_ALLOCATOR_PREPARE": "1" if self.args.auto_prepare else "0"}
        plugin = plugin_folder(self.folder) if self.ours else None
        args = self.args
        arguments = [
            *([] if args.real_weights else ["--load-format", "dummy"]),
            *(["--enforce-eager"] if args.eager else []),
            *f"--tensor-parallel-size {args.tp} --max-model-len 8192 --gpu-memory-utilization {args.util}".split(),
            *args.vllm_arg,
        ]
        engine = Engine(
            name, self.folder / name, args.port + len(self.engines), arguments,
            environment(args.vllm_pythonpath, plugin, settings), self.folder / f"{self.kind}-{name}.log",
        )  # fmt: skip
        self.engines[name] = engine
        seconds = engine.start(min(400.0, self.end_s - time.monotonic()))
        if self.ours:
            self._attest(engine)
        self.golden[name] = engine.ask(PROMPTS[name], TOKENS)
        again = engine.ask(PROMPTS[name], TOKENS)
        self.record(
            "start",
            engine=name,
            seconds=round(seconds, 1),
            vram_mib=vram_mib(),
            answers_repeat=again.same(self.golden[name]),
            distinct_tokens=len(set(again.tokens)),
            awake_8_tokens_s=round(again.seconds, 4),
        )
        return engine

    def _attest(self, engine: Engine) -> None:
        for rank in engine.rpc("rotator_attest"):
            self.record("attest", engine=engine.name, **rank)
            if not rank["active"] or len(rank["libraries"]) != 1:
                self.problems.append(f"{engine.name}: a worker does not use our allocator: {rank}")

    def serve(self, engine: Engine) -> None:
        """Tokens a second before, while masters are taken, and after."""
        self.need(3 * self.args.serve_s + 40, "serving")
        with Load(engine) as load:
            time.sleep(3)
            before = load.window(self.args.serve_s)
            row: dict[str, Any] = {"tokens_s": round(before, 1)}
            if self.ours:
                begun = time.perf_counter()
                engine.rpc("rotator_prepare")
                self._await_prepared(engine)
                until = time.perf_counter()
                row["prepare_s"] = round(until - begun, 2)
                row["tokens_s_during_prepare"] = round(load.rate(begun, until), 1)
                row["tokens_s_after"] = round(load.window(self.args.serve_s), 1)
        self.record("serve", engine=engine.name, **row)

    def _await_prepared(self, engine: Engine) -> None:
        end = time.perf_counter() + PREPARE_S
        while True:
            states = [rank["prepare"] for rank in engine.rpc("rotator_memory")]
            if not any(state["running"] for state in states):
                break
            if time.perf_counter() > end:
                raise OutOfTime(f"prepare of {engine.name} did not end in {PREPARE_S:.0f} s: {states}")
            time.sleep(0.5)  # each question is a step of the workers' loop
        errors = [state["error"] for state in states if state["error"]]
        if errors:
            self.problems.append(f"prepare of {engine.name}: {errors}")

    def prepare(self, engine: Engine) -> None:
        if self.ours:
            begun = time.perf_counter()
            if not self.args.auto_prepare:
                engine.rpc("rotator_prepare")
            self._await_prepared(engine)
            self.record("prepare", engine=engine.name, seconds=round(time.perf_counter() - begun, 2))

    def sleep(self, engine: Engine, phase: str, **more: Any) -> float:
        seconds = engine.timed(f"/sleep?level={self.args.level}&mode=wait")
        self.record(phase, engine=engine.name, seconds=round(seconds, 4), **more, **self._inside(engine, "last_sleep"))
        return seconds

    def wake(self, engine: Engine, phase: str, **more: Any) -> tuple[float, Answer]:
        """Seconds until it is fit to serve, and its first answer."""
        begun = time.perf_counter()
        engine.call("POST", "/wake_up")
        if self.args.level == 2:
            engine.rpc("reload_weights")
            engine.call("POST", "/reset_prefix_cache")
        seconds = time.perf_counter() - begun
        answer = engine.ask(PROMPTS[engine.name], TOKENS)
        same = answer.same(self.golden[engine.name])
        if not same:
            self.problems.append(f"{phase} {more}: {engine.name} answered differently")
        self.record(
            phase, engine=engine.name, seconds=round(seconds, 4), first_8_tokens_s=round(answer.seconds, 4), same=same,
            **more, **self._inside(engine, "last_wake"),
        )  # fmt: skip
        return seconds, answer

    def _inside(self, engine: Engine, report: str) -> dict[str, Any]:
        """The allocator's own report, of the slowest rank."""
        if not self.ours:
            return {}
        wall = report.removeprefix("last_")
        reports = [
            {**rank[report], "wall_s": rank["wall_s"].get(wall)}
            for rank in engine.rpc("rotator_memory")
            if rank[report]
        ]
        slowest: dict[str, Any] = max(reports, key=lambda one: float(one["seconds"]), default={})
        return {"inside": {k: round(v, 5) if isinstance(v, float) else v for k, v in slowest.items()}}

    def cycle(self, number: int) -> None:
        alpha, beta = self.engines["alpha"], self.engines["beta"]
        self.need(12, f"cycle {number}")
        self.wake(alpha, "wake", cycle=number)
        begun = time.perf_counter()
        self.sleep(alpha, "sleep", cycle=number)
        slept = time.perf_counter()
        woke, answer = self.wake(beta, "wake", cycle=number)
        # Reports are fetched in between and belong to no swap: its parts are added up instead.
        self.record("swap", cycle=number, seconds=round(self._last("sleep") + woke + answer.seconds, 4))
        self.sleep(beta, "sleep", cycle=number)
        if slept - begun > 60:
            self.problems.append(f"cycle {number}: a sleep took {slept - begun:.0f} s")

    def _last(self, phase: str) -> float:
        return float(next(row["seconds"] for row in reversed(self.records) if row["phase"] == phase))

    def elastic(self) -> None:
        """Both engines keep their weights on the GPUs, one holds a KV cache; a swap hands that over."""
        self.need(60, "elastic swaps")
        alpha, beta = self.engines["alpha"], self.engines["beta"]
        kv = {e.name: max(_bytes(rank["usage"], "kv_cache") for rank in e.rpc("rotator_memory")) for e in (alpha, beta)}
        room = device_bytes() - max(kv.values()) - sum(self.weights_bytes.values()) // self.args.tp - 8 * GIB
        if room < 0:
            self.record("elastic", skipped=f"weights of both and one KV cache lack {-room / GIB:.1f} GiB a GPU")
            return
        alpha.call("POST", "/wake_up")
        self.hand_over(alpha, kv["alpha"])
        beta.call("POST", "/wake_up")
        for number in range(self.args.elastic):
            away, here = (beta, alpha) if number % 2 == 0 else (alpha, beta)
            begun = time.perf_counter()
            self.hand_over(away, kv[away.name])
            gave = time.perf_counter()
            here.rpc("rotator_wake")
            here.call("POST", "/wake_up?tags=scheduling")
            took = time.perf_counter()
            answer = here.ask(PROMPTS[here.name], TOKENS)
            same = answer.same(self.golden[here.name])
            if not same:
                self.problems.append(f"elastic swap {number}: {here.name} answered differently")
            self.record(
                "elastic_swap",
                number=number,
                seconds=round(took - begun + answer.seconds, 4),
                give_s=round(gave - begun, 4),
                take_s=round(took - gave, 4),
                first_8_tokens_s=round(answer.seconds, 4),
                same=same,
                give_inside=self._inside(away, "last_sleep"),
                take_inside=self._inside(here, "last_wake"),
            )

    @staticmethod
    def hand_over(engine: Engine, nbytes: int) -> None:
        engine.call("POST", "/sleep?level=0&mode=keep")
        engine.call("POST", "/reset_prefix_cache?reset_running_requests=true")
        engine.rpc("rotator_sleep_bytes", nbytes)

    def run(self) -> None:
        self._drained()
        idle = vram_mib()
        host_before = settled_host_bytes()
        try:
            alpha = self.start("alpha")
            self.serve(alpha)
            self.prepare(alpha)
            self.sleep(alpha, "first_sleep", vram_mib=vram_mib())
            beta = self.start("beta")
            self.prepare(beta)
            self.sleep(beta, "first_sleep", vram_mib=vram_mib())
            self._rest(idle, host_before)
            for number in range(self.args.cycles):
                self.cycle(number)
            self._rest(idle, host_before)
            if self.ours and self.args.elastic:
                self.elastic()
        except OutOfTime as error:
            self.record("skipped", reason=str(error))
        except (Exception, SystemExit) as error:  # whatever it is, the engines' logs say more
            self.problems.append(repr(error)[:500])
            self.record("failed", reason=repr(error)[:500])
            for engine in self.engines.values():
                print(f"---- {engine.log} ends:\n{engine.tail()}", flush=True)
        finally:
            self._stop()

    def _rest(self, idle: list[int], host_before: int) -> None:
        """What two sleeping engines leave on the GPUs and take on the host, and the copy floor of this machine now."""
        weights = sum(self.weights_bytes.values())
        masters = {}
        if self.ours:
            ranks = [rank["host"] for e in self.engines.values() for rank in e.rpc("rotator_memory")]
            masters = {
                "masters_over_weights": round(sum(int(rank["bytes_used"]) for rank in ranks) / weights, 4),
                "registered_over_weights": round(sum(int(rank["bytes_registered"]) for rank in ranks) / weights, 4),
            }
        left = [used - before for used, before in zip(vram_mib(), idle, strict=True)]
        rates = rates_gib_s(self.args.tp, 4.0, 8)
        per_gpu = max(self.weights_bytes.values()) / self.args.tp / GIB
        self.record(
            "rest", residue_mib=left, weights_gib=round(weights / GIB, 2),
            **masters,
            host_used_gib=round((host_used_bytes() - host_before) / GIB, 2), floor_gib_s=[round(r, 2) for r in rates],
            floor_s=round(per_gpu / min(rates), 4),
        )  # fmt: skip

    def _stop(self) -> None:
        if self.args.check_exit and len(self.engines) == 2 and not self.problems:
            code = self.engines["beta"].terminate(60)
            self.record(
                "exit", engine="beta", code=code, pure_virtual="pure virtual" in self.engines["beta"].tail(20000)
            )
        for engine in self.engines.values():
            engine.stop()
        self._drained()
        out = os.environ.get("OUT")
        if out:
            name = f"allocator_vllm-{self.kind}-tp{self.args.tp}"
            Path(out, f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in self.records))
            logs = "\n".join(f"==== {e.log.name}\n{e.tail(400_000)}" for e in self.engines.values())
            Path(out, f"{name}.log").write_text(logs)

    @staticmethod
    def _drained() -> None:
        """The next allocator starts on empty GPUs."""
        end = time.monotonic() + 30
        while max(vram_mib()) > 2000 and time.monotonic() < end:
            time.sleep(0.5)


def _bytes(usage: list[dict[str, Any]], tag: str) -> int:
    """Of one device; a rank has one."""
    return max((int(row["bytes_mapped"]) for row in usage if row["tag"] == tag), default=0) or max(
        (int(row["bytes_allocated"]) for row in usage if row["tag"] == tag), default=0
    )


def _smi(query: str) -> list[int]:
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return [int(line) for line in shown.split()]


def vram_mib() -> list[int]:
    return _smi("memory.used")


def device_bytes() -> int:
    return min(_smi("memory.total")) << 20


def settled_host_bytes() -> int:
    """Used host memory once what the last engines pinned has come back: when it stood still for two seconds."""
    used, still = host_used_bytes(), 0
    for _ in range(60):
        time.sleep(0.5)
        before, used = used, host_used_bytes()
        still = still + 1 if abs(used - before) < 64 << 20 else 0
        if still == 4:
            break
    return used


def host_used_bytes() -> int:
    values = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return 1024 * (int(values["MemTotal"].split()[0]) - int(values["MemAvailable"].split()[0]))


ROWS: list[tuple[str, Callable[[dict[str, Any]], bool], str]] = [
    ("first sleep, s", lambda r: r["phase"] == "first_sleep", "seconds"),
    ("later sleep, s", lambda r: r["phase"] == "sleep", "seconds"),
    ("wake, s", lambda r: r["phase"] == "wake", "seconds"),
    ("copy floor, s", lambda r: r["phase"] == "rest", "floor_s"),
    ("first 8 tokens after a wake, s", lambda r: r["phase"] == "wake", "first_8_tokens_s"),
    ("swap with 8 tokens, s", lambda r: r["phase"] == "swap", "seconds"),
    ("elastic swap with 8 tokens, s", lambda r: r["phase"] == "elastic_swap", "seconds"),
    ("tokens/s before prepare", lambda r: r["phase"] == "serve", "tokens_s"),
    ("tokens/s during prepare", lambda r: r["phase"] == "serve", "tokens_s_during_prepare"),
    ("tokens/s after prepare", lambda r: r["phase"] == "serve", "tokens_s_after"),
    ("prepare, s", lambda r: r["phase"] == "serve", "prepare_s"),
    ("host memory taken, GiB", lambda r: r["phase"] == "rest", "host_used_gib"),
    ("masters over weights", lambda r: r["phase"] == "rest", "masters_over_weights"),
    ("registered over weights", lambda r: r["phase"] == "rest", "registered_over_weights"),
    ("cold start, s", lambda r: r["phase"] == "start", "seconds"),
]


def table(benches: list[Bench]) -> str:
    lines = [f"{'median (max)':32}" + "".join(f"{bench.kind:>22}" for bench in benches)]
    for title, wanted, key in ROWS:
        cells = []
        for bench in benches:
            values = [float(row[key]) for row in bench.records if wanted(row) and row.get(key) is not None]
            cells.append(f"{statistics.median(values):.3f} ({max(values):.3f})" if values else "–")
        if any(cell != "–" for cell in cells):
            lines.append(f"{title:32}" + "".join(f"{cell:>22}" for cell in cells))
    residue = [[str(r["residue_mib"]) for r in bench.records if r["phase"] == "rest"][-1:] for bench in benches]
    lines.append(f"{'residue, MiB a GPU':32}" + "".join(f"{cell[0] if cell else '–':>22}" for cell in residue))
    return "\n".join(lines)


def main() -> int:
    args = _arguments()
    end_s = time.monotonic() + args.limit_s
    if shutil.which("nvidia-smi") is None:
        raise SystemExit("nvidia-smi is not here: this needs a machine with a GPU")
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: make_model(folder / name, args, seed) for seed, name in enumerate(WIDTHS, start=1)}
    kinds = ["stock", "rotator"] if args.allocator == "both" else [args.allocator]
    benches = []
    for number, kind in enumerate(kinds):
        share = (end_s - time.monotonic()) / (len(kinds) - number)
        bench = Bench(args, kind, folder, weights, time.monotonic() + share)
        benches.append(bench)
        bench.run()
    mode = "eager" if args.eager else "graphs"
    print(f"\n{os.environ.get('ROTATOR_COMMIT', '')} tp {args.tp}, {mode}, level {args.level}, "
          f"weights {[f'{b / GIB:.1f} GiB' for b in weights.values()]}, {args.cycles} cycles")  # fmt: skip
    print(table(benches))
    problems = [f"{bench.kind}: {problem}" for bench in benches for problem in bench.problems]
    print("\n".join(problems) or "every answer the same")
    return 1 if any(bench.problems for bench in benches if bench.ours) else 0


def make_model(folder: Path, args: argparse.Namespace, seed: int) -> int:
    """Returns the bytes of its weights, which are written only when they are to be read."""
    width = WIDTHS[folder.name]
    vocabulary = dummy_model.describe(folder, layers=args.layers, intermediate=width)
    if args.real_weights:  # in a process of its own, so that none of the GPU stays taken
        options = {"--layers": args.layers, "--intermediate": width, "--seed": seed}
        flags = [str(part) for option in options.items() for part in option]
        command = [sys.executable, "-m", "bench.dummy_model", str(folder), *flags]
        subprocess.run(command, cwd=REPOSITORY, check=True, timeout=300)
    return dummy_model.weights_bytes(args.layers, width, vocabulary)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--allocator", choices=("stock", "rotator", "both"), default="both")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--layers", type=int, default=36)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--eager", action="store_true", help="no CUDA graphs")
    mode.add_argument("--graphs", dest="eager", action="store_false", help="CUDA graphs (the default)")
    parser.add_argument("--level", type=int, choices=(1, 2), default=1)
    parser.add_argument("--cycles", type=int, default=20)
    parser.add_argument("--elastic", type=int, default=0, help="how many elastic swaps after the cycles")
    parser.add_argument("--real-weights", action="store_true", help="random weights on disk; always so at level 2")
    parser.add_argument("--util", type=float, default=0.85, help="--gpu-memory-utilization of both engines")
    parser.add_argument("--serve-s", type=float, default=6.0)
    parser.add_argument("--auto-prepare", action="store_true", help="leave it to the plugin when masters are taken")
    parser.add_argument("--check-exit", action="store_true", help="end an engine with SIGTERM and report its exit code")
    parser.add_argument("--limit-s", type=float, default=570.0, help="for everything")
    parser.add_argument("--port", type=int, default=8511)
    parser.add_argument("--vllm-pythonpath", default="")
    parser.add_argument("--vllm-arg", action="append", default=[])
    parser.add_argument("--folder", type=Path, default=Path("/tmp/allocator_vllm"))
    args = parser.parse_args()
    args.real_weights = args.real_weights or args.level == 2  # vLLM does not reload dummy weights
    return args


if __name__ == "__main__":
    sys.exit(main())
