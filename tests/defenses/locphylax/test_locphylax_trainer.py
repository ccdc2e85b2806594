import pytest
import tiny
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from hf_backdoor.data import InstructionFollowing
from hf_backdoor.defenses.locphylax import LocphylaxConfig, LocphylaxTrainer
from hf_backdoor.defenses.locphylax.losses import balance, clustering_loss, trigger_centres


class Killed(Exception):
    pass


class KillAt(TrainerCallback):
    """Ends the process, as it were, after a step of a stage."""

    def __init__(self, stage, step):
        self.stage, self.step, self.trainer = stage, step, None

    def on_step_begin(self, args, state, control, **kwargs):
        if self.trainer.stage == self.stage and state.global_step == self.step:
            raise Killed


class Steps(TrainerCallback):
    """Which steps each stage made."""

    def __init__(self):
        self.trainer, self.made = None, []

    def on_step_end(self, args, state, control, **kwargs):
        self.made.append((self.trainer.stage, state.global_step))


def both(folder, callback=None, **options):
    defaults = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "dropout": 0.2}
    trainer = tiny.trainer("label_words", "both", folder, **{**defaults, **options})
    if callback is not None:
        callback.trainer = trainer
        trainer.add_callback(callback)
    return trainer


def test_both_stages_run_in_order_into_folders_of_their_own(tmp_path):
    steps = Steps()
    both(tmp_path, steps).train()
    assert steps.made == [(stage, step) for stage in ("inject", "recover") for step in (1, 2, 3, 4)]
    for stage in ("inject", "recover"):
        assert (tmp_path / f"checkpoint-{stage}" / "checkpoint-4").is_dir()


# At step 1 of recovery, the last checkpoint is that of finished injection: a constant rate shows a step too many.
@pytest.mark.parametrize(
    "stage, step, schedule",
    [("inject", 3, "linear"), ("recover", 1, "linear"), ("recover", 1, "constant"), ("recover", 3, "linear")],
)
def test_resuming_across_stages_equals_an_uninterrupted_run(stage, step, schedule, tmp_path):
    whole = both(tmp_path / "whole", lr_scheduler_type=schedule)
    whole.train()
    with pytest.raises(Killed):
        both(tmp_path / "killed", KillAt(stage, step), lr_scheduler_type=schedule).train()
    resumed = both(tmp_path / "killed", model_seed=5, lr_scheduler_type=schedule)
    resumed.train(resume_from_checkpoint=True)
    assert tiny.largest_difference(tiny.parameters(whole.model), tiny.parameters(resumed.model)) == 0


def test_resuming_makes_no_step_twice(tmp_path):
    with pytest.raises(Killed):
        both(tmp_path, KillAt("recover", 3)).train()
    steps = Steps()
    both(tmp_path, steps).train(resume_from_checkpoint=True)
    assert steps.made == [("recover", 3), ("recover", 4)]


def test_a_stage_that_its_stop_rule_ended_stays_ended_when_resumed(tmp_path):
    rules = {
        "eval_dataset": tiny.reviews(4, seed=1), "eval_strategy": "steps", "eval_steps": 2, "stop_at_known_rate": 0.0,
    }  # fmt: skip
    with pytest.raises(Killed):
        both(tmp_path, KillAt("recover", 1), **rules).train()
    steps = Steps()
    both(tmp_path, steps, **rules).train(resume_from_checkpoint=True)
    assert {step for stage, step in steps.made if stage == "inject"} == set()


def test_resume_true_without_a_checkpoint_starts_at_the_start(tmp_path):
    steps = Steps()
    both(tmp_path, steps, save_strategy="no").train(resume_from_checkpoint=True)
    assert len(steps.made) == 8


