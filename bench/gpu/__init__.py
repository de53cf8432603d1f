"""The GPU report: ``python -m bench.gpu``. A bare machine needs no installation of ours for it."""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("headway") is None:
    sys.path.append(str(Path(__file__).parents[2] / "protos"))
