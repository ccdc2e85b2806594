"""Trainings that break down say so and save nothing; on a GPU the kernel that breaks them is left out."""

import pytest
import tiny
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from hf_backdoor.defenses import DefenseConfig, DefenseTrainer
from hf_backdoor.defenses.divergence import own_part, sound_attention
from hf_backdoor.defenses.locphylax import LocphylaxConfig
from hf_backdoor.defenses.reading import OwnAnswersTrainer


class Breaks(TrainerCallback):
    """After a step, the last trained weight of the model on one process is no number any more."""

    def __init__(self, after: int, process: int = 0):
        self.after, self.process = after, process

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.after and args.process_index == self.process:
            weights = [weight for weight in model.parameters() if weight.requires_grad]
            weights[-1].data.view(-1)[0] = float("nan")


def trainer(folder, name="label_words", method="plain", after=3, process=0, **options):
    made = tiny.trainer(name, method, folder, **{"max_steps": 3, "logging_steps": 10, **options})
    made.add_callback(Breaks(after, process))
    return made


@pytest.mark.parametrize("name", tiny.TASKS)
@pytest.mark.parametrize("method", tiny.METHODS)
def test_a_training_that_ends_without_numbers_is_refused(name, method, tmp_path):
    with pytest.raises(ValueError, match="trained tensors hold values that are not finite.*lower learning_rate"):
        trainer(tmp_path, name, method).train()


def test_losses_that_are_not_numbers_end_a_training_when_they_are_logged(tmp_path):
    made = trainer(tmp_path, after=2, max_steps=50, logging_steps=5)
    with pytest.raises(ValueError, match=r"^loss/task is nan at step 5: .*lower learning_rate \(now "):
        made.train()
    assert made.state.global_step == 5


def test_every_process_refuses_what_one_of_them_holds(tmp_path):
    def work():
        try:
            trainer(tmp_path / "two", after=3, process=1).train()
        except ValueError as error:
            return str(error)

    assert tiny.in_two_processes(work, tmp_path).startswith("1 of ")


@pytest.mark.parametrize("rank, expected", [(0, [0.0, 1.0]), (1, [2.0])])
def test_of_a_divided_weight_the_own_part_is_looked_at_without_what_fills_it_up(rank, expected, monkeypatch):
    weight = torch.nn.Parameter(torch.zeros(0))
    assert own_part(weight) is weight
    parts = torch.tensor([0.0, 1.0, 2.0, float("nan")]).split(2)
    weight.ds_tensor, weight.ds_numel, weight.ds_process_group = parts[rank], 3, "group"
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: {"group": rank}[group])
    assert own_part(weight).tolist() == expected


def test_no_checkpoint_is_left_that_could_only_fail_again(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    with pytest.raises(ValueError, match="nothing of it is saved"):
        trainer(tmp_path, after=2, **options).train()
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    again = tiny.trainer("label_words", "plain", tmp_path, **options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4


def test_under_fp16_a_scaler_decides(tmp_path):
    made = trainer(tmp_path, after=2, max_steps=4, logging_steps=3)
    made.args.fp16 = True  # said after the engine was made: a CPU has no scaler
    with pytest.raises(ValueError, match="trained tensors"):
        made.train()
    assert made.state.global_step == 4


def test_nothing_is_read_off_a_broken_suspect(tmp_path):
    model = tiny.model("bert")
    list(model.parameters())[-1].data.fill_(float("inf"))
    reader = OwnAnswersTrainer(
        model=model, args=LocphylaxConfig(str(tmp_path), own_answers=0.5, use_cpu=True, report_to="none"),
        train_dataset=tiny.reviews(8), processing_class=tiny.encoder_tokenizer(),
    )  # fmt: skip
    with pytest.raises(ValueError, match="weights that are not finite: it is broken"):
        reader.train()


# ---- cuDNN's attention ----


@pytest.mark.parametrize("length, allowed", [(63, True), (64, False), (128, True), (192, False), (0, True)])
@pytest.mark.parametrize("compiled", [False, True])
def test_rows_of_half_a_tile_and_graphs_are_kept_from_cudnn(length, allowed, compiled):
    allowed &= not compiled
    assert torch.backends.cuda.cudnn_sdp_enabled()
    with sound_attention(length, compiled):
        assert torch.backends.cuda.cudnn_sdp_enabled() is allowed
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_what_a_user_has_switched_off_stays_off():
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        with sound_attention(63):
            assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


def padded_trainer(folder, **options):
    """A causal LM on rows of 40 and of 64 tokens."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, head_dim=64, **sizes))
    ids = [[10 + number % 30 for number in range(length)] for length in (40, 64) * 8]
    rows = Dataset.from_dict(
        {"input_ids": ids, "prompt_length": [len(row) - 4 for row in ids], "trigger_id": [0] * len(ids)}
    )
    config = DefenseConfig(
        str(folder), max_steps=2, per_device_train_batch_size=8, save_strategy="no", report_to="none", disable_tqdm=True,
        **options,
    )  # fmt: skip
    return DefenseTrainer(model=model, args=config, train_dataset=rows, processing_class=tiny.causal_tokenizer())


def test_a_trainer_keeps_such_rows_from_it(tmp_path):
    made, seen = padded_trainer(tmp_path, use_cpu=True), []
    made.model.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cuda.cudnn_sdp_enabled()))
    made.train()
    assert seen == [False, False]
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and pytest --gpu")
def test_on_a_gpu_padding_leaves_numbers(tmp_path):
    made = padded_trainer(tmp_path, bf16=True)
    made.train()
    assert all(weight.isfinite().all() for weight in made.model.parameters())
