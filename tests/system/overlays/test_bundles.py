"""Bundles on a disk: whole or not there, never in the way of the vLLM that they are for."""

import hashlib
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from overlays import bundle, registry
from overlays.cli import app
from overlays.errors import BundleBroken, OverlayError, RequiredFailed
from overlays.sources import Memory, Tree
from tests.overlay_sleep_files import CUMEM, MIDDLE, OLD, stock

SLEEP = ("attest", "driver-state", "failed-rank-guard", "stream-aware-free", "transactional-wake")
PATCHES = registry.chosen(registry.all_patches(), SLEEP, ())
FEW = registry.chosen(PATCHES, ("attest", "failed-rank-guard"), ())  # three files
ONLY = [word for name in SLEEP for word in ("--only", name)]


def command(*words: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """vLLM as an image keeps it: under /opt, in a folder that cannot be written."""
    site = tmp_path / "image" / "opt" / "venv" / "site-packages"
    for path, text in {**stock(MIDDLE), "vllm/__init__.py": ""}.items():
        file = site / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    metadata = site / "vllm-0.26.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.4\nName: vllm\nVersion: 0.26.0\n")
    return tmp_path / "image"


def picture(folder: Path) -> dict[str, tuple[int, str]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_bundle_is_named_by_its_content_and_built_once(installed: Path, tmp_path: Path) -> None:
    root, before = tmp_path / "bundles", picture(installed)
    code, out, _ = command("build", "--out", root, "--from", installed, *ONLY, "--json")
    first = json.loads(out)
    assert (code, first["existed"]) == (0, False)
    assert Path(first["path"]).name == first["manifest"]["bundle"]
    made = picture(root)
    code, out, _ = command("build", "--out", root, "--from", installed, *ONLY, "--json")
    again = json.loads(out)
    assert (code, again["existed"], again["path"]) == (0, True, first["path"])
    assert {k: v for k, v in picture(root).items() if "files" in k} == {k: v for k, v in made.items() if "files" in k}
    assert picture(installed) == before


def test_the_same_files_give_the_same_bundle_wherever_they_lie(installed: Path, tmp_path: Path) -> None:
    here = bundle.build(Tree(installed), PATCHES, tmp_path / "a")
    there = bundle.build(Memory(stock(MIDDLE), "0.26.0"), PATCHES, tmp_path / "b")
    assert here.path.name == there.path.name


def test_a_fork_of_the_same_version_is_another_build(tmp_path: Path) -> None:
    fork = stock(MIDDLE)
    fork[CUMEM] += "\n# ours\n"
    one = bundle.build(Memory(stock(MIDDLE), "0.26.0"), PATCHES, tmp_path)
    other = bundle.build(Memory(fork, "0.26.0"), PATCHES, tmp_path)
    assert one.manifest.build.id != other.manifest.build.id
    assert set(bundle.current_of(tmp_path).values()) == {one.path.name, other.path.name}


def test_a_build_killed_anywhere_leaves_nothing_half_done(tmp_path: Path) -> None:
    writes = 0
    while killed_at_write(tmp_path, writes):
        assert not [path for path in bundle.bundles(tmp_path) if not is_whole(path)]
        for name in bundle.current_of(tmp_path).values():
            assert is_whole(tmp_path / name)
        writes += 1
    assert writes > len(FEW)
    built = bundle.build(Memory(stock(MIDDLE), "0.26.0"), FEW, tmp_path)
    assert is_whole(built.path)
    assert not list(tmp_path.glob(".building-*"))


def killed_at_write(root: Path, after: int) -> bool:
    """Build in a child that is killed (9) at its `after`th flush to disk; whether it was."""
    child = os.fork()
    if child == 0:
        left = [after]
        flush = os.fsync

        def flush_or_die(handle: int) -> None:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            flush(handle)

        os.fsync = flush_or_die
        try:
            bundle.build(Memory({**stock(MIDDLE), "vllm/x.py": f"# {after}"}, "0.26.0"), FEW, root)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        return False
    for whole in bundle.bundles(root) if root.exists() else []:
        for path in sorted(whole.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        whole.rmdir()
    for link in (root / bundle.CURRENT).glob("*"):
        link.unlink()
    return True


def is_whole(path: Path) -> bool:
    try:
        bundle.check(path)
    except BundleBroken:
        return False
    return True


@pytest.mark.parametrize("root", ["/proc/overlays", "/dev/null/bundles"])
def test_a_target_that_cannot_be_written_is_told(installed: Path, root: str) -> None:
    code, _, err = command("build", "--out", root, "--from", installed, *ONLY)
    assert code == 1
    assert f"cannot write {root}" in err
    assert "--out" in err


def tamper_byte(path: Path) -> None:
    file = path / "files" / CUMEM
    file.chmod(0o644)
    file.write_bytes(file.read_bytes().replace(b"overlay", b"0verlay", 1))


def tamper_missing(path: Path) -> None:
    (path / "files" / CUMEM).unlink()


def tamper_extra(path: Path) -> None:
    (path / "files" / "vllm" / "sitecustomize.py").write_text("")


def tamper_link(path: Path) -> None:
    file = path / "files" / CUMEM
    outside = path.parent / "outside.py"
    file.rename(outside)
    file.symlink_to(outside)


def tamper_manifest(path: Path) -> None:
    manifest = path / "manifest.json"
    facts = json.loads(manifest.read_bytes())
    facts["files"][0]["bytes"] += 1
    manifest.chmod(0o644)
    manifest.write_text(json.dumps(facts))


def tamper_garbage(path: Path) -> None:
    (path / "manifest.json").chmod(0o644)
    (path / "manifest.json").write_text("{}")


TAMPERED: dict[Any, str] = {
    tamper_byte: "has other bytes",
    tamper_missing: "is missing",
    tamper_extra: "does not belong to it",
    tamper_link: "has other bytes",
    tamper_manifest: "its content is",
    tamper_garbage: "is not as a bundle's",
}


@pytest.mark.parametrize("tamper", TAMPERED, ids=lambda f: f.__name__)
def test_a_bundle_that_was_altered_is_found_and_never_used(installed: Path, tmp_path: Path, tamper: Any) -> None:
    root = tmp_path / "bundles"
    path = bundle.build(Tree(installed), PATCHES, root).path
    assert command("verify", path)[0] == 0
    tamper(path)
    code, _, err = command("verify", path)
    assert code == 1
    assert TAMPERED[tamper] in err
    assert command("status", "--out", root)[0] == 1
    assert command("use", path)[0] == 1
    assert command("build", "--out", root, "--from", installed, *ONLY)[0] == 1


def test_a_bundle_for_another_release_is_told_with_the_files_that_differ(installed: Path, tmp_path: Path) -> None:
    path = bundle.build(Memory(stock(OLD), "0.19.1"), PATCHES, tmp_path / "bundles").path
    code, _, err = command("verify", path, "--from", installed)
    assert code == 1
    assert f"{CUMEM} of " in err
    assert "the bundle is for vLLM 0.19.1" in err
    assert "build one for it" in err.splitlines()[-1]
    assert command("verify", path)[0] == 0


@pytest.mark.parametrize("version", ["0.18.1", "0.99.0"])
def test_a_release_that_nobody_looked_at_gets_no_bundle(tmp_path: Path, version: str) -> None:
    with pytest.raises(RequiredFailed, match="outside"):
        bundle.build(Memory(stock(MIDDLE), version), PATCHES, tmp_path)
    assert not tmp_path.joinpath("current").exists()


def test_a_required_patch_that_fails_leaves_no_bundle_and_a_report(installed: Path, tmp_path: Path) -> None:
    file = next(installed.rglob("cumem.py"))
    file.write_text(file.read_text().replace("create_and_map(handle)", "self.bring_back(handle)"))
    code, _, err = command("build", "--out", tmp_path / "bundles", "--from", installed, *ONLY)
    assert code == 1
    assert "transactional-wake:" in err
    assert not (tmp_path / "bundles").exists()
    code, out, _ = command("build", "--out", tmp_path / "bundles", "--from", installed, *ONLY, "--dry-run", "--json")
    assert code == 1
    assert {row["result"] for row in json.loads(out)["patches"]} >= {"failed", "applied"}


def test_an_earlier_bundle_can_be_made_current_again(tmp_path: Path) -> None:
    build = Memory(stock(OLD), "0.19.1")
    first = bundle.build(build, registry.chosen(PATCHES, SLEEP[:1], ()), tmp_path)
    second = bundle.build(build, PATCHES, tmp_path)
    assert set(bundle.current_of(tmp_path).values()) == {second.path.name}
    assert command("use", first.path)[0] == 0
    assert set(bundle.current_of(tmp_path).values()) == {first.path.name}
    code, out, _ = command("status", "--out", tmp_path, "--json")
    assert code == 0
    assert {row["bundle"]: row["current"] for row in json.loads(out)["bundles"]} == {
        first.path.name: True,
        second.path.name: False,
    }


def test_mounts_name_each_file_where_the_engine_keeps_its_package(installed: Path, tmp_path: Path) -> None:
    root = tmp_path / "bundles"
    path = bundle.build(Tree(installed), PATCHES, root).path
    _, out, _ = command("status", "--out", root, "--root", "/opt/vllm/", "--json")
    mounts = json.loads(out)["bundles"][0]["mounts"]
    assert mounts[str(path / "files" / CUMEM)] == f"/opt/vllm/{CUMEM}"
    overlay = json.loads(out)["bundles"][0]["overlay"]
    assert (overlay["root"], overlay["files"][f"files/{CUMEM}"]) == (str(path), f"/opt/vllm/{CUMEM}")
    assert all(Path(host).is_file() for host in mounts)


def test_several_installations_in_one_tree_must_be_named(installed: Path, tmp_path: Path) -> None:
    site = next(installed.rglob("site-packages"))
    other = installed / "usr" / "lib" / "vllm"
    (other / "device_allocator").mkdir(parents=True)
    (other / "__init__.py").write_text("")
    code, _, err = command("build", "--out", tmp_path / "bundles", "--from", installed, *ONLY)
    assert code == 3
    assert "several vLLM" in err
    assert command("build", "--out", tmp_path / "bundles", "--from", site, *ONLY)[0] == 0


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("build", "--out", "/tmp/x"), 2),
        (("build", "--out", "/tmp/x", "--from", "/nowhere"), 3),
        (("build", "--out", "/tmp/x", "--from", "/proc/self/fd"), 3),
        (("build", "--out", "/tmp/x", "--wheel", "/etc/hostname"), 3),
        (("verify", "/nowhere"), 1),
        (("status", "--out", "/nowhere"), 1),
        (("build", "--out", "/tmp/x", "--release", "0.26.0", "--arch", "riscv64"), 3),
        (("matrix", "--first", "newest"), 2),
        (("matrix", "--last", "newest"), 2),
        (("build", "--out", "/tmp/x", "--release", "0.26.0", "--index-url", "http://127.0.0.1:1/simple"), 3),
        (("build", "--out", "/tmp/x", "--release", "0.26.0", "--index-url", "nonsense"), 3),
        (("use", "/etc/hostname"), 1),
    ],
)
def test_each_way_to_fail_has_its_code_and_a_line(words: tuple[str, ...], code: int) -> None:
    got, _, err = command(*words)
    assert got == code
    (line,) = err.splitlines()
    assert not re.search(r"Traceback|Error\(|object at 0x|ConnectionPool", line), "in words of ours, not a library's"


