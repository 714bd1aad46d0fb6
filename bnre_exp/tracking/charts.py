"""What MLflow's UI (3.17) shows of a sweep: the state that its button "Share" would save."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

MOST_RUNS = 50  # in a chart


def charts(parent: str, params: Sequence[str], metrics: Sequence[str]) -> dict[str, Any]:
    """The state of a view of the runs nested in the run ``parent``: parallel coordinates of ``params`` and ``metrics``,
    top-1 against size, and a bar chart for each metric."""
    sections = [("all", "What differs, and what it does"), ("each", "Metrics")]
    ends = [name for name in metrics if name in ("reest/top1", "fold/top1")] or list(metrics)  # more is not legible
    drawn = [_chart("PARALLEL", "parallel", "all", selectedParams=list(params), selectedMetrics=ends)]
    if {"fold/megabytes", "fold/top1"} <= set(metrics):
        x, y = ({"key": key, "type": "METRIC"} for key in ("fold/megabytes", "fold/top1"))
        drawn.append(_chart("SCATTER", "size", "all", xaxis=x, yaxis=y))
    drawn += [_chart("BAR", f"bar{number}", "each", metricKey=name) for number, name in enumerate(metrics)]
    return {
        "searchFilter": f"tags.mlflow.parentRunId = '{parent}'",
        "orderByKey": "metrics.`fold/top1`",  # sorted by date, the UI would fold nested runs away
        "orderByAsc": False,
        "runsHiddenMode": "SHOW_ALL",
        "compareRunCharts": drawn,
        "compareRunSections": [
            {"uuid": key, "name": name, "display": True, "isReordered": False} for key, name in sections
        ],
        "isAccordionReordered": True,
    }


def _chart(kind: str, key: str, section: str, **more: Any) -> dict[str, Any]:
    common = {"runsCountToCompare": MOST_RUNS, "metricSectionId": section, "deleted": False, "isGenerated": False}
    return {"type": kind, "uuid": f"bnre-{key}", **common, **more}
