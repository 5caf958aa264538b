"""A GPU's VRAM over time as the options of an ECharts chart: areas by holder, stacked, below the reserve's line."""

from collections.abc import Mapping
from typing import Any

from rotator.web.page.text import FOREIGN_COLOR
from rotator.web.page.vram import FOREIGN, Curves

_GIB = 1 << 30
_GREY = "#8892a0"  # readable on light and on dark
_LINE = "rgba(136,146,160,0.22)"
_SECONDS_BELOW_S = 400.0
_STEPS_GIB = (1, 2, 4, 8, 16, 20, 24, 32, 40, 48, 64, 80, 96)  # between marks of the axis


def options(gpu: Mapping[str, Any], curves: Curves, colors: Mapping[str, str]) -> dict[str, Any]:
    total = gpu["total_bytes"] / _GIB
    series = [_area(name, curves, colors.get(name, FOREIGN_COLOR)) for name in curves.by_holder]
    if series:
        series[-1]["markLine"] = _reserve(total - gpu["reserve_bytes"] / _GIB)
    return {
        "animation": False,
        "textStyle": {"fontFamily": "inherit"},
        "grid": {"left": 34, "right": 26, "top": 10, "bottom": 22},
        "tooltip": {
            "trigger": "axis",
            "confine": True,
            ":valueFormatter": "v => v == null ? '–' : v.toFixed(1) + ' GiB'",
        },
        "xAxis": {
            "type": "time",
            "splitNumber": 2,
            "axisLabel": {
                "color": _GREY,
                "fontSize": 11,
                "hideOverlap": True,
                "showMinLabel": False,
                "formatter": _clock(curves),
            },
            "axisLine": {"lineStyle": {"color": _LINE}},
            "axisTick": {"show": False},
        },
        "yAxis": {
            "type": "value",
            "min": 0,
            "max": round(total, 1),
            "interval": _interval(total),
            "axisLabel": {"color": _GREY, "fontSize": 11, "showMaxLabel": True, "hideOverlap": True},
            "splitLine": {"lineStyle": {"color": _LINE}},
        },
        "series": series,
    }


def _clock(curves: Curves) -> str:
    shown_s = (curves.times_ms[-1] - curves.times_ms[0]) / 1000 if curves.times_ms else 0.0
    return "{HH}:{mm}" if shown_s > _SECONDS_BELOW_S else "{HH}:{mm}:{ss}"


def _area(name: str, curves: Curves, color: str) -> dict[str, Any]:
    return {
        "name": "foreign processes" if name == FOREIGN else name,
        "type": "line",
        "stack": "held",
        "step": "end",
        "showSymbol": False,
        "emphasis": {"disabled": True},
        "lineStyle": {"width": 0},
        "itemStyle": {"color": color},
        "areaStyle": {"color": color, "opacity": 0.85},
        "data": [list(point) for point in zip(curves.times_ms, curves.by_holder[name], strict=True)],
    }


def _reserve(at_gib: float) -> dict[str, Any]:
    return {
        "silent": True,
        "symbol": "none",
        "label": {"show": False},
        "lineStyle": {"color": _GREY, "type": "dashed", "width": 1},
        "data": [{"yAxis": round(at_gib, 2)}],
    }


def _interval(total_gib: float) -> float:
    return next((step for step in _STEPS_GIB if total_gib / step <= 5), total_gib / 4)
