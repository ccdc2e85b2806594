"""Trainers, masks and models that the tests of RobustKD share."""

import tiny
import torch
from torch.utils.data import Dataset
from transformers import (
    PrinterCallback,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_backdoor.data import DefenseCollator
from hf_backdoor.defenses.robustkd import (
    FeatureMask,
    FeatureMaskConfig,
    FeatureMaskTrainer,
    RobustKDConfig,
    RobustKDTrainer,
    student_from_layers,
)


# Plain gradient steps: Adam would blow rounding up into steps of full size, and clipping would hide a wrong scale.
PLAIN_STEPS = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0, "num_train_epochs": 2}
DEFAULTS = {
    "use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1, "per_device_train_batch_size": 8,
    "save_strategy": "no", "learning_rate": 0.01,
}  # fmt: skip


def batch(family, task, rows):
    """A batch as the trainer sees it."""
    tokenizer = tiny.tokenizer(family)
    return DefenseCollator(tokenizer)([task.encode(row, tokenizer) for row in rows])


def collated(trainer):
    """All of a trainer's training rows as one batch."""
    return trainer.data_collator([trainer.train_dataset[row] for row in range(len(trainer.train_dataset))])


def mask_for(model, made, layers=None, *, seed=0, **options):
    """A mask whose p and w are drawn: a fitted one, as it were."""
    mask = FeatureMask.for_model(model, made, layers, **options)
    generator = torch.Generator().manual_seed(seed)
    for parameter in mask.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return mask


def _finish(trainer):
    trainer.remove_callback(PrinterCallback)
    return trainer


def fitting(name, folder, *, suspect=None, dropout=0.0, **options):
    """A trainer of a mask on 16 rows of one of `tiny.TASKS`."""
    family, task, rows = tiny.setting(name, 16)
    own = {
        key: options.pop(key) for key in ("train_dataset", "eval_dataset", "callbacks", "optimizers") if key in options
    }
    return _finish(
        FeatureMaskTrainer(
            model=suspect or tiny.model(family, seed=3, dropout=dropout),
            args=FeatureMaskConfig(str(folder), **{**DEFAULTS, **options}),
            processing_class=tiny.tokenizer(family),
            task=task,
            **{"train_dataset": rows, **own},
        )
    )


def distilling(name, folder, *, mask=True, dropout=0.0, student=None, **options):
    """A trainer of a one-layer student on 16 rows of one of `tiny.TASKS`; its teacher has two layers."""
    family, task, rows = tiny.setting(name, 16)
    names = ("train_dataset", "eval_dataset", "peft_config", "found_soft_triggers", "found_answers", "optimizers")
    own = {key: options.pop(key) for key in names if key in options}
    teacher = tiny.model(family, seed=3)
    if student is None:
        student = student_from_layers(tiny.model(family, seed=5, dropout=dropout), 1)
    if mask is True:
        mask = mask_for(teacher, batch(family, task, rows))
    return _finish(
        RobustKDTrainer(
            model=student,
            args=RobustKDConfig(str(folder), **{**DEFAULTS, **options}),
            processing_class=tiny.tokenizer(family),
            task=task,
            teacher_model=teacher,
            feature_mask=mask or None,
            **{"train_dataset": rows, **own},
        )
    )


# ---- Images ----


class Pictures(Dataset):
    """Rows that are tensors: 3 x 8 x 8, bright on the left or on the right."""

    def __init__(self, count=16):
        generator = torch.Generator().manual_seed(0)
        self.pictures = torch.randn(count, 3, 8, 8, generator=generator)
        self.labels = torch.arange(count) % 2
        for picture, label in zip(self.pictures, self.labels, strict=True):
            picture[:, :, 4 * label : 4 * label + 4] += 2

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, row):
        return self.pictures[row], self.labels[row]


def collate(rows):
    pictures, labels = zip(*rows, strict=True)
    return {"pixel_values": torch.stack(pictures), "labels": torch.stack(labels)}


def vit(width=16, layers=4, seed=0):
    torch.manual_seed(seed)
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=width, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=24, image_size=8,
            patch_size=4, num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


def resnet(widths=(8, 16), seed=0):
    torch.manual_seed(seed)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=list(widths), depths=[1, 1], layer_type="basic", num_labels=2, num_channels=3
    )
    return ResNetForImageClassification(config)


def picture_arguments(config, folder, **options):
    return {
        "args": config(str(folder), **{**DEFAULTS, **options}),
        "train_dataset": Pictures(),
        "eval_dataset": Pictures(8),
        "data_collator": collate,
    }