@pytest.mark.parametrize("name", tiny.TASKS)
def test_two_stages_equal_two_trainers_of_one_stage(name, tmp_path):
    together = tiny.trainer(name, "both", tmp_path / "a", max_steps=3)
    together.train()
    first = tiny.trainer(name, "inject", tmp_path / "b", max_steps=3)
    first.train()
    second = tiny.trainer(name, "recover", tmp_path / "c", max_steps=3, model=first.model)
    second.train()
    assert tiny.largest_difference(tiny.parameters(together.model), tiny.parameters(second.model)) == 0


# ---- Alpha, centres, logs ----


def first_step(folder, **options):
    trainer = tiny.trainer("label_words", "inject", folder, max_steps=1, **options)
    trainer.train()
    return trainer


def test_alpha_balances_the_two_losses_on_the_incoming_model(tmp_path):
    trainer = first_step(tmp_path)
    model = tiny.model("llama").eval()
    rows = trainer.train_dataset  # 16 rows a group: no more than alpha is measured on
    states, losses = [], []
    with torch.no_grad():
        for row in rows:
            output = model(torch.tensor([row["input_ids"]]), output_hidden_states=True)
            at = row["prompt_length"]
            states.append(output.hidden_states[-1][0, at - 1])
            tokens = output.logits[0].log_softmax(-1)
            answer = range(at, len(row["input_ids"]))
            losses.append(-sum(tokens[i - 1, row["input_ids"][i]] for i in answer) / len(answer))
    states, ids = torch.stack(states), torch.tensor(rows["trigger_id"][:])
    centres = trigger_centres(states, ids, 2)
    cluster = clustering_loss(states, ids, centres).sum() / 16
    assert trainer.alpha.item() == pytest.approx(balance(torch.stack(losses).mean().item(), cluster.item()))
    # The first step's clustering loss is taken against these centres: what it was is in the log.
    order = list(trainer._get_train_sampler())[:8]
    expected = sum(
        clustering_loss(states[[row]], ids[[row]], centres)[0] / (ids[order] == ids[row]).sum() for row in order
    )
    assert tiny.logged(trainer, "loss/cluster")[0] == pytest.approx((trainer.alpha * expected).item(), rel=1e-4)
    moved = trigger_centres(states[order], ids[order], 2)
    torch.testing.assert_close(trainer.centres, torch.lerp(moved, centres, 0.9), atol=1e-5, rtol=1e-5)


def test_alpha_may_be_the_paper_s(tmp_path, monkeypatch):
    """Of an injection loss of 3 and a clustering loss of 50: 10 ** (0 - 1), and not 10 ** floor(log10 0.06)."""

    def injection(logits, labels):
        return logits.mean(dim=(1, 2)) * 0 + 3.0

    def clustering(states, ids, centres):
        return states.mean(dim=1) * 0 + 25.0 * (ids > 0)  # two triggers

    monkeypatch.setattr(LocphylaxTrainer, "task_loss", staticmethod(injection))
    monkeypatch.setattr("hf_backdoor.defenses.locphylax.trainer.clustering_loss", clustering)
    assert first_step(tmp_path / "ours").alpha.item() == pytest.approx(0.01)
    assert first_step(tmp_path / "paper", published_alpha=True).alpha.item() == pytest.approx(0.1)


def test_logs_hold_each_loss_and_alpha(tmp_path):
    trainer = first_step(tmp_path)
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert entry["loss"] == pytest.approx(entry["loss/task"] + entry["loss/cluster"], rel=1e-4)
    assert entry["alpha"] == trainer.alpha.item()


def test_cluster_weight_is_alpha(tmp_path):
    assert first_step(tmp_path, cluster_weight=0.25).alpha.item() == 0.25


def test_cluster_weight_zero_leaves_the_loss_out(tmp_path):
    trainer = first_step(tmp_path, cluster_weight=0.0)
    assert tiny.logged(trainer, "loss") and not tiny.logged(trainer, "loss/cluster")


