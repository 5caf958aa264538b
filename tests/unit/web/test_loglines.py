"""The log on the page: the newest lines, and never more than a page can take."""

from rotator.web.page.loglines import CHARS_MAX, LINE_CHARS_MAX, LINES_MAX, LogLines

MORE = "there is more"


def shown(lines: LogLines) -> list[str]:
    return lines.text(MORE).split("\n")


def test_a_short_log_is_shown_as_it_is() -> None:
    lines = LogLines()
    lines.add("one\n\nthree")
    assert shown(lines) == ["one", "", "three"]


def test_the_newest_lines_stay_and_the_first_tells_that_there_were_others() -> None:
    lines = LogLines()
    for n in range(LINES_MAX + 5):
        lines.add(f"line {n}")
    first, *rest = shown(lines)
    assert first == MORE
    assert (rest[0], rest[-1], len(rest)) == ("line 5", f"line {LINES_MAX + 4}", LINES_MAX)


def test_an_endless_line_is_cut_and_says_by_how_much() -> None:
    lines = LogLines()
    lines.add("x" * (LINE_CHARS_MAX + 7))
    (only,) = shown(lines)
    assert only == "x" * LINE_CHARS_MAX + " … 7 more characters"


def test_long_lines_together_stay_within_what_is_sent_at_once() -> None:
    lines = LogLines()
    for n in range(LINES_MAX):
        lines.add(f"{n} " + "x" * 5 * LINE_CHARS_MAX)
    assert len(lines.text(MORE)) < CHARS_MAX + LINES_MAX + len(MORE)
    assert shown(lines)[-1].startswith(f"{LINES_MAX - 1} x")


def test_another_log_begins_empty() -> None:
    lines = LogLines()
    lines.add("\n".join("x" * (LINES_MAX + 1)))
    lines.clear()
    lines.add("new")
    assert shown(lines) == ["new"]
