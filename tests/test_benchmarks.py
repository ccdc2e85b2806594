"""The benchmarks run, and their published tables are what their result files say."""

import importlib.util
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


def test_attention_distillation_equals_eager_maps():
    command = [sys.executable, str(BENCHMARKS / "attention_distillation.py"), "--smoke"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = json.loads(shown.splitlines()[-1])["rows"]
    assert rows and all(row["error"] < 1e-5 and row["memory_ratio_to_finetuning"] > 0 for row in rows)


def test_the_published_table_is_made_from_the_published_results():
    spec = importlib.util.spec_from_file_location("efficacy", BENCHMARKS / "efficacy.py")
    efficacy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(efficacy)
    methods = [folder.name for folder in efficacy.RESULTS.iterdir() if folder.is_dir()]
    assert methods
    for method in methods:
        assert list((efficacy.RESULTS / method).glob("*.json"))
        assert (efficacy.RESULTS / f"{method}.md").read_text() == efficacy.table(method)
