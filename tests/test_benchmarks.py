"""The benchmarks run."""

import json
import subprocess
import sys
from pathlib import Path


BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def test_trainer_overhead_prints_a_row_for_each_stage_and_model():
    command = [sys.executable, str(BENCHMARKS / "trainer_overhead.py"), "--smoke"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = json.loads(shown.splitlines()[-1])["rows"]
    found = {(row["model"], row["stage"]) for row in rows}
    assert {("encoder", "locphylax/inject"), ("causal_lm", "locphylax/inject")} <= found
    assert all(row["time_ratio"] > 0 and row["memory_ratio"] > 0 for row in rows)