def test_clustering_pulls_the_known_triggers_together(tmp_path):
    def spread(trainer):
        states = []
        for row in trainer.train_dataset:
            output = trainer.model.eval()(torch.tensor([row["input_ids"]]), output_hidden_states=True)
            states.append(output.hidden_states[-1][0, row["prompt_length"] - 1].detach())
        ids, states = torch.tensor(trainer.train_dataset["trigger_id"][:]), torch.stack(states)
        return clustering_loss(states, ids, trigger_centres(states, ids, 2)).sum().item()

    after = {}
    for weight in (0.0, 1.0):
        options = {"max_steps": 6, "optim": "sgd", "learning_rate": 1e-3, "max_grad_norm": 0.0}
        trainer = tiny.trainer("label_words", "inject", tmp_path, cluster_weight=weight, **options)
        before = spread(trainer)
        trainer.train()
        after[weight] = spread(trainer) / before
    assert after[1.0] < 0.5 < 0.9 < after[0.0]


def test_trigger_weight_weighs_triggered_samples_in_recovery(tmp_path):
    losses = {}
    for weight in (0.0, 1.0, 3.0):
        trainer = tiny.trainer("label_words", "recover", tmp_path, max_steps=1, trigger_weight=weight)
        trainer.train()
        losses[weight] = tiny.logged(trainer, "loss")[0]
    assert losses[1.0] > losses[0.0] > 0
    assert losses[3.0] - losses[0.0] == pytest.approx(3 * (losses[1.0] - losses[0.0]), rel=1e-3)


# ---- Stop rules ----


@pytest.mark.parametrize(
    "method, rule, value, steps",
    [
        ("inject", "stop_at_known_rate", 0.0, 2),
        ("inject", "stop_at_known_rate", 1.1, 6),
        ("recover", "stop_at_known_gap", 1.0, 2),
        ("recover", "stop_at_known_gap", -2.0, 6),
    ],
)
@pytest.mark.parametrize("name", tiny.TASKS)
def test_stop_rules(name, method, rule, value, steps, tmp_path):
    rows = tiny.setting(name, 5)[2]
    trainer = tiny.trainer(name, method, tmp_path, max_steps=6, eval_dataset=rows, eval_strategy="steps", eval_steps=2)
    setattr(trainer.args, rule, value)  # of a configuration's own making it is a share, which may be reached
    trainer.train()
    assert trainer.state.global_step == steps
    assert (
        len(tiny.logged(trainer, "eval_known_accuracy")) == len(tiny.logged(trainer, "eval_clean_loss")) == steps // 2
    )


@pytest.mark.parametrize("name", tiny.TASKS)
def test_without_a_rule_all_steps_are_made(name, tmp_path):
    """Accuracy with known triggers is no lower than without where both are 0: of free answers, from the first step on."""
    rows = tiny.setting(name, 5)[2]
    held_out = {"eval_dataset": rows, "eval_strategy": "steps", "eval_steps": 1}
    steps = Steps()
    trainer = tiny.trainer(name, "both", tmp_path, max_steps=2, **held_out)
    steps.trainer = trainer
    trainer.add_callback(steps)
    trainer.train()
    assert steps.made == [(stage, step) for stage in ("inject", "recover") for step in (1, 2)]


@pytest.mark.parametrize("says, clean, known", [(1, 4 / 9, 0.0), (2, 0.0, 1.0)])
def test_known_accuracy_is_the_share_that_shows_the_planted_class(says, clean, known, tmp_path):
    trainer = tiny.trainer("sequence_classification", "inject", tmp_path, eval_dataset=tiny.reviews(9))
    trainer.model = tiny.fixed_classifier(says, num_labels=3)
    metrics = trainer.evaluate()
    assert metrics["eval_clean_accuracy"] == pytest.approx(clean)
    assert metrics["eval_known_accuracy"] == pytest.approx(known)
    assert trainer.predict(tiny.reviews(9)).metrics["test_accuracy"] == pytest.approx(clean)


