"""Whatever stands around the places that a patch knows comes out byte for byte as it went in."""

import ast
import difflib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from overlays.build import Result, apply_all
from overlays.sources import Memory
from tests.overlay_files import STOCK
from tests.unit.overlays.test_model_patches import PATCHES

# How many of the file's own lines each patch changes; all else it does is to put lines in between.
CHANGED_LINES = {
    "hybrid-wake": 1,  # the call that takes one tensor
    "hybrid-state": 0,
    "sparse-mla-workspace": 3,  # two products and the bound of the plan
    "triton-shared-memory": 2,  # the last argument of each autotuner
    "mxfp4-loader": 0,
}

words = st.text(st.characters(exclude_categories=["C", "Z"], exclude_characters="\"'\\{}"), min_size=1, max_size=12)
noise_lines = st.one_of(
    words.map(lambda text: f"# {text}"),
    words.map(lambda text: f"NOTE = '{text}'  # {text}"),
    words.map(lambda text: f"def aside(*parts: object) -> str:\n    return '''{text}\n  {text}'''"),
    st.sampled_from(["", "\f", "if NOTE := 'ü':\n        NOTE = ( 1 ,2 )", "class Aside: x = 1; y = 2"]),
)
noise = st.lists(noise_lines, max_size=4).map("\n".join)


@st.composite
def written_otherwise(draw: st.DrawFn, text: str) -> str:
    """The same module with other things around it, other indents and other ends of lines."""
    indent = draw(st.sampled_from(["  ", "    ", "\t"]))
    lines = [line.replace("    ", indent) for line in text.strip("\n").split("\n")]
    whole = "\n".join([draw(noise), *lines, "", draw(noise), draw(st.sampled_from(["", "# the last line"]))])
    return whole.replace("\n", draw(st.sampled_from(["\n", "\r\n"])))


def lines_gone(before: bytes, after: bytes) -> list[bytes]:
    """Lines of `before` that `after` does not have, all others being there in the same order."""
    old, new = before.split(b"\n"), after.split(b"\n")
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    return [line for kind, a, b, _, _ in matcher.get_opcodes() if kind in ("replace", "delete") for line in old[a:b]]


@pytest.mark.parametrize("name", PATCHES)
@given(data=st.data())
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a module is a large draw
def test_a_patch_changes_its_own_lines_once_and_nothing_else(name: str, data: st.DataObject) -> None:
    patch = PATCHES[name]
    own = {path for target in patch.targets.values() for path in target.paths} & set(STOCK)
    files = {path: data.draw(written_otherwise(text)).encode() for path, text in STOCK.items() if path in own}

    first = apply_all(Memory(files, "0.26.0"), [patch])
    assert first.outcomes[0].result is Result.APPLIED, first.outcomes[0].reason
    gone = []
    for path in own & set(first.files):
        before, after = files[path], first.files[path]
        gone += lines_gone(before, after)
        ends = after.count(b"\r\n")
        assert ends == (after.count(b"\n") if b"\r\n" in before else 0), "ends of lines are of two kinds"
    assert len(gone) <= CHANGED_LINES[name], gone

    second = apply_all(Memory(files | first.files, "0.26.0"), [patch])
    assert second.outcomes[0].result is Result.UPSTREAM, second.outcomes[0].reason
    assert second.files == {}


@settings(max_examples=8, deadline=None)
@given(order=st.permutations(list(PATCHES)))
def test_the_order_of_these_patches_does_not_matter(order: list[str]) -> None:
    made = apply_all(Memory(STOCK, "0.26.0"), [PATCHES[name] for name in order])
    straight = apply_all(Memory(STOCK, "0.26.0"), list(PATCHES.values()))
    assert [outcome.result for outcome in made.outcomes] == [Result.APPLIED] * len(PATCHES)
    assert {path: ast.dump(ast.parse(text)) for path, text in made.files.items()} == {
        path: ast.dump(ast.parse(text)) for path, text in straight.files.items()
    }