def test_a_bundle_in_the_wrong_place_is_told_with_what_to_do(installed: Path, tmp_path: Path) -> None:
    built = bundle.build(Tree(installed), PATCHES, tmp_path / "bundles")
    answers = tmp_path / "answers.json"
    answers.write_text('{"results": [{"rank": 0, "files": []}]}')
    code, _, err = command("verify", built.path, "--attested", answers)
    assert (code, err.splitlines()[-1].startswith("mount the bundle where these workers keep vLLM")) == (1, True)
    code, _, err = command("verify", built.path, "--attested", "http://127.0.0.1:1")
    assert (code, "nobody listens there: is the engine up" in err) == (1, True)
    answers.write_text("{")
    assert "holds no JSON" in command("verify", built.path, "--attested", answers)[2]


def test_a_list_shows_a_bundle_by_its_whole_name_which_other_commands_take(installed: Path, tmp_path: Path) -> None:
    built = bundle.build(Tree(installed), PATCHES, tmp_path / "bundles")
    assert built.path.name in command("status", "--out", built.path.parent)[1]


def test_patches_of_no_such_name_are_refused(installed: Path, tmp_path: Path) -> None:
    code, _, err = command("build", "--out", tmp_path / "b", "--from", installed, "--only", "no-such-patch")
    assert (code, "there is no patch no-such-patch" in err) == (2, True)


def test_the_modules_of_a_bundle_tell_what_they_were_compiled_from(installed: Path, tmp_path: Path) -> None:
    built = bundle.build(Tree(installed), PATCHES, tmp_path / "bundles")
    for item in built.manifest.files:
        data = (built.path / "files" / item.path).read_bytes()
        scope: dict[str, Any] = {}
        exec(data.splitlines()[-1], scope)  # noqa: S102 - the mark is a line of Python
        assert scope["__overlay__"] == item.body_sha256 == hashlib.sha256(bundle.body_of(data)).hexdigest()


def test_a_root_that_does_not_exist_is_no_list_of_bundles(tmp_path: Path) -> None:
    with pytest.raises(OverlayError, match="overlays build"):
        bundle.bundles(tmp_path / "none")
