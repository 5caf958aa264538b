"""What GPUs report, and what is done about it; when a breaker opens."""

import pytest

from rotator.core.gpu_faults import XIDS, GpuAct, GpuHealth, findings
from rotator.core.policy import breaker_opens


@pytest.mark.parametrize(("xid", "act"), [(79, GpuAct.CORDON), (119, GpuAct.CORDON), (94, GpuAct.RESTART),
                                          (31, GpuAct.PROBE), (63, GpuAct.REPORT), (999, GpuAct.REPORT)])  # fmt: skip
def test_an_xid_has_the_consequence_of_its_kind(xid: int, act: GpuAct) -> None:
    (finding,) = findings(None, GpuHealth("g", xids=(xid,)), "3")
    assert finding.act is act
    assert f"GPU 3 reports Xid {xid}" in finding.reason


def test_whatever_keeps_a_gpu_out_says_what_a_person_must_do() -> None:
    for xid, (_, act, advice, _) in XIDS.items():
        assert act is not GpuAct.CORDON or "uncordon" in advice, xid
    (lost,) = findings(None, GpuHealth("g", lost="NVML says: GPU is lost"), "0")
    assert "power-cycle" in lost.advice


def test_what_lasts_is_found_once_and_again_after_it_was_gone() -> None:
    lost, well = GpuHealth("g", lost="gone"), GpuHealth("g")
    assert findings(lost, lost, "0") == ()
    assert len(findings(well, lost, "0")) == 1


def test_only_a_growth_of_uncorrectable_errors_is_news() -> None:
    assert findings(None, GpuHealth("g", ecc_uncorrected=5), "0") == ()
    assert findings(GpuHealth("g", ecc_uncorrected=5), GpuHealth("g", ecc_uncorrected=5), "0") == ()
    (grown,) = findings(GpuHealth("g", ecc_uncorrected=5), GpuHealth("g", ecc_uncorrected=7), "0")
    assert (grown.act, "2 more" in grown.reason) == (GpuAct.RESTART, True)
    assert findings(GpuHealth("g", ecc_uncorrected=5), GpuHealth("g", ecc_uncorrected=0), "0") == ()


def test_the_worst_comes_first() -> None:
    found = findings(None, GpuHealth("g", xids=(45, 31, 79)), "0")
    assert [f.act for f in found] == [GpuAct.CORDON, GpuAct.PROBE, GpuAct.REPORT]


def test_a_breaker_opens_at_so_many_faults_within_its_window() -> None:
    assert not breaker_opens((1.0, 50.0, 99.0), 100.0, failures=3, window_s=60)
    assert breaker_opens((45.0, 50.0, 99.0), 100.0, failures=3, window_s=60)
    assert breaker_opens((45.0, 50.0, 7300.0), 100.0, failures=3, window_s=60), "a clock set back forgets nothing"
