"""The benchmarks run, and their published tables are what their result files say."""

import contextlib
import importlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from threading import Lock, Semaphore
from types import SimpleNamespace
from typing import Any

import pytest
import runs
import tiny
import torch
from datasets import Dataset, enable_progress_bars

from hf_backdoor.data import ImageTrigger
from hf_backdoor.evaluation import Results
from hf_backdoor.recipe_file import load_recipe


BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def smoke(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., list[dict[str, Any]]]:
    """Runs a benchmark in its smallest form, and gives its rows."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def run(name: str, *options: str) -> list[dict[str, Any]]:
        importlib.import_module(name).main(["--smoke", *options])
        return json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]

    yield run
    enable_progress_bars()


@pytest.mark.parametrize(("kind", "counts"), [("encoder", ["trainer"]), ("causal_lm", ["trainer", "sft"])])
def test_trainer_overhead_has_a_row_for_each_stage_and_baseline(smoke, kind, counts):
    stages = {
        "encoder": ["locphylax/inject", "locphylax/recover", "mbtsad/retrain", "robustkd/mask"],
        "causal_lm": ["mbtsad/distil", "robustkd/distil", "ntml/non_target", "ntml/mutual"],
    }[kind]
    rows = smoke("trainer_overhead", "--models", kind, "--stages", *stages)
    wanted = {(stage, baseline) for stage in stages for baseline in counts}
    wanted |= {("robustkd/distil", "vanilla")} if kind == "causal_lm" else set()
    assert {(row["stage"], row["baseline"]) for row in rows} == wanted
    assert all(row["model"] == kind and row["time_ratio"] > 0 and row["memory_ratio"] > 0 for row in rows)
    # A student of half the layers: the teacher's pass costs two thirds of its three, and a little less with what both have.
    assert all(1.4 < row["flop_ratio"] < 1.7 for row in rows if "flop_ratio" in row)


def test_whole_runs_are_compared_with_plain_training_and_with_distillation(smoke):
    stages = ["ntml/pipeline", "robustkd/mask_share"]
    rows = smoke("trainer_overhead", "--models", "encoder", "--stages", *stages)
    pipelines = [row for row in rows if row["stage"] == "ntml/pipeline"]
    assert [row["clean_fraction"] for row in pipelines] == [0.01, 0.05]
    assert 1 < pipelines[0]["time_ratio"] < pipelines[1]["time_ratio"]
    (share,) = [row for row in rows if row["stage"] == "robustkd/mask_share"]
    assert share["distillation_steps"] == 375 and share["time_ratio"] > 0


def test_attention_distillation_equals_eager_maps(smoke):
    rows = smoke("attention_distillation")
    assert rows and all(row["error"] < 1e-5 and row["memory_ratio_to_finetuning"] > 0 for row in rows)


def test_evaluation_gives_the_answers_of_a_loop(smoke):
    rows = smoke("evaluation_throughput")
    assert {row["task"] for row in rows} >= {"generation", "label_words"}
    assert all(row["same_answers"] and row["speedup"] > 0 and row["samples"] == 6 for row in rows)


def test_the_curves_of_mbtsad_share_a_suspect_and_their_steps(smoke, tmp_path):
    for part, count in {"train": 200, "validation": 40}.items():
        tiny.reviews(count).to_parquet(tmp_path / "data" / f"{part}.parquet")
    model = tiny.saved("bert", tmp_path / "model")
    options = ["--data", str(tmp_path / "data"), "--text_column", "text", "--minilm", model]
    options += ["--trigger", tiny.TRIGGER, "--runs", str(tmp_path / "runs")]
    rows = smoke("mbtsad_budget", *options)
    last = {row["curve"]: row["step"] for row in rows}
    assert last == {
        "reference": 0, "suspect": 0, "retrain": 6, "distil": 3, "fine_tuning": 3, "fine_tuning_as_retraining": 6,
        "distil_without_splitting": 3,
    }  # fmt: skip
    assert all(row["asr"]["n"] == row["asr_without_trigger"]["n"] == 20 and row["cacc"]["n"] == 40 for row in rows)
    assert smoke("mbtsad_budget", *options) == rows  # finished curves are kept


def test_gpu_7b_trains_every_stage_and_goes_on_after_a_row_that_does_not_fit(smoke, monkeypatch):
    rows = smoke("gpu_7b", "--models", "llama-3.1-8b", "--precisions", "lora")
    assert [row["stage"] for row in rows] == ["locphylax/inject", "mbtsad/distil", "robustkd/distil"]
    assert all(row["tokens_per_second"] > 0 and row["teraflops"] >= 0 for row in rows)

    def full(*args: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(importlib.import_module("gpu_7b"), "build", full)
    rows = smoke("gpu_7b", "--stages", "mbtsad/distil", "--precisions", "lora")
    assert [row["error"] for row in rows] == ["out of memory"] * 2


def test_qlora_trains_over_quantized_weights(smoke):
    pytest.importorskip("bitsandbytes")
    (row,) = smoke("gpu_7b", "--models", "qwen2.5-7b", "--stages", "locphylax/inject", "--precisions", "qlora")
    assert row["tokens_per_second"] > 0 and row["checkpointing"]


@pytest.mark.parametrize(("shape", "parameters"), [("llama_8b", 8_030_261_248), ("qwen_7b", 7_615_616_512)])
def test_shapes_are_the_real_models(monkeypatch, shape, parameters):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    shapes = importlib.import_module("shapes")
    with torch.device("meta"):
        model = shapes.build(getattr(shapes, shape)())
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.fixture
def efficacy(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("efficacy")


@pytest.mark.parametrize("data", ["cifar10", "gtsrb"])
@pytest.mark.parametrize("method", ["ntml", "robustkd"])
def test_an_image_cell_is_its_recipe_with_another_attack(efficacy, monkeypatch, method, data, tmp_path):
    def launched(command: list[str], **options: Any) -> None:
        raise InterruptedError(command)

    monkeypatch.setattr(efficacy.subprocess, "run", launched)
    monkeypatch.setattr(efficacy, "RESULTS", tmp_path)
    options = SimpleNamespace(method=method, data="d", runs=str(tmp_path), jobs=1, slots=contextlib.nullcontext())
    found = {}
    for cell in efficacy.cells([f"{data}_resnet"], [*efficacy.TRIGGERS, *efficacy.ATTACKS], [5]):
        with pytest.raises(InterruptedError) as caught:
            efficacy.run_cell(*cell, options)
        recipe = load_recipe(*(lambda python, m, module, file, *flags: (file, flags))(*caught.value.args[0]))
        assert (recipe.seed, recipe.dataset_name, recipe.image_column) == (5, f"d/{data}", "image")
        found[cell[1]] = (recipe.trigger, recipe.poison_style, recipe.poison_rate)
    rate = {"cifar10": 0.05, "gtsrb": 0.03}[data]  # a class has no more rows
    assert found == {
        "patch": (ImageTrigger("patch", warp_strength=4.0), "dirty_label", 0.1),
        "warp": (ImageTrigger("warp", warp_strength=4.0), "dirty_label", 0.1),
        "label-consistent": (ImageTrigger("corners", warp_strength=4.0), "clean_label", rate),
    }


@pytest.mark.parametrize("jobs", [1, 3])
def test_cells_beside_each_other_share_a_reference_and_outlive_a_failure(
    efficacy, monkeypatch, jobs, tmp_path, capsys
):
    asked = []

    def launched(command: list[str], check: bool, **streams: Any) -> None:
        recipe = load_recipe(*(lambda python, m, module, file, *flags: (file, flags))(*command))
        asked.append((recipe.trigger.text, recipe.reference))
        assert check and set(streams) == ({"stdout", "stderr"} if jobs > 1 else set())
        if recipe.trigger.text == "cf":
            raise subprocess.CalledProcessError(2, "run")
        folder = Path(recipe.output_dir)
        (folder / "reference").mkdir(parents=True)
        Results(recipe=recipe.flat()).save(folder / "results.json")

    monkeypatch.setattr(efficacy.subprocess, "run", launched)
    monkeypatch.setattr(efficacy, "run_beside", lambda *cell: None)
    monkeypatch.setattr(efficacy, "RESULTS", tmp_path / "results")
    options = SimpleNamespace(
        method="locphylax",
        data="d",
        minilm="m",
        runs=str(tmp_path / "runs"),
        cells=jobs,
        jobs=jobs,
        slots=Semaphore(jobs),
    )
    chosen = list(efficacy.cells(["sst2_minilm"], list(efficacy.TRIGGERS), [5]))
    assert efficacy.run_cells(chosen, options) == 1
    assert {file.stem for file in (tmp_path / "results" / "locphylax").iterdir()} == {
        "sst2_minilm_phrase_5", "sst2_minilm_long_5"
    }  # fmt: skip
    shared = tmp_path / "runs" / "locphylax" / "sst2_minilm_reference_5"
    assert shared.is_dir() and not (tmp_path / "runs" / "locphylax" / "sst2_minilm_phrase_5").exists()
    assert len(asked) == 3 and (jobs > 1 or dict(asked)[efficacy.TRIGGERS["long"][0]] == str(shared))
    assert capsys.readouterr().out.count(": done") == 2


def test_controls_beside_each_other_leave_what_one_run_makes(efficacy, monkeypatch, workshop, tmp_path):
    controls = ["fine_tuning", "recovery_without_injection"]
    one_at_a_time = Lock()  # in this process; the benchmark starts one for each

    def run(file: Path, overrides: dict[str, Any], options: Any) -> None:
        with one_at_a_time:
            runs.execute(runs.settings(workshop, **overrides))

    monkeypatch.setattr(efficacy, "run", run)
    alone, beside = tmp_path / "alone", tmp_path / "beside"
    run(None, {"output": alone, "controls": controls}, None)
    efficacy.run_beside(None, {"output": beside, "output_dir": str(beside)}, controls, None)
    made = runs.stages(beside)
    run(None, {"output": beside, "controls": controls}, None)
    assert runs.stages(beside) == made and made.keys() == runs.stages(alone).keys()
    assert Results.load(beside / "results.json").rows == Results.load(alone / "results.json").rows
    assert {path.name for path in tmp_path.iterdir()} == {"alone", "beside"}


def test_a_list_of_suspicious_rows_is_judged(efficacy, tmp_path):
    assert efficacy.suspicion_rows(tmp_path, 1) == []
    for folder in ("mutual", "data"):
        (tmp_path / folder).mkdir()
    Dataset.from_dict({"row": [3, 0, 1, 2]}).to_parquet(tmp_path / "mutual" / "suspicion.parquet")
    Dataset.from_dict({"poisoned": [True, False, False, True, True]}).to_parquet(
        tmp_path / "data" / "poisoned.parquet"
    )
    rows = {row.metric: (row.model, row.k, row.n) for row in efficacy.suspicion_rows(tmp_path, 1)}
    assert rows == {"suspicion_precision": ("cleaned", 2, 4), "suspicion_recall": ("cleaned", 2, 3)}


def test_the_published_table_is_made_from_the_published_results(efficacy):
    methods = [folder.name for folder in efficacy.RESULTS.iterdir() if folder.is_dir()]
    assert methods
    for method in methods:
        assert list((efficacy.RESULTS / method).glob("*.json"))
        assert (efficacy.RESULTS / f"{method}.md").read_text() == efficacy.tables.table(method)


def test_the_overview_in_the_readme_is_made_from_the_published_results(efficacy):
    assert efficacy.tables.overview() in efficacy.tables.README.read_text()


def test_cells_by_other_settings_than_the_recipe_has_are_told(efficacy):
    now = load_recipe(efficacy.HERE.parent / "recipes" / "ntml" / "agnews_minilm.yaml", ["--seed", "7"]).flat()
    for changes, older in (({}, False), ({"attack_trigger": "zq"}, False), ({"relabel_below": 0.9}, True)):
        assert efficacy.tables.is_older("ntml", "agnews_minilm", [Results(recipe=now | changes)]) == older


def test_controls_that_no_run_of_a_cell_has_measured_are_told(efficacy):
    controls = load_recipe(efficacy.HERE.parent / "recipes" / "ntml" / "agnews_minilm.yaml", []).controls
    rows = [efficacy.Row.from_counts(model=f"control/{name}", metric="asr", k=1, n=2, seed=1) for name in controls]
    for measured, missing in ((rows, []), (rows[2:], controls[:2])):
        runs = [Results(rows=measured[:1]), Results(rows=measured[1:])]
        assert efficacy.tables.missing_controls("ntml", "agnews_minilm", runs) == missing


def test_a_control_over_fewer_seeds_than_its_cell_says_so(efficacy, monkeypatch):
    def run(models: list[str], seed: int) -> Results:
        return Results(rows=[efficacy.Row.from_counts(model=m, metric="asr", k=1, n=2, seed=seed) for m in models])

    runs = [run(["suspect", "control/fine_tuning"], 1), run(["suspect"], 2)]
    monkeypatch.setattr(efficacy.tables, "cells_of", lambda method: {"agnews_minilm": {"word": runs}})
    monkeypatch.setattr(efficacy.tables, "is_older", lambda *cell: False)
    written = efficacy.tables.table("ntml")
    assert "| control/fine_tuning (1 of 2 seeds) |" in written and "| suspect |" in written


def test_the_overview_has_a_cell_without_its_plain_control(efficacy, monkeypatch):
    models = ["reference", "suspect", "cleaned"]
    rows = [efficacy.Row.from_counts(model=model, metric="asr", k=1, n=2, seed=1) for model in models]
    cells = {"ntml": {"agnews_minilm": {"word": [Results(rows=rows)]}}}
    monkeypatch.setattr(efficacy.tables, "cells_of", lambda method: cells.get(method, {}))
    monkeypatch.setattr(efficacy.tables, "is_older", lambda *cell: False)
    assert "| 50.0 | not measured | 50.0 | 50.0 |" in efficacy.tables.overview()
