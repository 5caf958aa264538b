"""Real vLLM engines that cannot be awake together, rotated through the gateway by a real OpenAI client.

    python -m bench.rotation --gpus 1 --layers 16 [--rotations 20] [--vllm-pythonpath /opt/vsite] [--json FILE]

Starts `rotator serve` with two engines, forces the rotations, freezes long streams across swaps, kills the service
with SIGKILL half-way and starts it again, and prints what a swap costs as the client sees it and what of that is the
engine's own sleep and wake, the drain and the canary. Exit code 1 when an answer differs, a stream is cut, VRAM does
not come back, or the service added more than 50 ms (median) to a swap.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.dummy_model import write

MODELS = {"alpha": (25600, 1), "beta": (25344, 2)}  # name: (intermediate size, seed)
PROMPTS = {"alpha": "models take turns on the gpus", "beta": "one machine serves more models than fit"}
ADDED_MAX_MS = 50.0
START_S = 400.0


@dataclass
class Rotation:
    number: int
    model: str
    client_ms: float  # request to first token, less the same while awake
    drain_ms: float
    sleep_ms: float
    verify_ms: float
    wake_ms: float
    canary_ms: float
    total_ms: float
    added_ms: float
    same_answer: bool
    vram_left_mib: float


@dataclass
class Result:
    machine: str
    vllm: str
    commit: str
    weights_gib: float
    rotations: list[Rotation] = field(default_factory=list)
    awake_ttft_ms: dict[str, float] = field(default_factory=dict)
    streams: int = 0
    streams_repeatable: int = 0
    streams_whole: int = 0
    streams_same: int = 0
    freezes: int = 0
    restarted: bool = False
    restart_s: float = 0.0
    ledger_matches: bool = False
    problems: list[str] = field(default_factory=list)


class Fleet:
    """The service as a process, and what its operators' side answers."""

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self.folder, self.args = folder, args
        self.url = "http://127.0.0.1:8400"
        self.process: subprocess.Popen[bytes] | None = None
        self._events: list[dict[str, Any]] = []

    def configure(self) -> None:
        engines = []
        for i, name in enumerate(MODELS):
            share = str(self.args.share)
            command = [
                sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(self.folder / name),
                "--served-model-name", name, "--enable-sleep-mode", "--host", "127.0.0.1", "--port", "{port}",
                "--tensor-parallel-size", "{tp}", "--max-model-len", "8192", "--gpu-memory-utilization", share,
                *self.args.vllm_arg,
            ]  # fmt: skip
            engines.append(
                {
                    "name": name,
                    "gpus": list(range(self.args.gpus)),
                    "port": 8501 + i,
                    "model_path": str(self.folder / name),
                    "command": command,
                    "env": _vllm_env(self.args.vllm_pythonpath),
                    "start_deadline_s": START_S,
                }
            )
        fleet = {
            "bind": {"port": 8400},
            "state_dir": str(self.folder / "state"),
            "engines": engines,
            "host_memory_gib": self.args.host_gib,
            "policies": {"min_stay_s": 0, "drain_bound_s": 0.2},
            "gateway": {"freezes_max": 1000, "keepalive_s": 2},
        }
        (self.folder / "fleet.yaml").write_text(json.dumps(fleet))  # JSON is YAML

    def start(self) -> None:
        log = (self.folder / "service.log").open("ab")
        command = [sys.executable, "-m", "rotator", "serve", "-c", str(self.folder / "fleet.yaml")]
        self.process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + 120
        while True:
            try:
                self.get("/readyz")
                return
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit((self.folder / "service.log").read_text()[-4000:]) from None
                time.sleep(0.1)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        for name in MODELS:
            try:
                self.post(f"/engines/{name}/stop?wait=true&deadline_s=60")
            except OSError as e:
                print(f"stopping {name}: {e}", file=sys.stderr)
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return json.loads(answer.read() or b"null")

    def post(self, path: str) -> Any:
        request = urllib.request.Request(self.url + path, data=b"{}", headers={"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.loads(answer.read() or b"null")

    def last_swap(self, model: str, after_wall_s: float) -> dict[str, float]:
        """Phases of the newest swap that woke the model, from the journal."""
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            rows = self.get(f"/ledger?table=transitions&engine={model}&action=wake&limit=1")["rows"]
            if rows and rows[0]["result"] == "ok" and rows[0]["opened_at_wall_s"] >= after_wall_s:
                return dict(rows[0]["phases_s"])
            time.sleep(0.02)
        raise SystemExit(f"the journal shows no finished wake of {model}")


def _vllm_env(pythonpath: str) -> dict[str, str]:
    env = {
        "VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1", "NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
        "NVSHMEM_DISABLE_NVLS": "1", "VLLM_ALLREDUCE_USE_SYMM_MEM": "0", "OMP_NUM_THREADS": "8",
    }  # fmt: skip
    return {**env, "PYTHONPATH": pythonpath} if pythonpath else env


def _client(fleet: Fleet) -> Any:
    import openai

    return openai.OpenAI(base_url=f"{fleet.url}/v1", api_key="none", max_retries=0, timeout=START_S + 60)


def ask(client: Any, model: str, tokens: int, prompt: str) -> tuple[float, list[str]]:
    """One greedy streamed completion: (milliseconds to the first token, the tokens)."""
    begun = time.perf_counter()
    first, seen = 0.0, []
    stream = client.completions.create(
        model=model, prompt=prompt, max_tokens=tokens, temperature=0, stream=True, logprobs=1,
        extra_body={"ignore_eos": True, "return_tokens_as_token_ids": True},
    )  # fmt: skip
    for chunk in stream:
        if chunk.choices and chunk.choices[0].logprobs:
            first = first or 1000 * (time.perf_counter() - begun)
            seen += chunk.choices[0].logprobs.tokens
    return first, seen


class LongStream(threading.Thread):
    """A stream that must live through many swaps."""

    def __init__(self, client: Any, model: str, tokens: int, prompt: str) -> None:
        super().__init__(daemon=True)
        self.args = (client, model, tokens, prompt)
        self.tokens: list[str] = []
        self.error: str | None = None

    def run(self) -> None:
        try:
            _, self.tokens = ask(*self.args)
        except Exception as e:
            self.error = repr(e)


def measure(fleet: Fleet, args: argparse.Namespace, result: Result) -> None:
    client = _client(fleet)
    golden = {}
    for name in MODELS:
        golden[name] = ask(client, name, args.tokens, PROMPTS[name])[1]
        times = [ask(client, name, args.tokens, PROMPTS[name])[0] for _ in range(5)]
        result.awake_ttft_ms[name] = statistics.median(times)
        print(f"{name}: awake TTFT {result.awake_ttft_ms[name]:.1f} ms, {len(set(golden[name]))} distinct", flush=True)
    names = list(MODELS)
    for number in range(args.rotations):
        if number == args.rotations // 2:
            _restart(fleet, result)
        model = names[number % 2]
        result.rotations.append(_rotate(fleet, client, result, number, model, golden[model], args))
    _frozen_streams(fleet, client, args, result)
    check = fleet.get("/ledger/check")
    result.ledger_matches = check["matches"]
    if not check["matches"]:
        result.problems.append(f"ledger differs: {check['differences']}")


def _rotate(
    fleet: Fleet, client: Any, result: Result, number: int, model: str, golden: list[str], args: argparse.Namespace
) -> Rotation:
    began_wall = time.time()
    first, tokens = ask(client, model, args.tokens, PROMPTS[model])
    client_ms = first - result.awake_ttft_ms[model]
    phases = {k: 1000 * v for k, v in fleet.last_swap(model, began_wall - 1).items()}
    drain, sleep, wake = (phases.get(k, 0.0) for k in ("drain", "sleep", "wake"))
    verify, canary = phases.get("verify", 0.0), phases.get("canary", 0.0)
    other = fleet.get(f"/engines/{next(n for n in MODELS if n != model)}")
    left = max(other["held_bytes"]) / (1 << 20)
    row = Rotation(
        number, model, client_ms, drain, sleep, verify, wake, canary, phases.get("total", 0.0),
        client_ms - drain - sleep - wake - canary, tokens == golden, left,
    )  # fmt: skip
    if not row.same_answer:
        result.problems.append(f"rotation {number}: {model} answered differently")
    if other["state"] != "asleep" or left > args.residue_max_mib:
        result.problems.append(f"rotation {number}: {other['name']} is {other['state']} and holds {left:.0f} MiB")
    print({k: round(v, 1) if isinstance(v, float) else v for k, v in asdict(row).items()}, flush=True)
    return row


def _restart(fleet: Fleet, result: Result) -> None:
    """Kill the service at once; its engines live on and are adopted."""
    before = {e["name"]: (e["state"], e["pids"]) for e in fleet.get("/engines")}
    begun = time.perf_counter()
    fleet.kill()
    fleet.start()
    result.restart_s = time.perf_counter() - begun
    after = {e["name"]: (e["state"], e["pids"]) for e in fleet.get("/engines")}
    result.restarted = before == after
    print(f"service killed and back in {result.restart_s:.1f} s, engines as before: {result.restarted}", flush=True)
    if not result.restarted:
        result.problems.append(f"after the restart: {before} became {after}")


def _frozen_streams(fleet: Fleet, client: Any, args: argparse.Namespace, result: Result) -> None:
    """Long streams on one model while the other is asked again and again: each request freezes them once.

    The undisturbed run is the same three streams side by side, twice: what differs there already (bf16 sums depend on
    the batch) cannot be asked of a frozen stream.
    """
    prompts = [PROMPTS["alpha"] + tail for tail in ("", " and wait", " and go on" * 20)]
    golden, again = (_side_by_side(fleet, args, prompts) for _ in range(2))
    before = fleet.get("/engines/alpha")["sleeps"]
    frozen = _side_by_side(fleet, args, prompts, lambda: _freeze_again_and_again(client, args))
    result.freezes = fleet.get("/engines/alpha")["sleeps"] - before
    result.streams = len(prompts)
    result.streams_repeatable = sum(a.tokens == g.tokens for a, g in zip(again, golden, strict=True))
    result.streams_same = sum(f.tokens == g.tokens for f, g in zip(frozen, golden, strict=True))
    result.streams_whole = sum(len(f.tokens) == args.long_tokens for f in frozen)
    print(
        f"{result.streams} streams of {args.long_tokens} tokens ({[len(set(g.tokens)) for g in golden]} distinct): "
        f"{result.streams_repeatable} equal in two calm runs; over {result.freezes} freezes "
        f"{result.streams_whole} whole, {result.streams_same} equal",
        flush=True,
    )
    for stream, want, calm in zip(frozen, golden, again, strict=True):
        if len(stream.tokens) != args.long_tokens:
            result.problems.append(f"a stream ended after {len(stream.tokens)} tokens: {stream.error}")
        elif calm.tokens == want.tokens and stream.tokens != want.tokens:
            pairs = zip(stream.tokens, want.tokens, strict=False)
            at = next((i for i, (a, b) in enumerate(pairs) if a != b), -1)
            result.problems.append(
                f"a stream differs at token {at} of {len(want.tokens)} ({len(stream.tokens)} came): {stream.error}"
            )


def _side_by_side(
    fleet: Fleet, args: argparse.Namespace, prompts: list[str], meanwhile: Callable[[], None] | None = None
) -> list[LongStream]:
    streams = [LongStream(_client(fleet), "alpha", args.long_tokens, p) for p in prompts]
    for stream in streams:
        stream.start()
    if meanwhile:
        meanwhile()
    for stream in streams:
        stream.join(300)
    return streams


def _freeze_again_and_again(client: Any, args: argparse.Namespace) -> None:
    for _ in range(args.freezes):
        time.sleep(args.freeze_every_s)
        ask(client, "beta", 2, PROMPTS["beta"])


def report(result: Result) -> None:
    rows = result.rotations[1:] if len(result.rotations) > 1 else result.rotations
    print(f"\n{result.machine}, vLLM {result.vllm}, commit {result.commit}, weights {result.weights_gib:.1f} GiB each")
    print(f"{'median of ' + str(len(rows)) + ' swaps':<28}{'ms':>10}{'max':>10}")
    for name in ("client_ms", "drain_ms", "sleep_ms", "wake_ms", "canary_ms", "verify_ms", "added_ms"):
        values = [getattr(row, name) for row in rows]
        print(f"{name:<28}{statistics.median(values):>10.1f}{max(values):>10.1f}")
    if statistics.median(r.added_ms for r in rows) > ADDED_MAX_MS:
        result.problems.append("the service added more than 50 ms (median) to a swap")
    print("\n".join(result.problems) or "every answer the same, every byte back, nothing lost")


def main() -> int:
    args = _arguments()
    folder = args.folder.resolve()
    sizes = [
        write(folder / name, layers=args.layers, intermediate=width, seed=seed)
        for name, (width, seed) in MODELS.items()
    ]
    print(f"models written: {[f'{s / (1 << 30):.1f} GiB' for s in sizes]}", flush=True)
    result = Result(_machine(), _vllm(args), os.environ.get("ROTATOR_COMMIT", ""), max(sizes) / (1 << 30))
    fleet = Fleet(folder, args)
    fleet.configure()
    fleet.start()
    try:
        measure(fleet, args, result)
    finally:
        fleet.stop()
        _show_log(folder)
    report(result)
    if args.json:
        args.json.write_text(json.dumps(asdict(result), indent=1))
    return 1 if result.problems else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rotations", type=int, default=20)
    parser.add_argument("--freezes", type=int, default=6)
    parser.add_argument("--freeze-every-s", type=float, default=0.7)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--long-tokens", type=int, default=600)
    parser.add_argument("--share", type=float, default=0.85, help="--gpu-memory-utilization of both engines")
    parser.add_argument("--host-gib", type=float, default=110)
    parser.add_argument("--residue-max-mib", type=float, default=3000)
    parser.add_argument("--vllm-pythonpath", default="")
    parser.add_argument("--vllm-arg", action="append", default=[])
    parser.add_argument("--folder", type=Path, default=Path("rotation"))
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def _machine() -> str:
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    gpus = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip().splitlines()
    return f"{len(gpus)} × {gpus[0] if gpus else 'no GPU'}, {os.cpu_count()} cores, Python {platform.python_version()}"


def _vllm(args: argparse.Namespace) -> str:
    code = "from importlib.metadata import version; print(version('vllm'))"
    env = {**os.environ, **_vllm_env(args.vllm_pythonpath)}
    shown = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    return shown.stdout.strip() or "unknown"


def _show_log(folder: Path) -> None:
    text = (folder / "service.log").read_text(errors="replace")
    lines = [line for line in text.splitlines() if "ERROR" in line or "Traceback" in line or "WARNING" in line]
    print("\n".join(lines[-20:]))


if __name__ == "__main__":
    sys.exit(main())
