"""Reads the request traces beside the checkout (shared/traces): times, lengths, tenants.

A trace that is not there is a ``FileNotFoundError`` with the place where it was looked for. Rows
without tokens are failed calls in the source and are left out.
"""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "traces"
FILES = {
    "azure-conv": "azure2023_conv_0-20min.csv",
    "azure-code": "azure2023_code_0-20min.csv",
    "servegen": "servegen_m-large_sampled_15min_8rps.jsonl",
    "servegen-r1": "servegen_deepseek-r1_sampled_15min_2rps.jsonl",
}
# The Azure traces have no tenants: rows are dealt to so many, as 8 : 4 : 2 : 1 : 1.
_DEALT = ("t0",) * 8 + ("t1",) * 4 + ("t2",) * 2 + ("t3", "t4")


@dataclass(frozen=True, slots=True)
class Row:
    """One request of a trace."""

    at_s: float
    tenant: str
    num_prompt_tokens: int
    num_output_tokens: int


def is_there(trace: str) -> bool:
    """Whether the file of a trace can be read on this machine."""
    return (FOLDER / FILES[trace]).is_file()


def read_trace(trace: str) -> list[Row]:
    """The rows of a trace, in order of time."""
    path = FOLDER / FILES[trace]
    rows = _azure(path) if path.suffix == ".csv" else _sampled(path)
    return sorted(
        (row for row in rows if row.num_prompt_tokens > 0 and row.num_output_tokens > 0),
        key=lambda row: row.at_s,
    )


def _azure(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        for number, line in enumerate(csv.DictReader(file)):
            # seven decimals, of which datetime takes six
            at = datetime.fromisoformat(line["TIMESTAMP"][:26]).replace(tzinfo=UTC)
            yield Row(
                at.timestamp(),
                _DEALT[number * 7 % len(_DEALT)],
                int(line["ContextTokens"]),
                int(line["GeneratedTokens"]),
            )


def _sampled(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            yield Row(row["timestamp"], row["tenant"], row["input_length"], row["output_length"])
