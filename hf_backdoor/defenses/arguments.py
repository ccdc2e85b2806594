"""What a trainer is given: refused in one line where it would not be read, or would train something else than is meant."""

import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.optimizer import AcceleratedOptimizer
from datasets import ClassLabel, Dataset, Value
from peft import PeftConfig, PeftModel
from pyarrow import compute
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.trainer_utils import HubStrategy

from ..data import Task, auto_class, base_model, encoded, reads_both_ways, row_lengths
from ..data.collators import padding_id
from .config import DefenseConfig


if TYPE_CHECKING:
    from .trainer import DefenseTrainer


# What `Trainer` takes and ours have no use for, and what to do in its place.
NOT_READ = {
    "model_init": "pass the model itself, one for each trainer",
    "compute_loss_func": "override loss_terms, which gives one value for each sample",
}
# Nor what asks no teacher (`takes_teacher`).
NO_TEACHER = {"teacher_model": "leave it out, or take a trainer that distils, for example RobustKDTrainer"}

# How transformers names the classes of language models.
LANGUAGE_HEADS = ("ForMaskedLM", "ForCausalLM", "LMHeadModel")

# What a task says itself, where one is passed, and its own name for it.
OF_THE_TASK = {"label_words": "words", "prompt_template": "template", "system_prompt": "system_prompt"}


def check_arguments(
    trainer: "DefenseTrainer",
    model: Any,
    args: Any,
    processor: Any,
    peft_config: PeftConfig | None,
    others: dict[str, Any],
) -> None:
    """Before anything is made of them, a repository on the Hub included.

    Args:
        trainer ([`DefenseTrainer`]): Not more than its class is read.
        others (`dict[str, Any]`): The teacher, and what goes on to `Trainer`.

    Raises:
        `ValueError`: with the fix.
    """
    config: type[DefenseConfig] = trainer.config_class()
    if not isinstance(args, config):
        raise ValueError(f"args is a {type(args).__name__}: pass a {config.__name__}, which takes the same and more")
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible to one process: start it with `accelerate launch`, or set CUDA_VISIBLE_DEVICES=0"
        )
    if args.push_to_hub and args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        raise ValueError(
            f"hub_strategy is {args.hub_strategy.value!r}, and checkpoints hold pickles, which are never uploaded: use 'end'"
        )
    for name, instead in (NOT_READ if trainer.takes_teacher else NOT_READ | NO_TEACHER).items():
        if others.get(name) is not None:
            raise ValueError(f"{name} is given, and {type(trainer).__name__} would not read it: {instead}")
    refuse_names(model, processor)
    refuse_no_causal_lm(model, "model")
    teacher = others.get("teacher_model")
    if isinstance(teacher, nn.Module) and auto_class(base_model(model)) is AutoModelForCausalLM:
        refuse_no_causal_lm(teacher, "teacher_model")
    if not isinstance(peft_config, PeftConfig | None):
        raise ValueError(
            f"peft_config is {reprlib.repr(peft_config)}: pass a PeftConfig, for example peft.LoraConfig(r=16)"
        )
    if peft_config is not None and isinstance(model, PeftModel):
        raise ValueError(
            "peft_config is given, and model has an adapter, which would not be trained any more: leave peft_config out, or "
            "pass model.merge_and_unload()"
        )


