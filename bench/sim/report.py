"""Tables for a terminal, and the last line for programs."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from bench.sim.journal import UNEXPLAINED
from bench.sim.metrics import THIRDS, Figures

# heading, key, format
COLUMNS = (
    ("mean wait s", "mean_wait_s", "{:.1f}"),
    ("+-", "mean_wait_sd_s", "{:.1f}"),
    ("p99 wait s", "p99_wait_s", "{:.1f}"),
    ("rare max s", "rare_max_wait_s", "{:.1f}"),
    ("switches", "switches", "{:.0f}"),
    ("goodput/s", "goodput", "{:.2f}"),
    ("in SLO", "attainment", "{:.1%}"),
    ("worst share", "worst_share", "{:.2f}"),
    ("Jain", "jain", "{:.3f}"),
    ("us/event", "policy_us", "{:.0f}"),
)
_LAST_LINE = (
    *("mean_wait_s", "p99_wait_s", "rare_max_wait_s", "switches", "goodput"),
    *("worst_share", "jain", "cpu_s"),
)
# load in percent -> policy -> figures of all seeds
Rows = Mapping[int, Mapping[str, Figures]]


def table(load: int, rows: Mapping[str, Figures]) -> str:
    """One load: a line for each policy, then what only some policies say."""
    lines = [f"load {load} %", _line("policy", [heading for heading, _, _ in COLUMNS])]
    for policy, row in rows.items():
        lines.append(_line(policy, [text.format(row[key]) for _, key, text in COLUMNS]))
    for policy, row in rows.items():
        bound_s = row["bound_s"]
        if bound_s is not None:
            verdict = "holds" if row["rare_max_wait_s"] <= bound_s else "BROKEN"
            lines.append(
                f"  {policy}: rare model waited {row['rare_max_wait_s']:.1f} s at most, "
                f"bound {bound_s:.1f} s: {verdict}"
            )
        if row["eta"] is not None:
            lines.append(f"  {policy}: {_eta(row)}")
        if row["outcomes"].keys() != {"OK"}:
            lines.append(f"  {policy}: outcomes {row['outcomes']}")
        if row["num_unfinished"]:
            lines.append(f"  {policy}: {row['num_unfinished']} requests LEFT BEHIND")
    return "\n".join(lines)


def _line(name: str, cells: list[str]) -> str:
    return f"  {name:<28}" + "".join(f"{cell:>13}" for cell in cells)


def _eta(row: Figures) -> str:
    eta = row["eta"]
    thirds = " / ".join(f"{eta[f'{name}_bias_s']:+.1f}" for name in THIRDS)
    rises, unexplained = sum(row["rises"].values()), row["rises"].get(UNEXPLAINED, 0)
    causes = ", ".join(f"{cause} {number}" for cause, number in list(row["rises"].items())[:4])
    return (
        f"ETA of {eta['num']:.0f} a run ({eta['num_unknown']:.0f} unknown): "
        f"bias {eta['bias_s']:+.1f} s (by thirds {thirds}), "
        f"p90 of |error|/wait {eta['p90_relative_error']:.2f}, "
        f"within 25 % {eta['share_within_25_percent']:.0%}; "
        f"positions that rose {rises} of {row['num_positions']}, unexplained {unexplained}"
        + (f" ({causes})" if causes else "")
    )


def last_line(rows: Rows, about: Mapping[str, Any]) -> str:
    """JSON: policy -> load -> figures."""
    policies: dict[str, dict[str, Any]] = {}
    for load, by_policy in rows.items():
        for policy, row in by_policy.items():
            figures = {key: round(row[key], 4) for key in _LAST_LINE}
            hashes = "".join(row["log_hashes"]).encode()
            figures["log_hash"] = hashlib.sha256(hashes).hexdigest()
            policies.setdefault(policy, {})[str(load)] = figures
    return json.dumps({"bench": "sim", **about, "policies": policies}, sort_keys=True)
