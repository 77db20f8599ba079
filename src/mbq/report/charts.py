"""The page's charts as Vega-Lite specifications. Colours are the page's CSS variables, so that they follow its theme.

A chart's rows carry every model; ``params`` say which of them it shows, and the page's controls set these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Spec = dict[str, Any]
Rows = Sequence[Mapping[str, Any]]

MODALITIES = ("language", "vision")
_MODALITY_COLOUR = {
    "field": "series",
    "type": "nominal",
    "scale": {"domain": list(MODALITIES), "range": ["var(--language)", "var(--vision)"]},
    "title": None,
}
_BLOCK = {
    "field": "block",
    "type": "quantitative",
    "title": "block",
    "axis": {"tickMinStep": 1, "format": "d"},
    "scale": {"zero": False, "nice": False, "padding": 12},
}
_NUMBER = ".3~g"

CONFIG: Spec = {
    "background": "transparent",
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": "var(--soft)",
        "titleColor": "var(--soft)",
        "gridColor": "var(--line)",
        "domainColor": "var(--edge)",
        "tickColor": "var(--edge)",
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": 600,
        "labelLimit": 150,
        "gridOpacity": 0.7,
    },
    "legend": {
        "orient": "top",
        "labelColor": "var(--ink)",
        "titleColor": "var(--soft)",
        "labelFontSize": 12,
        "titleFontSize": 12,
        "labelLimit": 260,
        "symbolOpacity": 1,
        "columns": 2,
    },
    "title": {"color": "var(--ink)", "fontSize": 13, "anchor": "start"},
}


def _spec(description: str, rows: Rows, params: Mapping[str, Any], height: int | Spec, **content: Any) -> Spec:
    return {
        "description": description,
        "width": "container",
        "height": height,
        "autosize": {"type": "fit-x" if isinstance(height, dict) else "fit", "contains": "padding"},
        "data": {"values": list(rows)},
        "params": [{"name": name, "value": value} for name, value in params.items()],
        **content,
    }


def _where(*conditions: str) -> list[Spec]:
    return [{"filter": condition} for condition in conditions]


def _equal(params: Mapping[str, Any], *names: str) -> list[Spec]:
    return _where(*(f"datum.{name} == {name}" for name in names if name in params))


def modalities_by_block(
    rows: Rows, params: Mapping[str, Any], title: str, description: str, ticks: str = ".0e"
) -> Spec:
    """Two lines over the blocks, language and vision, on a logarithmic axis; a rule at the block that is looked at.

    rows   {"model", "part", "block", "series", "value"}; what is not above 0 has no place on the axis
    ticks  how the axis writes numbers, as d3-format has it
    """
    encoding = {
        "x": _BLOCK,
        "y": {
            "field": "value",
            "type": "quantitative",
            "title": title,
            "scale": {"type": "log"},
            "axis": {"format": ticks, "tickCount": 5},
        },
    }
    seen = {
        **encoding,
        "color": _MODALITY_COLOUR,
        "tooltip": [
            {"field": "series", "title": "tokens"},
            {"field": "block"},
            {"field": "value", "title": title, "format": _NUMBER},
        ],
    }
    shape = {"field": "series", "type": "nominal", "scale": {"domain": list(MODALITIES)}, "title": None}
    return _spec(
        description,
        rows,
        params,
        260,
        transform=[*_equal(params, "model", "error", "part"), *_where("datum.value > 0")],
        layer=[
            _rule(),
            {"mark": {"type": "line", "strokeWidth": 2}, "encoding": seen},
            {"mark": {"type": "point", "filled": True, "size": 55, "opacity": 1}, "encoding": {**seen, "shape": shape}},
        ],
    )


def ratio_by_block(rows: Rows, params: Mapping[str, Any], description: str) -> Spec:
    """The measured ratio vision / language, the floor, and what is left of the ratio above the floor.

    rows  {"model", "part", "block", "series", "value"}, the series "measured", "raised to the floor" and "floor"
    """
    names = ["measured", "raised to the floor"]
    colour = {
        "field": "series",
        "type": "nominal",
        "scale": {"domain": names, "range": ["var(--vision)", "var(--accent)"]},
        "title": None,
    }
    y = {
        "field": "value",
        "type": "quantitative",
        "title": "vision / language",
        "scale": {"type": "log"},
        "axis": {"format": ".0e", "tickCount": 5},
    }
    tooltip = [{"field": "series", "title": "ratio"}, {"field": "block"}, {"field": "value", "format": _NUMBER}]
    floor = {"y": y, "tooltip": [{"field": "value", "title": "floor", "format": _NUMBER}]}
    shape = {"field": "series", "type": "nominal", "scale": {"domain": names}, "title": None}
    lines = _where("datum.series != 'floor'")
    return _spec(
        description,
        rows,
        params,
        260,
        transform=[*_equal(params, "model", "part"), *_where("datum.value > 0")],
        layer=[
            _rule(),
            {
                "transform": _where("datum.series == 'floor'", "datum.block == 0"),
                "mark": {"type": "rule", "strokeDash": [6, 4], "strokeWidth": 2, "stroke": "var(--soft)"},
                "encoding": floor,
            },
            {
                "transform": lines,
                "mark": {"type": "line", "strokeWidth": 2},
                "encoding": {"x": _BLOCK, "y": y, "color": colour, "tooltip": tooltip},
            },
            {
                "transform": lines,
                "mark": {"type": "point", "filled": True, "size": 55, "opacity": 1},
                "encoding": {"x": _BLOCK, "y": y, "color": colour, "shape": shape, "tooltip": tooltip},
            },
        ],
    )


def _rule() -> Spec:
    """A line at the block that the controls chose."""
    return {
        "transform": [*_where("datum.block == block"), {"aggregate": [], "groupby": ["block"]}],
        "mark": {
            "type": "rule",
            "stroke": "var(--edge)",
            "strokeWidth": 14,
            "opacity": 0.35,
            "tooltip": None,
            "aria": False,
        },
        "encoding": {"x": _BLOCK},
    }


def alphas(rows: Rows, params: Mapping[str, Any], groups: Sequence[str], description: str) -> Spec:
    """A cell a group of a block, coloured by the alpha that the search chose; a cross where it left a group alone.

    rows  {"model", "block", "group", "alpha" or None, "loss" or None, "skipped" or None}
    """
    place = {
        "x": {"field": "block", "type": "ordinal", "title": "block", "axis": {"labelAngle": 0, "labelOverlap": True}},
        "y": {"field": "group", "type": "nominal", "title": None, "sort": list(groups)},
    }
    tooltip = [
        {"field": "block"},
        {"field": "group"},
        {"field": "alpha", "format": ".2f"},
        {"field": "loss", "format": _NUMBER},
    ]
    why = [{"field": "block"}, {"field": "group"}, {"field": "skipped", "title": "left alone"}]
    colour = {
        "field": "alpha",
        "type": "quantitative",
        "scale": {"scheme": "viridis", "domain": [0, 1]},
        "legend": {"title": "alpha", "gradientLength": 160},
    }
    frame = {
        "type": "rect",
        "fill": "transparent",
        "stroke": "var(--ink)",
        "strokeWidth": 3,
        "tooltip": None,
        "aria": False,
    }
    return _spec(
        description,
        rows,
        params,
        {"step": 34},
        transform=_equal(params, "model"),
        layer=[
            {
                "transform": _where("datum.alpha != null"),
                "mark": {"type": "rect", "cornerRadius": 3, "cursor": "pointer"},
                "encoding": {**place, "color": colour, "tooltip": tooltip},
            },
            {
                "transform": _where("datum.alpha == null"),
                "mark": {"type": "text", "text": "\u00d7", "color": "var(--soft)", "fontSize": 16},
                "encoding": {**place, "tooltip": why},
            },
            {"transform": _equal(params, "block", "group"), "mark": frame, "encoding": place},
        ],
    )


def losses(rows: Rows, params: Mapping[str, Any], steps: int, description: str) -> Spec:
    """The search's loss at every alpha for one group of one block, and the choice.

    rows   {"model", "block", "group", "alpha", "losses": [loss, ...]}
    steps  candidates between alpha 0 and 1
    """
    x = {
        "field": "candidate",
        "type": "quantitative",
        "title": "alpha",
        "scale": {"domain": [0, 1], "nice": False},
        "axis": {"format": ".1f"},
    }
    y = {
        "field": "loss",
        "type": "quantitative",
        "title": "loss",
        "scale": {"zero": False},
        "axis": {"format": ".3~g", "tickCount": 5},
    }
    tooltip = [
        {"field": "candidate", "title": "alpha", "format": ".2f"},
        {"field": "loss", "format": ".4~g"},
    ]
    chosen = {"type": "point", "shape": "diamond", "size": 190, "filled": True, "color": "var(--language)"}
    return _spec(
        description,
        rows,
        params,
        240,
        transform=[
            *_equal(params, "model", "block", "group"),
            {"calculate": "sequence(0, length(datum.losses))", "as": "step"},
            {"flatten": ["losses", "step"], "as": ["loss", "step"]},
            {"filter": "datum.loss != null"},
            {"calculate": f"datum.step / {steps}", "as": "candidate"},
        ],
        layer=[
            {
                "mark": {"type": "line", "strokeWidth": 2, "color": "var(--accent)"},
                "encoding": {"x": x, "y": y, "tooltip": tooltip},
            },
            {
                "mark": {"type": "point", "filled": True, "size": 40, "color": "var(--accent)"},
                "encoding": {"x": x, "y": y, "tooltip": tooltip},
            },
            {
                "transform": _where("abs(datum.candidate - datum.alpha) < 0.001"),
                "mark": chosen,
                "encoding": {"x": x, "y": y, "tooltip": tooltip},
            },
        ],
    )


def means(rows: Rows, labels: Sequence[str], kinds: Sequence[str], description: str) -> Spec:
    """Mean accuracy a model and kind of tasks, with its interval.

    rows  {"model", "kind", "mean", "low", "high"}, in per cent
    """
    y = {"field": "model", "type": "nominal", "title": None, "sort": list(labels)}
    offset = {"field": "kind", "type": "nominal", "sort": list(kinds)}
    colour = {
        "field": "kind",
        "type": "nominal",
        "title": None,
        "scale": {"domain": list(kinds), "range": ["var(--vision)", "var(--language)"][: len(kinds)]},
    }
    shape = {"field": "kind", "type": "nominal", "title": None, "scale": {"domain": list(kinds)}}
    tooltip = [
        {"field": "model"},
        {"field": "kind", "title": "tasks"},
        {"field": "mean", "format": ".1f", "title": "right, %"},
        {"field": "low", "format": ".1f"},
        {"field": "high", "format": ".1f"},
    ]
    where = {"y": y, "yOffset": offset, "color": colour, "tooltip": tooltip}
    title = "right answers, % (95 % interval)"
    scale = {"zero": False, "nice": False, "padding": 10}
    return _spec(
        description,
        rows,
        {},
        {"step": 15},
        layer=[
            {
                "mark": {"type": "rule", "strokeWidth": 3, "opacity": 0.55},
                "encoding": {
                    **where,
                    "x": {"field": "low", "type": "quantitative", "title": title, "scale": scale},
                    "x2": {"field": "high"},
                },
            },
            {
                "mark": {"type": "point", "filled": True, "size": 75, "opacity": 1},
                "encoding": {
                    **where,
                    "shape": shape,
                    "x": {"field": "mean", "type": "quantitative", "title": title, "scale": scale},
                },
            },
        ],
    )


def differences(rows: Rows, params: Mapping[str, Any], tasks: Sequence[str], baseline: str, description: str) -> Spec:
    """What one model gains or loses to the baseline in each task, with the paired interval, and a line at nothing.

    rows  {"model", "task", "difference", "low", "high", "verdict"}, in per cent; the verdict is in VERDICTS
    """
    y = {"field": "task", "type": "nominal", "title": None, "sort": list(tasks)}
    colour = {
        "field": "verdict",
        "type": "nominal",
        "title": None,
        "scale": {"domain": list(VERDICTS), "range": ["var(--lost)", "var(--soft)", "var(--gained)"]},
        "legend": {"columns": 1},
    }
    shape = {"field": "verdict", "type": "nominal", "title": None, "scale": {"domain": list(VERDICTS)}}
    tooltip = [
        {"field": "task"},
        {"field": "difference", "format": "+.1f", "title": "points"},
        {"field": "low", "format": "+.1f"},
        {"field": "high", "format": "+.1f"},
    ]
    title = f"points less {baseline} (paired 95 % interval)"
    where = {"y": y, "color": colour, "tooltip": tooltip}
    zero = {"type": "rule", "color": "var(--edge)", "strokeDash": [4, 3], "tooltip": None, "aria": False}
    return _spec(
        description,
        rows,
        params,
        {"step": 20},
        transform=_equal(params, "model"),
        layer=[
            {"mark": zero, "encoding": {"x": {"datum": 0, "type": "quantitative"}}},
            {
                "mark": {"type": "rule", "strokeWidth": 3, "opacity": 0.55},
                "encoding": {
                    **where,
                    "x": {"field": "low", "type": "quantitative", "title": title},
                    "x2": {"field": "high"},
                },
            },
            {
                "mark": {"type": "point", "filled": True, "size": 75, "opacity": 1},
                "encoding": {**where, "shape": shape, "x": {"field": "difference", "type": "quantitative"}},
            },
        ],
    )


VERDICTS = ("surely worse", "not told apart", "surely better")


def history(rows: Rows, params: Mapping[str, Any], kinds: Sequence[str], description: str) -> Spec:
    """Mean accuracy of the runs of one name over time, with intervals.

    rows  {"name", "created" (ISO 8601), "kind", "mean", "low", "high"}, in per cent
    """
    x = {"field": "created", "type": "temporal", "title": None, "scale": {"padding": 20, "nice": False}}
    colour = {
        "field": "kind",
        "type": "nominal",
        "title": None,
        "scale": {"domain": list(kinds), "range": ["var(--vision)", "var(--language)"][: len(kinds)]},
    }
    shape = {"field": "kind", "type": "nominal", "title": None, "scale": {"domain": list(kinds)}}
    tooltip = [
        {"field": "created", "type": "temporal", "format": "%Y-%m-%d %H:%M"},
        {"field": "kind", "title": "tasks"},
        {"field": "mean", "format": ".1f", "title": "right, %"},
        {"field": "low", "format": ".1f"},
        {"field": "high", "format": ".1f"},
    ]
    title, scale = "right answers, %", {"zero": False}
    y = {"field": "mean", "type": "quantitative", "title": title, "scale": scale}
    return _spec(
        description,
        rows,
        params,
        220,
        transform=_equal(params, "name"),
        layer=[
            {
                "mark": {"type": "rule", "strokeWidth": 3, "opacity": 0.5},
                "encoding": {
                    "x": x,
                    "y": {"field": "low", "type": "quantitative", "title": title, "scale": scale},
                    "y2": {"field": "high"},
                    "color": colour,
                    "tooltip": tooltip,
                },
            },
            {"mark": {"type": "line", "strokeWidth": 2}, "encoding": {"x": x, "y": y, "color": colour}},
            {
                "mark": {"type": "point", "filled": True, "size": 75, "opacity": 1},
                "encoding": {"x": x, "y": y, "color": colour, "shape": shape, "tooltip": tooltip},
            },
        ],
    )


def steps(rows: Rows, labels: Sequence[str], names: Sequence[str], description: str) -> Spec:
    """Where a run's seconds went, a bar a model.

    rows  {"model", "step", "seconds"}
    """
    return _spec(
        description,
        [{**row, "place": names.index(row["step"])} for row in rows],
        {},
        {"step": 28},
        mark={"type": "bar", "cornerRadius": 2, "height": {"band": 0.7}},
        encoding={
            "y": {"field": "model", "type": "nominal", "title": None, "sort": list(labels)},
            "x": {"field": "seconds", "type": "quantitative", "title": "seconds"},
            "color": {
                "field": "step",
                "type": "nominal",
                "title": None,
                "scale": {"domain": list(names), "range": [f"var(--step{1 + i % 6})" for i in range(len(names))]},
                "legend": {"columns": 3},
            },
            "order": {"field": "place", "type": "quantitative"},
            "tooltip": [{"field": "model"}, {"field": "step"}, {"field": "seconds", "format": ".1f"}],
        },
    )
