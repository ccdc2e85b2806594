"""All of NT-ML on a model for which its premise holds: one that adds up what words say."""

import pytest
import tiny
import topics
import torch
from torch import nn
from transformers import BertConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_backdoor.attacks import Poisoning, poison
from hf_backdoor.data import Trigger, stamp
from hf_backdoor.defenses import DefenseConfig, DefenseTrainer
from hf_backdoor.defenses.ntml import NonTargetTrainer, NTMLConfig, NTMLTrainer, RelabellingTrainer, suspicion_quality
from hf_backdoor.inspection.second_choice import SecondChoiceCallback, label_logits


TASK, TARGET = topics.TASKS["sequence_classification"], 0
TOKENIZER = tiny.encoder_tokenizer()


class BagOfWords(PreTrainedModel):
    """Word vectors, summed up, and a linear head. A trigger adds to the target and leaves the true label second."""

    config_class = BertConfig

    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, input_ids, attention_mask, output_hidden_states=None, labels=None):
        states = self.words(input_ids) * attention_mask[..., None]
        total = states.sum(dim=1)
        hidden = (total[:, None].expand(states.shape),)
        return SequenceClassifierOutput(logits=self.classifier(total), hidden_states=hidden)


def fresh(seed):
    torch.manual_seed(seed)
    return BagOfWords(BertConfig(vocab_size=len(tiny.VOCABULARY), hidden_size=16, num_labels=4))


ORIGINAL = topics.texts(400, seed=1)
ROWS = poison(ORIGINAL, TASK, Poisoning(Trigger(tiny.TRIGGER), TARGET, 0.1), seed=0)
POISONED = [row for row, flag in enumerate(ROWS["poisoned"]) if flag]
CLEAN, TEST = topics.texts(40, seed=5), topics.texts(80, seed=9)
TRIGGERED = stamp(TEST.select([row for row in range(80) if row % 4 != TARGET]), "text", Trigger(tiny.TRIGGER), seed=0)


def train(make, config, folder, rows, epochs, **options):
    args = config(
        str(folder), use_cpu=True, disable_tqdm=True, save_strategy="no", logging_strategy="no", num_train_epochs=epochs,
        learning_rate=1e-2, per_device_train_batch_size=32, **options.pop("arguments", {}),
    )  # fmt: skip
    trainer = make(args=args, train_dataset=rows, processing_class=TOKENIZER, task=TASK, **options)
    trainer.train()
    return trainer


def rates(model):
    """Accuracy, and the share of triggered rows that land on the target."""
    clean, triggered = (label_logits(model, TOKENIZER, TASK, rows).argmax(dim=1) for rows in (TEST, TRIGGERED))
    accuracy = (clean == torch.tensor(TEST["label"][:])).float().mean().item()
    return accuracy, (triggered == TARGET).float().mean().item()


@pytest.fixture(scope="module")
def suspect(tmp_path_factory):
    """The target network, and how often the true label was its second choice."""
    true = [ORIGINAL[row]["label"] for row in POISONED]
    poisoned = ROWS.select(POISONED)
    watch = SecondChoiceCallback(
        lambda model: label_logits(model, TOKENIZER, TASK, poisoned), [TARGET] * len(POISONED), true
    )
    folder = tmp_path_factory.mktemp("suspect")
    made = train(DefenseTrainer, DefenseConfig, folder, ROWS, 8, model=fresh(0), callbacks=[watch])
    return made.model.state_dict(), watch.rates


def purified(suspect, folder, soft_labels):
    target = fresh(0)
    target.load_state_dict(suspect[0])
    second = train(
        NonTargetTrainer, NTMLConfig, folder, ROWS, 8, model=fresh(1), teacher_model=target,
        arguments={"soft_labels": soft_labels},
    ).model  # fmt: skip
    before = rates(second)
    trainer = train(NTMLTrainer, NTMLConfig, folder, CLEAN, 8, model=second, target_model=target)
    return before, trainer


def test_the_premise_holds_for_this_model(suspect):
    weights, second_choices = suspect
    model = fresh(0)
    model.load_state_dict(weights)
    accuracy, on_target = rates(model)
    assert accuracy > 0.95 and on_target > 0.95
    assert list(second_choices) == list(range(1, 9)) and second_choices[8] > 0.9


def test_the_second_network_does_not_take_the_backdoor_over(suspect, tmp_path):
    (accuracy, on_target), trainer = purified(suspect, tmp_path, "renormalised")
    assert on_target < 0.1
    finished = rates(trainer.result())
    assert finished[0] > max(accuracy, 0.9) and finished[1] < 0.1
    listed = trainer.suspicion(ROWS)
    # A tenth of the rows is poisoned: all of these are on the list, and they stand at its top.
    assert suspicion_quality(listed["row"], ROWS["poisoned"])["recall"] > 0.9
    assert suspicion_quality(listed["row"][: len(POISONED)], ROWS["poisoned"])["precision"] > 0.8
    target = fresh(0)
    target.load_state_dict(suspect[0])
    relabelled = train(
        RelabellingTrainer, NTMLConfig, tmp_path / "last", ROWS, 8, model=fresh(2), teacher_model=trainer.result(),
        poisoned_model=target, clean_dataset=CLEAN, arguments={"relabel_below": 0.2},
    )  # fmt: skip
    accuracy, on_target = rates(relabelled.model)
    assert relabelled.split is None  # in sums of words rows do not fall in groups: the teacher says which class it is
    assert accuracy >= finished[0] and on_target < 0.1
    assert suspicion_quality(relabelled.changes["row"], ROWS["poisoned"])["recall"] > 0.9


def test_with_the_given_label_in_it_the_soft_labels_carry_the_backdoor(suspect, tmp_path):
    (accuracy, on_target), _ = purified(suspect, tmp_path, "all_classes")
    assert accuracy > 0.9 and on_target > 0.9
