"""A real vLLM engine for measurements: started, asked, put to sleep and killed, each with a deadline."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
START_S = 330.0
CALL_S = 120.0


def environment(vllm_pythonpath: str, plugin: Path | None, settings: dict[str, str]) -> dict[str, str]:
    """What an engine needs on a machine without network; with our plugin when `plugin` is its folder."""
    paths = [str(plugin), str(REPOSITORY)] if plugin else []
    env = {
        "VLLM_SERVER_DEV_MODE": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "NCCL_NVLS_ENABLE": "0",
        "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1",
        "VLLM_ALLREDUCE_USE_SYMM_MEM": "0", "OMP_NUM_THREADS": "8", "VLLM_LOGGING_LEVEL": "INFO",
        "ROTATOR_ALLOCATOR": "on" if plugin else "off",
        "PYTHONPATH": os.pathsep.join([*paths, *([vllm_pythonpath] if vllm_pythonpath else [])]),
    }  # fmt: skip
    return {**os.environ, **env, **settings}


def plugin_folder(parent: Path) -> Path:
    """A folder for PYTHONPATH that makes a checkout's plugin known as an installed package's would be."""
    info = parent / "plugin" / "rotator_checkout-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rotator-checkout\nVersion: 0\n")
    entry = "[vllm.general_plugins]\nrotator_allocator = allocator.vllm:register\n"
    (info / "entry_points.txt").write_text(entry)
    return info.parent


@dataclass(frozen=True)
class Answer:
    seconds: float
    tokens: list[str]
    logprobs: list[float]

    def same(self, other: "Answer") -> bool:
        return self.tokens == other.tokens and self.logprobs == other.logprobs


@dataclass
class Engine:
    name: str
    model: Path
    port: int
    arguments: list[str]
    env: dict[str, str]
    log: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self, deadline_s: float = START_S) -> float:
        """Seconds until it answers. Raises SystemExit with the end of its log."""
        command = [
            sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(self.model), "--served-model-name",
            self.name, "--enable-sleep-mode", "--host", "127.0.0.1", "--port", str(self.port), *self.arguments,
        ]  # fmt: skip
        begun = time.perf_counter()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=self.env, start_new_session=True)
        while True:
            try:
                self.call("GET", "/health", timeout_s=2)
                return time.perf_counter() - begun
            except OSError:
                if self.process.poll() is not None or time.perf_counter() - begun > deadline_s:
                    raise SystemExit(f"{self.name} did not start:\n{self.tail()}") from None
                time.sleep(0.25)

    def stop(self) -> None:
        if self.process is None:
            return
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(30)
        except ProcessLookupError:  # it and all that it started are gone already
            return
        except subprocess.TimeoutExpired:
            print(f"{self.name} did not end within 30 s of SIGKILL", flush=True)

    def terminate(self, deadline_s: float) -> int | None:
        """Ask it to end. Returns its exit code, or None when it did not end in time."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            return None

    def tail(self, nbytes: int = 6000) -> str:
        return self.log.read_text(errors="replace")[-nbytes:]

    def call(self, method: str, path: str, body: Any = None, *, timeout_s: float = CALL_S) -> Any:
        """The JSON of an answer, or None when it is empty. Raises OSError, also for a status that is no success."""
        data = None if body is None and method == "GET" else json.dumps(body or {}).encode()
        url = f"http://127.0.0.1:{self.port}{path}"
        request = urllib.request.Request(url, data=data, method=method, headers={"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            detail = error.read()[:2000].decode(errors="replace")
            raise OSError(f"{method} {path} on {self.name}: {error.code} {detail}") from None
        return json.loads(text) if text.strip() else None

    def rpc(self, method: str, *args: Any, timeout_s: float = CALL_S) -> list[Any]:
        """A worker method's answers, one a rank."""
        body = {"method": method, "args": list(args), "timeout": timeout_s}
        answer = self.call("POST", "/collective_rpc", body, timeout_s=timeout_s)
        return list(answer["results"]) if answer else []

    def timed(self, path: str) -> float:
        begun = time.perf_counter()
        self.call("POST", path)
        return time.perf_counter() - begun

    def ask(self, prompt: str, tokens: int) -> Answer:
        begun = time.perf_counter()
        body = {
            "model": self.name, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
            "logprobs": 1, "return_tokens_as_token_ids": True,
        }  # fmt: skip
        choice = self.call("POST", "/v1/completions", body)["choices"][0]["logprobs"]
        seconds = time.perf_counter() - begun
        return Answer(seconds, choice["tokens"], [round(value, 4) for value in choice["token_logprobs"]])


@dataclass
class Load:
    """Streams that never end by themselves, to see how fast an engine serves at any time."""

    engine: Engine
    streams: int = 8
    tokens: int = 4096
    stamps: list[float] = field(default_factory=list)
    stopping: threading.Event = field(default_factory=threading.Event)
    threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> "Load":
        self.threads = [threading.Thread(target=self._stream, args=(i,), daemon=True) for i in range(self.streams)]
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stopping.set()
        for thread in self.threads:
            thread.join(30)

    def rate(self, since: float, until: float) -> float:
        """Tokens a second of all streams between two readings of time.perf_counter()."""
        return sum(since <= stamp < until for stamp in list(self.stamps)) / (until - since)

    def window(self, seconds: float) -> float:
        begun = time.perf_counter()
        time.sleep(seconds)
        return self.rate(begun, time.perf_counter())

    def _stream(self, number: int) -> None:
        body = {
            "model": self.engine.name, "prompt": f"{number} models take turns on the gpus", "max_tokens": self.tokens,
            "temperature": 0, "ignore_eos": True, "stream": True,
        }  # fmt: skip
        url = f"http://127.0.0.1:{self.engine.port}/v1/completions"
        headers = {"content-type": "application/json"}
        while not self.stopping.is_set():
            request = urllib.request.Request(url, data=json.dumps(body).encode(), headers=headers)
            try:
                with urllib.request.urlopen(request, timeout=CALL_S) as lines:
                    for line in lines:
                        if line.startswith(b"data: {"):
                            self.stamps.append(time.perf_counter())
                        if self.stopping.is_set():
                            return
            except OSError as error:
                print(f"a stream of {self.engine.name} ended: {error}", flush=True)
                return
