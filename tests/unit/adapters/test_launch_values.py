"""What a launch is made of: the environment, the log's header, the words for its end."""

import pytest

from rotator.adapters.enginelog import redacted
from rotator.adapters.environment import engine_environment
from rotator.adapters.exits import in_words
from rotator.adapters.process import ProcessRef
from rotator.ports import LaunchSpec


def spec(**env: str) -> LaunchSpec:
    return LaunchSpec("dsv4-flash", "process", ("vllm", "serve"), env, "http://127.0.0.1:1", "x.log")


def test_an_engine_gets_what_it_needs_of_the_services_environment_and_no_more():
    own = {
        "PATH": "/bin",
        "LD_LIBRARY_PATH": "/lib",
        "CUDA_HOME": "/cuda",
        "NCCL_DEBUG": "INFO",
        "VLLM_CACHE_ROOT": "/c",
        "HF_TOKEN": "models need it",
        "https_proxy": "http://p",
        "NO_PROXY": "localhost",
        "LC_ALL": "C",
        "FALLBACK_API_KEY": "none of an engine's business",
        "ROTATOR_ADMIN_KEY": "nor this",
        "AWS_SECRET_ACCESS_KEY": "nor this",
        "PYTHONPATH": "the service's own",
    }
    got = engine_environment(own, spec(), "s1")
    kept = {name for name in own if name in got}
    assert set(own) - kept == {"FALLBACK_API_KEY", "ROTATOR_ADMIN_KEY", "AWS_SECRET_ACCESS_KEY", "PYTHONPATH"}
    assert got["SPT_NOENV"] == "1", "without it a process title overwrites the marks"


def test_the_configuration_overrides_what_is_inherited_but_never_the_marks():
    got = engine_environment({"PATH": "/bin"}, spec(PATH="/opt/bin", ROTATOR_ENGINE="other", SPT_NOENV=""), "s1")
    assert got == {
        "PATH": "/opt/bin",
        "SPT_NOENV": "",
        "PYTHONUNBUFFERED": "1",
        "ROTATOR_ENGINE": "dsv4-flash",
        "ROTATOR_SERVICE": "s1",
    }


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        (("vllm", "--api-key", "hunter2", "--port", "1"), ("vllm", "--api-key", "…", "--port", "1")),
        (("vllm", "--hf-token=hunter2", "m"), ("vllm", "--hf-token=…", "m")),
        (("vllm", "--max-tokens", "5", "--tokenizer=t"), ("vllm", "--max-tokens", "5", "--tokenizer=t")),
        (("python", "-c", "a\nb"), ("python", "-c", "a b")),
    ],
)
def test_the_header_of_a_log_shows_the_command_on_one_line_without_secrets(
    command: tuple[str, ...], shown: tuple[str, ...]
):
    assert redacted(command) == shown


@pytest.mark.parametrize(
    ("returncode", "words"),
    [
        (0, "exit code 0"),
        (3, "exit code 3"),
        (127, "not found (this is no engine crash)"),
        (126, "may not be executed (this is no engine crash)"),
        (-9, "SIGKILL"),
        (-11, "SIGSEGV"),
        (-34, "SIGRTMIN"),
        (-50, "signal 50"),
        (None, "exit code is not known"),
    ],
)
def test_an_end_is_told_in_words(returncode: int | None, words: str):
    assert words in in_words(returncode)


def test_a_damaged_reference_counts_as_lost():
    good = {"pid": 1, "start_ticks": 2, "boot_id": "b", "pgid": 1, "log_path": "l"}
    assert ProcessRef.of(good) == ProcessRef(1, 2, "b", 1, "l")
    assert ProcessRef.of({**good, "pid": None}) is None
    assert ProcessRef.of({"pid": 1}) is None