def refuse_names(model: Any, processor: Any) -> None:
    """
    Raises:
        `ValueError`: for a name, or a folder, where the model or its tokenizer is wanted.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is {model!r}: pass the model itself, as from_pretrained gives it")
    if isinstance(processor, str | Path):
        raise ValueError(
            f"processing_class is {str(processor)!r}: pass the tokenizer (or image processor) itself, as from_pretrained gives it"
        )


def refuse_no_causal_lm(model: nn.Module, argument: str) -> None:
    """
    Raises:
        `ValueError`: for a language model that sees the answer it is to give, or has no head. Networks of the user's own, and heads of
            several answers, are taken as they are.
    """
    model = base_model(model)
    if not isinstance(model, PreTrainedModel) or auto_class(model) is not AutoModelForCausalLM:
        return
    kind, config = type(model), model.config
    if config.is_encoder_decoder:
        raise ValueError(
            f"{kind.__name__} has an encoder and a decoder, and texts are taught to causal LMs here: use one of these, or a "
            "model with a classification head"
        )
    # A subclass of the user's own answers by the head that it inherits.
    inherits = any(base.__name__.endswith(LANGUAGE_HEADS) for base in kind.__mro__[1:])
    stock = kind.__module__.startswith("transformers.") and "ForImageClassification" not in kind.__name__
    if (stock or inherits) and (not model.can_generate() or reads_both_ways(config)):
        raise ValueError(
            f"{argument} is a {kind.__name__}, which has no head, or sees the answer that it is to give: pass a causal LM, or load it "
            "with a classification head, by AutoModelForSequenceClassification"
        )


def check_rows(args: DefenseConfig, model: nn.Module, train: Any, evaluation: Any) -> None:
    """Before they are prepared.

    Args:
        train, evaluation: The data sets as they were passed.

    Raises:
        `ValueError`: if there are none where some are needed, or rows that are a model's inputs already have no right answer: their
            loss would be 0.
    """
    if args.eval_strategy != "no" and evaluation is None:
        raise ValueError(
            f"eval_strategy is {args.eval_strategy.value!r}, and eval_dataset is None: pass held-out rows, or set eval_strategy: no"
        )
    sets = evaluation if isinstance(evaluation, dict) and evaluation else {"": evaluation}
    named = {"train_dataset": train} | {f"eval_dataset {name}".strip(): rows for name, rows in sets.items()}
    for name, rows in named.items():
        if hasattr(rows, "__len__") and not len(rows):
            raise ValueError(f"{name} has no rows: pass some, or leave it out")
        if isinstance(rows, Dataset):
            _check_answers(name, rows, base_model(model))


def _check_answers(name: str, rows: Dataset, model: PreTrainedModel) -> None:
    if auto_class(model) is not AutoModelForCausalLM and isinstance(rows.features.get("labels"), Value | ClassLabel):
        labels = compute.min_max(rows.select_columns("labels").with_format("arrow")[:]["labels"]).as_py()
        least, most, classes = labels["min"], labels["max"], model.config.num_labels
        if not (isinstance(least, int) and 0 <= least <= most < classes):
            raise ValueError(
                f"{name} has labels from {least} to {most}, and the model has {classes} classes: number them 0 to {classes - 1}, and "
                "leave rows without a label out"
            )
    if {"input_ids", "prompt_length"} <= set(rows.column_names):
        lengths = zip(rows["prompt_length"][:], row_lengths(rows), strict=True)
        if without := [row for row, (prompt, whole) in enumerate(lengths) if prompt >= whole]:
            raise ValueError(
                f"{name} has {len(without)} rows whose prompt_length is as long as input_ids, so they have no answer (row {without[0]} "
                "is the first): leave them out"
            )


def check_task(args: DefenseConfig, task: Task | None) -> None:
    """
    Raises:
        `ValueError`: if the arguments say something else than the task that was passed: they would not be read.
    """
    for argument, name in OF_THE_TASK.items():
        said, own = getattr(args, argument), getattr(task, name, None)
        if said is not None and hasattr(task, name) and said != (list(own) if isinstance(own, tuple) else own):
            raise ValueError(
                f"{argument} is {said!r}, and the task that is given has {own!r}: leave one of the two out"
            )


def check_bound(max_length: int | None, task: Task | None, *given: Any) -> None:
    """
    Args:
        given: The data sets as they were passed.

    Raises:
        `ValueError`: if there is a bound, and rows without a text that it would cut.
    """
    if max_length is None:
        return
    if task is not None and "max_length" not in task.limits:
        raise ValueError(f"max_length is {max_length}, and rows are pictures: leave it out")
    sets = [
        rows for each in given for rows in (each.values() if isinstance(each, dict) else [each]) if rows is not None
    ]
    if task is None or any(encoded(rows) for rows in sets):
        raise ValueError(
            f"max_length is {max_length}, and rows are a model's inputs already: cut them as they are made, or pass raw rows"
        )


def labels_of(batch: dict[str, Tensor]) -> Tensor:
    """A batch's labels.

    Raises:
        `ValueError`: if it has none.
    """
    if "labels" not in batch:
        raise ValueError(
            f"a batch has {', '.join(batch)} and no labels: pass rows with labels, and a data_collator that keeps them"
        )
    return batch["labels"]


def check_other(model: nn.Module, other: Any, argument: str) -> None:
    """
    Args:
        model (`nn.Module`): What is trained.
        other: What stands beside it, if it is a model.

    Raises:
        `ValueError`: if both are one, or have weights in common: there would be nothing to learn, or what is trained would freeze. Or
            if it is a folder that is not there.
    """
    # Any other text may be a model's name on the Hub.
    folder = isinstance(other, Path) or (isinstance(other, str) and other.startswith(("/", "./", "../")))
    if folder and not Path(other).is_dir():
        raise ValueError(
            f"{argument} is {str(other)!r}, where no folder is: pass a model's folder, or the model itself"
        )
    own = {id(parameter) for parameter in model.parameters()}
    if isinstance(other, nn.Module) and any(id(parameter) in own for parameter in other.parameters()):
        raise ValueError(
            f"{argument} is the model that is trained, or shares weights with it: pass another one (copy.deepcopy(model) at least), "
            "or its folder"
        )


def check_alike(model: nn.Module, other: nn.Module, argument: str, fields: Sequence[str], why: str) -> None:
    """
    Args:
        fields (`Sequence[str]`): Of the models' configurations.
        why (`str`): What both must be alike for, and the fix.

    Raises:
        `ValueError`: if the two models differ in one of them.
    """
    configs = [base_model(each).config for each in (model, other)]
    for field in fields:
        own, its = (getattr(config, field, getattr(config.get_text_config(), field, None)) for config in configs)
        if own != its:
            raise ValueError(f"{field} is {its} in {argument}, and {own} in the model, and {why}")


def check_vocabulary(model: nn.Module, other: nn.Module, argument: str, processor: Any) -> None:
    """
    Args:
        processor: What encodes the rows; one that is no tokenizer has nothing to check.

    Raises:
        `ValueError`: if the tokenizer has tokens that the model knows and the other one does not.
    """
    own, its = (getattr(base_model(each).config.get_text_config(), "vocab_size", None) for each in (model, other))
    tokens = len(processor) if isinstance(processor, PreTrainedTokenizerBase) else 0
    # Models may have embeddings beyond the tokenizer's last token, and one be padded further than the other.
    if own and its and its < min(own, tokens):
        raise ValueError(
            f"vocab_size is {its} in {argument}, and {own} in the model, whose tokenizer has {tokens} tokens: pass one that reads the "
            "same ones"
        )


def check_tokens(model: nn.Module, processor: Any, *sets: Any) -> None:
    """
    Args:
        processor: What encodes the rows; one that is no tokenizer has nothing to check.
        sets: The encoded data sets. What is no `Dataset` can't be looked through.

    Raises:
        `ValueError`: if a row, or its padding, has a token of the tokenizer that the model has no embedding for.
    """
    networks = (module for module in model.modules() if isinstance(module, PreTrainedModel))
    size = next((getattr(network.config.get_text_config(), "vocab_size", None) for network in networks), None)
    if not isinstance(processor, PreTrainedTokenizerBase) or not size or len(processor) <= size:
        return
    # Only those in use: a tokenizer may have one for pictures that a model of texts does without, as Gemma 3's.
    used = {padding_id(processor)}
    for rows in sets:
        if isinstance(rows, Dataset) and "input_ids" in rows.column_names:
            for block in rows.select_columns("input_ids").with_format("arrow").iter(batch_size=10_000):
                used.update(compute.unique(compute.list_flatten(block["input_ids"])).to_pylist())
    # Soft triggers' are beyond the tokenizer's own.
    if unknown := used.intersection(range(size, len(processor))):
        token = min(unknown)
        raise ValueError(
            f"vocab_size is {size} in the model, and the tokenizer has {len(processor)} tokens, of which rows or their padding hold "
            f"{processor.convert_ids_to_tokens(token)!r} ({token}): pass the model's own tokenizer, or call "
            f"model.resize_token_embeddings({len(processor)}) before"
        )


def check_checkpointing(args: DefenseConfig, model: nn.Module) -> None:
    """Run again in the old way, a block has gradients only if what goes into it has: with frozen embeddings, none.
    transformers asks for them at token embeddings, not at an image's.

    Raises:
        `ValueError`: if blocks would have none.
    """
    networks = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    images = any(network.main_input_name != "input_ids" for network in networks)
    if args.reentrant and images and not all(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "activation_checkpointing_kwargs has use_reentrant: true, which leaves blocks above frozen weights without "
            "gradient: set use_reentrant: false"
        )


def check_trained(model: nn.Module, optimizer: Optimizer | None) -> None:
    """Before the first step.

    Args:
        model (`nn.Module`): All that is trained: what was passed, and what a method has put to it.
        optimizer (`Optimizer`, *optional*): The user's own, if there is one.

    Raises:
        `ValueError`: if no weight is to be trained, or an optimizer of the user's own would train others.
    """
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    if not trained:
        raise ValueError(
            "no weight of the model has requires_grad, so nothing would be trained: load an adapter with "
            "PeftModel.from_pretrained(..., is_trainable=True), or pass a peft_config"
        )
    if not isinstance(optimizer, Optimizer) or isinstance(optimizer, AcceleratedOptimizer):
        return
    given = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    if given != trained:
        raise ValueError(
            f"optimizers has one for {len(given)} tensors, of which {len(given & trained)} are among the {len(trained)} that are "
            "trained (a method may add some, an adapter takes their place): pass optimizer_cls_and_kwargs, which is given all "
            "of them; freeze those that are to stay"
        )


def refuse_encoder_decoder(model: nn.Module, method: str) -> None:
    """
    Raises:
        `ValueError`: for a model whose states and attention are those of two sequences.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} has an encoder and a decoder, and {method} reads the states of one sequence: use a model "
            "that has one of the two, or another method, for example robustkd"
        )
