"""What `hf-backdoor clean` and `evaluate` find out by themselves: task, columns and settings."""

from pathlib import Path
from typing import Any

from datasets import Dataset

from .data import rename_columns, with_context
from .evaluation import UNKNOWN_LABEL
from .models import load_config, refuse_no_causal_lm_config
from .recipe import TASKS
from .rows import refuse_other_kinds


# Names that data sets in the wild use for the columns of a task.
SYNONYMS = {
    "image": ("image", "img", "picture", "pixels"),
    "text": ("text", "sentence", "content", "review", "body"),
    "label": ("label", "labels", "class", "category"),
    "prompt": ("prompt", "instruction", "question", "query", "input"),
    "response": ("response", "output", "answer", "completion", "target"),
    "context": ("context", "input"),
}

# Share of the clean rows that `clean` measures on, where there are no test rows beside them.
TEST_FRACTION = 0.2

# What `clean` sets beyond a method's own arguments, by the kind of answers: what the efficacy tables found to work best, with the
# stage whose rate it is. (The trainers' defaults are the papers' own methods.)
MEASURED: dict[tuple[str, str], tuple[str | None, dict[str, Any]]] = {
    ("locphylax", "class"): ("recover", {"learning_rate": 3e-4, "num_train_epochs": 3}),
    ("mbtsad", "class"): (None, {"learning_rate": 1e-4, "num_train_epochs": 3}),
    # Longer, and perplexity ends above the suspect's.
    ("locphylax", "text"): ("recover", {"learning_rate": 3e-4, "num_train_epochs": 1}),
}
# For classes. These are what bears rates so high for so long.
INFORMED = {"soft_triggers": 48, "own_answers": 0.5}

# Hidden size of the widest model that they were measured on. A wider one bears less: Adam's rate goes with one over the width
# (https://huggingface.co/papers/2203.03466).
MEASURED_WIDTH = 576


def measured(method: str, model: str, values: dict[str, Any]) -> dict[str, Any]:
    """Keys of a recipe for what the user's own (`values`) say nothing about."""
    answers = "text" if values.get("task") == "instruction_following" else "class"
    if (method, answers) not in MEASURED:
        return {}
    stage, found = MEASURED[method, answers]
    given = values | ((values.get("stages") or {}).get(stage) or {})
    informed = INFORMED if answers == "class" else {}
    if informed and not given.get("own_answers", informed["own_answers"]):
        return {}
    config = load_config(model, revision=values.get("model_revision"))
    width = getattr(config.get_text_config(), "hidden_size", MEASURED_WIDTH)
    found = found | {"learning_rate": float(f"{found['learning_rate'] * min(1, MEASURED_WIDTH / width):.1g}")}
    rest = {f"stages.{stage}.{key}" if stage else key: value for key, value in found.items() if key not in given}
    return {key: value for key, value in informed.items() if key not in values} | rest


def has_test(source: str, rows: Dataset, columns: dict[str, str], own: dict[str, Any]) -> bool:
    """Whether there are test rows beside the clean ones: such as the user's `own` keys name, or a test split, whose `rows` these
    then are. Many a data set on the Hub has one without labels, which measures nothing."""
    if own.get("test_dataset_name") is not None:
        return True
    if Path(source).is_file():
        return False
    hidden = "label" in columns and UNKNOWN_LABEL in rows[columns["label"]][:]
    return "test_split" in own or (rows.split == "test" and not hidden)


def find_task(
    model: str, columns: list[str], label_words: list[str] | None, own: dict[str, Any]
) -> tuple[str, dict[str, str]]:
    """Task and column mapping, from the model's architecture and the file's columns; the user's `own` keys go first.

    Raises:
        `ValueError`: with the one thing that is missing.
    """
    task = own.get("task") or task_of_model(model, columns, label_words, own)
    if task not in TASKS:
        raise ValueError(f"task is {task!r}: use one of {', '.join(TASKS)}")
    return task, find_columns(task, columns, own)


def task_of_model(model: str, columns: list[str], label_words: list[str] | None, own: dict[str, Any]) -> str:
    config = load_config(model, revision=own.get("model_revision"))
    architectures = config.architectures or []
    if any(name.endswith("ForSequenceClassification") for name in architectures):
        return "sequence_classification"
    if any(name.endswith("ForImageClassification") for name in architectures):
        return "image_classification"
    refuse_no_causal_lm_config(config, model)
    if label_words:
        return "label_words"
    if own.get("response_column") or any(name in columns for name in SYNONYMS["response"]):
        return "instruction_following"
    raise ValueError(
        f"the model has no classification head and the rows have columns {', '.join(columns)}: give --label_words, one for "
        "each label, or rows with 'prompt' and 'response'"
    )


def find_columns(task: str, columns: list[str], own: dict[str, Any]) -> dict[str, str]:
    """The columns that a task reads: its name of each to the file's, which the user's `own` keys may say.

    Raises:
        `ValueError`: if one is not there.
    """
    found = {}
    for name in (TASKS[task].input_column, TASKS[task].answer_column):
        key = f"{name}_column"
        present = own.get(key) or next((synonym for synonym in SYNONYMS[name] if synonym in columns), None)
        if present is None:
            raise ValueError(
                f"no column for {name!r} among {', '.join(columns)}: rename one to {name!r}, or name it by --{key}"
            )
        if present not in columns:
            raise ValueError(f"{key} is {present!r}, and the columns are {', '.join(columns)}: name one of these")
        found[name] = present
    return found | (find_context(columns, own, found) if task == "instruction_following" else {})


def find_context(columns: list[str], own: dict[str, Any], found: dict[str, str]) -> dict[str, str]:
    """The column, if there is one, with the text that instructions are about; "" as its name means none."""
    rest = [name for name in SYNONYMS["context"] if name in columns and name not in found.values()]
    context = own.get("context_column")
    if context is None and rest:
        context = rest[0]
    if context and context not in columns:
        raise ValueError(
            f"context_column is {context!r}, and the columns are {', '.join(columns)}: name one of these, or ''"
        )
    return {"context": context} if context else {}


def renamed(rows: Dataset, columns: dict[str, str], source: str) -> Dataset:
    """The rows as the task reads them, an instruction's context after it."""
    rows = rename_columns(rows, columns, source)
    refuse_other_kinds(rows, columns, source)
    return with_context(rows, "prompt", "context") if "context" in columns else rows
