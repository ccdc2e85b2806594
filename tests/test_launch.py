"""The same run under `torchrun` with two processes, and under `accelerate launch` with each shipped configuration."""

import os
import subprocess
import sys

import pytest
import tiny

from hf_backdoor.cli import ACCELERATE_CONFIGS, launch_command
from hf_backdoor.evaluation import Results


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return tiny.classifier_recipe(
        tmp_path_factory.mktemp("launch"),
        reference="train",
        method="locphylax",
        known_triggers=list(tiny.KNOWN[:2]),
        learning_rate=0.003,
    )


def launch(command, recipe, output_dir, *flags):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [*command, "-m", "hf_backdoor.run", str(recipe), "--output_dir", str(output_dir), *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_two_processes_give_what_one_gives(recipe, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    two = launch(torchrun, recipe, tmp_path / "two", "--per_device_train_batch_size", "3")
    assert two.returncode == 0, two.stderr[-2000:]
    one = launch([sys.executable], recipe, tmp_path / "one", "--per_device_train_batch_size", "6")
    assert one.returncode == 0, one.stderr[-2000:]
    first, second = (Results.load(tmp_path / name / "results.json").rows for name in ("one", "two"))
    assert first == second
    assert two.stdout.count("cleaned model") == 1
    # Before a trainer is made too there is one first process, which writes.
    assert two.stderr.count("Creating parquet from Arrow format: 100%") == len(list((tmp_path / "two/data").iterdir()))


@pytest.mark.parametrize("name", ["cpu"])
def test_accelerate_launch(recipe, tmp_path, name):
    done = launch(launch_command(name), recipe, tmp_path / name, "--per_device_train_batch_size", "6")
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / name / "results.json").exists()


def test_accelerate_launch_that_starts_one_process_of_two_is_refused(recipe, tmp_path):
    two = ["--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    done = launch([sys.executable, "-m", "accelerate.commands.launch", *two], recipe, tmp_path / "run")
    assert done.returncode != 0 and "torchrun" in done.stderr
    assert not (tmp_path / "run").exists()


def test_shipped_configurations_load():
    from accelerate.commands.config.config_args import load_config_from_file

    names = {path.stem for path in ACCELERATE_CONFIGS.glob("*.yaml")}
    assert {"cpu", "single_gpu", "ddp"} <= names
    for path in ACCELERATE_CONFIGS.glob("*.yaml"):
        assert load_config_from_file(str(path)).num_processes >= 1
