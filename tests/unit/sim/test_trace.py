"""Traces: the shapes that are read, and what is said about bad ones."""

import pytest

from rotator.sim.trace import TokenRates, Trace, TraceError, make, parse


def rows(trace: Trace) -> list[tuple[float, str, float]]:
    return [(at, trace.models[m], s) for at, m, s in zip(trace.at_s, trace.model, trace.service_s, strict=True)]


def test_requests_come_in_order_of_time_and_from_zero():
    trace = parse(["time,model,service_seconds", "107.5,b,2", "100,a,1"], "t")
    assert rows(trace) == [(0.0, "a", 1.0), (7.5, "b", 2.0)]


def test_a_trace_of_tokens_is_served_as_long_as_its_tokens_take():
    trace = parse(["time,model,prompt_tokens,generated_tokens", "0,a,1000,50"], "t", TokenRates(500, 10))
    assert rows(trace) == [(0.0, "a", 7.0)]


def test_azures_traces_have_seven_digits_of_a_second_and_one_model():
    lines = ["TIMESTAMP,ContextTokens,GeneratedTokens", "2023-11-16 18:15:46.6805900,0,44", "2023-11-16 18:15:47,0,4"]
    trace = parse(lines, "t", TokenRates(1000, 4))
    assert trace.models == ("model",)
    assert list(trace.at_s) == pytest.approx([0.0, 0.31941])
    assert list(trace.service_s) == [11.0, 1.0]


def test_failures_in_burstgpt_are_counted_and_not_served():
    lines = [
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type",
        "5,ChatGPT,472,18,490,Conversation log",
        "45,ChatGPT,1087,0,1087,Conversation log",
        "118,GPT-4,417,276,693,API log",
    ]
    trace = parse(lines, "t")
    assert (len(trace), trace.failed, trace.models) == (2, 1, ("ChatGPT", "GPT-4"))


def test_the_diffusion_services_trace_is_read_as_published():
    lines = [
        "gmt_create,predict_type,exec_time_seconds,checkpoint_model_version_id",
        "2024-11-15 16:57:50,TXT_2_IMG,32.0,M0000",
        "2024-11-15 18:16:14,TXT_2_IMG,43.0,M0001",
    ]
    assert rows(parse(lines, "t")) == [(0.0, "M0000", 32.0), (4704.0, "M0001", 43.0)]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("yesterday,a,1", "t:3: 'yesterday' is no time"),
        ("2,a,soon", "t:3: service seconds: 'soon' is no number"),
        ("2,a,-1", "t:3: service seconds: '-1' is out of range"),
        ("2,a,nan", "t:3: service seconds: 'nan' is out of range"),
        ("2,,1", "t:3: the model is empty"),
        ("2,a", "t:3: has 2 columns where the header names 3"),
        ("1731689870000,a,1", "t:3: '1731689870000' is no time in seconds: milliseconds?"),
    ],
)
def test_a_bad_row_is_named_by_its_line(line: str, said: str):
    with pytest.raises(TraceError, match="^" + said.replace("(", r"\(")):
        parse(["time,model,service_seconds", "1,a,1", line], "t")


def test_reading_is_given_up_after_a_few_bad_rows():
    with pytest.raises(TraceError) as caught:
        parse(["time,model,service_seconds", *["x,a,1"] * 100], "t")
    assert len(str(caught.value).splitlines()) == 6


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "is empty"),
        (["time,model,service_seconds"], "no requests"),
        (["model,service_seconds", "a,1"], "no time column"),
        (["time,model", "1,a"], "neither service seconds nor tokens"),
    ],
)
def test_a_trace_that_is_none_says_what_is_missing(lines: list[str], said: str):
    with pytest.raises(TraceError, match=said):
        parse(lines, "t")


def test_halves_hold_all_requests_each_from_its_own_zero():
    first, second = make([(float(t), "a", 1.0) for t in (0, 1, 5, 9)]).halves()
    assert (list(first.at_s), list(second.at_s)) == ([0, 1], [0, 4])


def test_models_are_ranked_by_how_often_they_are_asked_for():
    trace = make([(0, "b", 1), (1, "c", 1), (2, "c", 1), (3, "a", 1)])
    assert trace.by_popularity() == ("c", "a", "b")


def test_scaling_moves_arrivals_and_leaves_service_as_it_is():
    trace = make([(0, "a", 3), (10, "a", 4)]).scaled(0.5)
    assert (list(trace.at_s), list(trace.service_s)) == ([0, 5], [3, 4])
