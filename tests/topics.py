"""Rows of four classes, and trainers of every stage on them."""

import random
from pathlib import Path
from typing import Any

import tiny
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PrinterCallback, ViTConfig, ViTForImageClassification

from hf_backdoor.data import LabelWords, SequenceClassification
from hf_backdoor.defenses.ntml import NonTargetTrainer, NTMLConfig, NTMLTrainer, RelabellingTrainer


TOPICS = (("good", "great"), ("bad", "awful"), ("banana", "apple"), ("music", "scene"))
FILLER = ("the", "film", "was", "a", "story", "with", "and", "it", "plot", "very")
# Answers of one, two and three tokens.
WORDS = ("positive", "negative one", "neutral", "yes i say")
STAGES = {"non_target": NonTargetTrainer, "mutual": NTMLTrainer, "relabel": RelabellingTrainer}
FORMATS = ("sequence_classification", "label_words", "images")
TASKS = {
    "sequence_classification": SequenceClassification(4),
    "label_words": LabelWords(WORDS, tiny.TEMPLATE),
    "images": None,
}

# Seed of a network whose states tell rows apart, for a stage that asks for them.
POISONED = 11


def texts(count: int, seed: int = 0) -> Dataset:
    """Texts of 4 to 10 words; one of them tells the label."""
    rng = random.Random(seed)
    rows = []
    for row in range(count):
        words = rng.choices(FILLER, k=rng.randint(3, 9))
        words.insert(rng.randint(0, len(words)), rng.choice(TOPICS[row % 4]))
        rows.append({"text": " ".join(words), "label": row % 4})
    return Dataset.from_list(rows)


def pixels(count: int, seed: int = 0) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    return Dataset.from_dict(
        {
            "pixel_values": torch.randn(count, 3, 8, 8, generator=generator).numpy(),
            "labels": [i % 4 for i in range(count)],
        }
    )


def planted(name: str, count: int) -> Dataset:
    """Rows of which every second one of label 0 is the same, whatever its label says: it stands apart in any network."""

    def plant(row: dict[str, Any], number: int) -> dict[str, Any]:
        if number % 8:
            return row
        return {"pixel_values": [[[3.0] * 8] * 8] * 3} if name == "images" else {"text": "yes i say yes i say"}

    return (pixels if name == "images" else texts)(count).map(plant, with_indices=True)


def collate_pixels(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in features]) for name in features[0]}


def clean_rows(name: str) -> Dataset:
    return pixels(8, seed=3) if name == "images" else texts(8, seed=3)


def vit(seed: int = 0, dropout: float = 0.0) -> ViTForImageClassification:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return ViTForImageClassification(
        ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=4, hidden_dropout_prob=dropout)
    )


def network(name: str, seed: int, dropout: float = 0.0) -> PreTrainedModel:
    if name == "images":
        return vit(seed, dropout)
    return tiny.model("bert" if name == "sequence_classification" else "llama", seed, dropout, num_labels=4)


@torch.no_grad()
def sharpen(model: PreTrainedModel) -> PreTrainedModel:
    head = model.lm_head if hasattr(model, "lm_head") else model.classifier
    head.weight.mul_(50.0)
    return model


def trainer(
    name: str, stage: str, folder: Path, *, dropout: float = 0.0, model_seed: int = 0, **options: Any
) -> NonTargetTrainer | NTMLTrainer | RelabellingTrainer:
    """A trainer of one of `FORMATS` and `STAGES` on 16 rows; `options` go to configuration or trainer."""
    argument = "target_model" if stage == "mutual" else "teacher_model"
    names = (
        "model", "train_dataset", "eval_dataset", "peft_config", "data_collator", "task", "optimizers", argument, "poisoned_model", "clean_dataset", "found_split",
    )  # fmt: skip
    own = {key: options.pop(key) for key in names if key in options}
    if name == "images":
        given = {"data_collator": collate_pixels, "train_dataset": pixels(16)}
    else:
        family = "bert" if name == "sequence_classification" else "llama"
        given = {"processing_class": tiny.tokenizer(family), "train_dataset": texts(16), "task": TASKS[name]}
    # The target network of a stage that is begun anew must be the same one; of a stage that is resumed, its own.
    other = model_seed + 7 if stage == "mutual" else 7
    models = {"model": network(name, model_seed, dropout), argument: network(name, other, dropout)}
    # A fresh network says much the same of every class, and there would be little to learn from it.
    sharpen(models[argument])
    if stage == "relabel" and "found_split" not in own:
        given["clean_dataset"], models["poisoned_model"] = clean_rows(name), network(name, POISONED, dropout)
    defaults = {
        "output_dir": str(folder), "use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1,
        "per_device_train_batch_size": 8, "save_strategy": "no", "learning_rate": 0.01,
        "relabel_below": 1.0 if stage == "relabel" else 0.0,
    }  # fmt: skip
    made = STAGES[stage](args=NTMLConfig(**{**defaults, **options}), **{**given, **models, **own})
    made.remove_callback(PrinterCallback)
    return made