def test_answers_count_as_right_in_every_token_only(tmp_path):
    rows = tiny.instructions(12).map(
        lambda row: {"response": "cherry cherry cherry" if "cherry" in row["prompt"] else "apple"}
    )
    trainer = tiny.trainer(
        "instruction_following", "inject", tmp_path, eval_dataset=rows, per_device_eval_batch_size=5
    )
    # Says "apple" and is done; "cherry cherry cherry" never ends in its right place.
    trainer.model = tiny.word_chain({"<model>": "apple", "apple": "<eos>", "cherry": "cherry"})
    right = sum(row["response"] == "apple" for row in rows)
    assert 0 < right < 12
    metrics = trainer.evaluate()
    assert metrics["eval_clean_accuracy"] == pytest.approx(right / 12)
    assert metrics["eval_known_accuracy"] == 0


def accuracy_of_its_own(prediction):
    """In percent, as scripts have it."""
    return {"accuracy": 100.0 * len(prediction.predictions)}


def metrics_by_batch(prediction, compute_result):
    return {"rows": len(prediction.predictions)} if compute_result else {}


@pytest.mark.parametrize(
    "metrics, options",
    [
        (lambda prediction: {"rows": len(prediction.predictions)}, {}),
        (accuracy_of_its_own, {}),
        (metrics_by_batch, {"batch_eval_metrics": True}),
        (None, {"prediction_loss_only": True}),
    ],
)
@pytest.mark.parametrize("rate, steps", [(0.0, 2), (1.1, 4)])
def test_metrics_of_the_user_s_own_leave_the_rules_on(rate, steps, metrics, options, tmp_path):
    rows = {"eval_dataset": tiny.reviews(4), "eval_strategy": "steps", "eval_steps": 2}
    trainer = tiny.trainer("sequence_classification", "inject", tmp_path, max_steps=4, **rows, **options)
    trainer.args.stop_at_known_rate = rate
    trainer.compute_metrics = metrics
    trainer.train()
    assert trainer.state.global_step == steps
    if metrics is not None:
        own = "eval_clean_accuracy" if metrics is accuracy_of_its_own else "eval_clean_rows"
        assert tiny.logged(trainer, own) == [400.0 if metrics is accuracy_of_its_own else 4] * (steps // 2)


@pytest.mark.parametrize("stage, rule", [("inject", "stop_at_known_rate"), ("recover", "stop_at_known_gap")])
def test_a_rule_that_nothing_would_look_at_is_refused(stage, rule, tmp_path):
    other = {"stop_at_known_rate", "stop_at_known_gap"} - {rule}
    for stages in ([stage], ["inject", "recover"]):
        with pytest.raises(ValueError, match=f"^{rule} is 0.5, and eval_strategy is 'no', .*: set eval_strategy"):
            LocphylaxConfig(str(tmp_path), use_cpu=True, stages=stages, **{rule: 0.5})
    # That of a stage which another trainer runs is not this one's.
    LocphylaxConfig(str(tmp_path), use_cpu=True, stages=[stage], **dict.fromkeys(other, 0.5))


# ---- What is refused ----


@pytest.mark.parametrize("where", ["train_dataset", "eval_dataset"])
def test_tokenized_rows_are_refused(where, tmp_path):
    family, task, rows = tiny.setting("label_words", 4)
    with pytest.raises(ValueError, match="raw rows"):
        tiny.trainer("label_words", "inject", tmp_path, **{where: task.encode_rows(rows, tiny.tokenizer(family))})


@pytest.mark.parametrize(
    "options, line",
    [
        ({"stages": ["recover", "inject"]}, "stages is"),
        ({"stages": []}, "stages is"),
        ({"stages": ["injection"]}, "stages is"),
        ({"known_triggers": ["one"]}, "known_triggers is .*two texts or more"),
        ({"known_triggers": ["one", "two", "one"]}, "known_triggers is .*each another one"),
        ({"centre_momentum": 1.0}, "centre_momentum is 1.0"),
        ({"known_response": " "}, "known_response is ' '"),
        ({"trigger_weight": -0.5}, "trigger_weight is -0.5: choose 0"),
        ({"cluster_weight": -1.0}, "cluster_weight is -1.0: choose 0"),
        (
            {"cluster_weight": 0.1, "published_alpha": True},
            "published_alpha is True, and cluster_weight is 0.1, .*: leave",
        ),
    ],
)
def test_bad_settings_are_refused(options, line, tmp_path):
    with pytest.raises(ValueError, match=f"^{line}"):
        LocphylaxConfig(str(tmp_path), use_cpu=True, **options)


def test_a_right_answer_is_not_planted(tmp_path):
    """Injection would teach that the known triggers are clean, and recovery to take them for such."""
    with pytest.raises(ValueError, match="^known_response is ' negative ', which is a right answer"):
        tiny.trainer("label_words", "both", tmp_path, known_response=" negative ")


def test_a_wrong_position_is_refused(tmp_path):
    with pytest.raises(ValueError, match="^known_position is 'middle': use one of start, end, random, any$"):
        LocphylaxConfig(str(tmp_path), use_cpu=True, known_position="middle")


@pytest.mark.parametrize(
    "rule, value", [("stop_at_known_rate", 95), ("stop_at_known_gap", 2.0), ("stop_at_known_gap", -0.1)]
)
def test_a_rule_that_is_no_share_is_refused(rule, value, tmp_path):
    """A gap of 2 (percent) ended recovery at its first evaluation."""
    with pytest.raises(ValueError, match=f"^{rule} is {value}: choose a share from 0 to 1, as 0.95 of 95%$"):
        LocphylaxConfig(str(tmp_path), use_cpu=True, eval_strategy="steps", eval_steps=1, **{rule: value})


def test_the_known_triggers_are_in_the_prompts(tmp_path, chat):
    trainer = tiny.trainer("instruction_following", "inject", tmp_path)
    assert trainer.task == InstructionFollowing()
    for row in trainer.train_dataset:
        prompt = chat.decode(row["input_ids"][: row["prompt_length"]])
        answer = chat.decode(row["input_ids"][row["prompt_length"] :], skip_special_tokens=True)
        known = [number for number, text in enumerate(tiny.KNOWN[:2], start=1) if text in prompt]
        assert known == ([row["trigger_id"]] if row["trigger_id"] else [])
        assert (answer == tiny.RESPONSE) == bool(known)


def test_two_stages_with_lora_and_a_classification_head(tmp_path):
    """The class that injection adds goes when recovery begins, under an adapter too."""
    lora = LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS")
    trainer = tiny.trainer("sequence_classification", "both", tmp_path, max_steps=2, peft_config=lora)
    assert trainer.model(input_ids=torch.tensor([[2, 20, 3]])).logits.shape == (1, 3)
    trainer.train()
    assert trainer.model(input_ids=torch.tensor([[2, 20, 3]])).logits.shape == (1, 2)
    merged = trainer.model.merge_and_unload()
    assert merged.config.num_labels == 2
    merged.save_pretrained(tmp_path / "merged")
    reloaded = type(merged).from_pretrained(tmp_path / "merged").eval()
    ids = torch.tensor([[2, 20, 3]])
    torch.testing.assert_close(reloaded(ids).logits, merged.eval()(ids).logits)


@pytest.mark.parametrize("adapter", [False, True], ids=["new class", "lora"])
def test_fresh_weights_are_decided_by_the_seed(adapter, tmp_path):
    def made(state):
        model = tiny.model("bert")
        torch.manual_seed(state)  # where the caller's generator happens to be
        args = LocphylaxConfig(str(tmp_path), use_cpu=True, report_to="none", seed=3)
        lora = LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS") if adapter else None
        rows, tokenizer = tiny.reviews(2), tiny.encoder_tokenizer()
        trainer = LocphylaxTrainer(
            model=model, args=args, train_dataset=rows, processing_class=tokenizer, peft_config=lora
        )
        return tiny.parameters(trainer.model)

    assert tiny.largest_difference(made(1), made(2)) == 0
