"""What MLflow's UI (3.17) shows of a sweep: the state that its button "Share" would save."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

MOST_RUNS = 50  # in a chart
SIZE = "fold/megabytes"


def charts(
    parent: str,
    params: Sequence[str],
    metrics: Sequence[str],
    is_ascending: bool = False,
    ends: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The state of a view of the runs nested in the run ``parent``: parallel coordinates of ``params`` and of the last
    stages' ``ends``, the folded network's headline metric against size, and a bar chart for each metric.

    ends: metrics that all runs have, since the UI leaves out of parallel coordinates whatever lacks one; None: metrics;
    metrics: each stage's headline metric, in the order of the stages, and what else is to be drawn;
    is_ascending: whether the lowest comes first."""
    sections = [("all", "What differs, and what it does"), ("each", "Metrics")]
    folded = next((name for name in metrics if name.startswith("fold/") and name != SIZE), None)
    headline = "" if folded is None else folded.removeprefix("fold/")
    ends = list(metrics if ends is None else ends)
    ends = [name for name in ends if name in (f"reest/{headline}", folded)] or ends  # more is not legible
    drawn = [_chart("PARALLEL", "parallel", "all", selectedParams=list(params), selectedMetrics=ends)]
    if folded is not None and SIZE in metrics:
        x, y = ({"key": key, "type": "METRIC"} for key in (SIZE, folded))
        drawn.append(_chart("SCATTER", "size", "all", xaxis=x, yaxis=y))
    drawn += [_chart("BAR", f"bar{number}", "each", metricKey=name) for number, name in enumerate(metrics)]
    return {
        "searchFilter": f"tags.mlflow.parentRunId = '{parent}'",
        # Sorted by date, the UI would fold nested runs away.
        "orderByKey": f"metrics.`{folded or next(iter(metrics), '')}`",
        "orderByAsc": is_ascending,
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
