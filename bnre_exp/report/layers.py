"""A simulation layer by layer, as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bnre_exp.algorithms.drift import BN, KIND, KL
from bnre_exp.quantsim.listing import LayerRow
from bnre_exp.quantsim.quantizers.scheme import FULL


def layers_columns(rows: Sequence[LayerRow]) -> dict[str, list[str]]:
    """Column by heading, a text for every row."""
    return {
        "layer": [row.name for row in rows],
        "kind": [row.kind for row in rows],
        "weight": [_weight(row) for row in rows],
        "BN": [row.bn for row in rows],
        "activation": [row.activation for row in rows],
        "output": [_output(row) for row in rows],
        "range": ["" if row.range is None else f"{row.range[0]:.4g} … {row.range[1]:.4g}" for row in rows],
        "note": [row.note for row in rows],
    }


def layers_markdown(title: str, columns: Mapping[str, Sequence[str]]) -> str:
    """The table as a page of its own, from :func:`layers_columns`."""
    return table_markdown(f"{title}: layer by layer", columns)


def table_markdown(title: str, columns: Mapping[str, Sequence[str]]) -> str:
    """A page with one table. columns: cells by heading."""
    lines = [f"# {title}", "", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |" for cells in zip(*columns.values())
    ]
    return "\n".join(lines) + "\n"


def drift_markdown(title: str, columns: Mapping[str, Sequence[Any]]) -> str:
    """How far batch norms moved, as a page: those that moved most first, by the divergence."""
    order = sorted(range(len(columns[BN])), key=lambda place: -float(columns[KL][place]))
    lines = [
        f"# {title}: which batch norms moved",
        "",
        "The running statistics before and after re-estimation: shift of the means (root mean square over the "
        "channels, in standard deviations before), geometric mean of the ratio of variances, and mean Kullback-Leibler "
        "divergence of the normal distribution after from the one before; of the shift, with its sign, and of the "
        "ratio also what 5, 50 and 95% of the channels are below. *Alone*, if it is there: the change of the metric "
        "on the validation data by re-estimating this one alone.",
        "",
        f"| {' | '.join(columns)} |",
        f"|{'|'.join('---' if name in (BN, KIND) else '--:' for name in columns)}|",
    ]
    for place in order:
        cells = [column[place] for column in columns.values()]
        lines.append(f"| {' | '.join(f'{cell:.4f}' if isinstance(cell, float) else str(cell) for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _weight(row: LayerRow) -> str:
    if row.weight_bits is None:
        return ""
    channels = f"{row.weight_scales} channel{'' if row.weight_scales == 1 else 's'}"
    mirrored = f", {row.mirrored} mirrored" if row.mirrored else ""
    grid = f", {row.weight_grid} grid{mirrored}" if row.weight_grid == FULL else ""
    return f"{row.weight_bits} bits, {channels if row.per_channel else 'per tensor'}{grid}"


def _output(row: LayerRow) -> str:
    return "" if row.act_bits is None else f"{row.act_bits} bits, {'unsigned' if row.unsigned else 'with zero point'}"
