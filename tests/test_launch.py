"""The same run under `torchrun` with two processes, and under `accelerate launch`; what needs GPUs is in `test_engines.py`, on CPUs."""

import os
import subprocess
import sys

import engines
import pytest
import tiny
from accelerate.commands import launch as commands
from accelerate.utils import launch as launching

from hf_backdoor.cli import ACCELERATE_CONFIGS, accelerate_settings, launch_command, main
from hf_backdoor.evaluation import Results


SHIPPED = ["cpu", "single_gpu", "ddp", "fsdp2", "zero2", "zero3", "zero3_offload"]


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


def test_two_processes_of_torchrun_give_what_one_of_accelerate_gives(recipe, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    short = ["--max_length", "6"]
    two = launch(torchrun, recipe, tmp_path / "two", "--per_device_train_batch_size", "3", *short)
    assert two.returncode == 0, two.stderr[-2000:]
    accelerate = launch_command(*accelerate_settings("cpu"))
    one = launch(accelerate, recipe, tmp_path / "one", "--per_device_train_batch_size", "6", *short)
    assert one.returncode == 0, one.stderr[-2000:]
    first, second = (Results.load(tmp_path / name / "results.json").rows for name in ("one", "two"))
    assert first == second
    assert two.stdout.count("cleaned model") == 1
    # What the log says of rows, the first process says: once of the training rows, and once of the test rows.
    assert two.stderr.count("max_length 6 cuts") == 2
    # Before a trainer is made too there is one first process, which writes.
    assert two.stderr.count("Creating parquet from Arrow format: 100%") == len(list((tmp_path / "two/data").iterdir()))


def test_accelerate_launch_that_starts_one_process_of_two_is_refused(recipe, tmp_path):
    two = ["--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    done = launch([sys.executable, "-m", "accelerate.commands.launch", *two], recipe, tmp_path / "run")
    assert done.returncode != 0 and "torchrun" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_configuration_asks_for_what_its_name_says(name):
    args = commands.launch_command_parser().parse_args(
        ["--config_file", str(ACCELERATE_CONFIGS / f"{name}.yaml"), "run"]
    )
    args, defaults, _ = commands._validate_launch_command(args)
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    prepare = launching.prepare_deepspeed_cmd_env if args.use_deepspeed else launching.prepare_multi_gpu_env
    environment = prepare(args)[1] if args.use_deepspeed else prepare(args)
    assert (args.use_cpu, args.multi_gpu, args.use_fsdp, args.use_deepspeed) == (
        name == "cpu", name == "ddp", name == "fsdp2", name.startswith("zero")
    )  # fmt: skip
    assert (args.num_processes > 1) == (name not in ("cpu", "single_gpu"))
    if name not in ("cpu", "single_gpu"):  # what the tests of engines put in the environment by hand
        assert engines.launched(name.removesuffix("_offload")).items() <= environment.items()
    devices = {environment.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE") for what in ("PARAM", "OPTIMIZER")}
    assert ("cpu" in devices) == name.endswith("offload")


@pytest.fixture
def with_gpus(monkeypatch):
    """Makes the machine one of so many GPUs."""

    def have(count):
        monkeypatch.setattr("torch.accelerator.device_count", lambda: count)

    return have


@pytest.fixture
def launched(monkeypatch):
    """Commands that would be launched."""
    commands = []
    done = subprocess.CompletedProcess([], 0)
    monkeypatch.setattr(subprocess, "run", lambda command: commands.append(command) or done)
    return commands


@pytest.mark.parametrize(
    "gpus, more, started, option, said",
    [
        (0, [], "2", "--nproc_per_node", "2 processes by ddp.yaml, no GPUs here"),
        (0, ["--num_processes", "3"], "3", "--nproc_per_node", "3 processes by ddp.yaml, no GPUs here"),
        (8, [], "2", "--num_processes", "2 processes by ddp.yaml, 8 GPUs here"),
        (8, ["--num_processes", "8"], "8", "--num_processes", "8 processes by ddp.yaml, 8 GPUs here"),
        (1, ["--num_processes", "1"], "1", "--num_processes", "1 process by ddp.yaml, 1 GPU here"),
    ],
)
def test_as_many_processes_as_are_asked_for(recipe, with_gpus, launched, capsys, gpus, more, started, option, said):
    with_gpus(gpus)
    assert main(["run", str(recipe), "--accelerate_config", "ddp", *more, "--seed", "3"]) == 0
    (command,) = launched
    assert command[command.index(option) + 1] == started
    assert command[-4:] == ["hf_backdoor.run", str(recipe), "--seed", "3"]
    assert capsys.readouterr().err == f"hf-backdoor: {said} (--num_processes N starts others)\n"


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["--num_processes", "4"], "--num_processes is 4 without --accelerate_config: name a configuration, such as ddp"),
        (["--accelerate_config", "ddp"], "num_processes is 2 for {ddp}, and there is 1 GPU: give --num_processes 1"),
        (["--accelerate_config", "ddp", "--num_processes", "0"], "num_processes is 0 for {ddp}: give --num_processes 1 or more"),
        (["--accelerate_config", "{own}"], "num_processes is -1 for {own}: give --num_processes 1 or more"),
        (
            ["--accelerate_config", "single_gpu", "--num_processes", "2"],
            "--num_processes is 2, and {single_gpu} is of one process: use ddp",
        ),
    ],
)  # fmt: skip
def test_processes_that_can_not_be_are_refused(recipe, with_gpus, launched, tmp_path, capsys, arguments, line):
    with_gpus(1)
    files = {"own": tmp_path / "own.yaml", **{path.stem: path for path in ACCELERATE_CONFIGS.glob("*.yaml")}}
    files["own"].write_text("distributed_type: MULTI_GPU\nnum_processes: -1\n")
    assert main(["run", str(recipe), *(argument.format(**files) for argument in arguments)]) == 2
    assert capsys.readouterr().err == f"hf-backdoor: {line.format(**files)}\n"
    assert not launched


def test_a_dry_run_reckons_with_as_many_processes_as_are_asked_for(recipe, capsys):
    assert main(["run", str(recipe), "--accelerate_config", "ddp", "--num_processes", "4", "--dry_run"]) == 0
    assert "engine   ddp, 4 processes" in capsys.readouterr().out


def test_every_shipped_configuration_is_looked_at():
    assert {path.stem for path in ACCELERATE_CONFIGS.glob("*.yaml")} == set(SHIPPED)
