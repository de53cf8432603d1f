"""docs/gateway.md says which test stands for which promise to whose client."""

import re
from pathlib import Path

from bench.stack import ROOT


def test_every_test_is_in_the_table_and_every_line_has_its_tests() -> None:
    section = (ROOT / "docs" / "gateway.md").read_text().split("## Whose clients")[1]
    table = section.split("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("|")][2:]
    assert all("`test_" in row.rpartition(" | ")[2] for row in rows)
    files = Path(__file__).parent.glob("test_*.py")
    sources = {path: path.read_text() for path in files if path != Path(__file__)}
    defined = {
        name
        for source in sources.values()
        for name in re.findall(r"^(?:async )?def (test_\w+)", source, re.MULTILINE)
    }
    assert set(re.findall(r"`(test_\w+)`", table)) == defined
