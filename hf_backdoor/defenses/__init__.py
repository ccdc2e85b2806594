"""The defenses. They see a suspect and clean rows; no attack, no trigger of an attacker, no evaluation set."""

from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import infer_task
from . import locphylax
from .config import DefenseConfig
from .method import Method, Step
from .trainer import DefenseTrainer


METHODS: dict[str, Method] = {"locphylax": locphylax.METHOD}


def defend(
    method: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    clean: Dataset,
    *,
    output_dir: str,
    held_out: Dataset | None = None,
    stages: dict[str, dict[str, Any]] | None = None,
    **arguments: Any,
) -> PreTrainedModel:
    """Runs all the stages of a method on a suspect model.

    Args:
        method (`str`): A key of `METHODS`.
        model (`PreTrainedModel`): The suspect; it is changed in place and returned cleaned.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        clean (`Dataset`): Clean rows, `text` and `label`, or `prompt` and `response`.
        output_dir (`str`): Checkpoints go into a folder for each stage in it.
        held_out (`Dataset`, *optional*): Clean rows to evaluate on while training.
        stages (`dict[str, dict[str, Any]]`, *optional*): Arguments of one stage, by its name.
        arguments: Of the method's configuration, for all stages.

    Raises:
        `ValueError`: if the method or a stage is unknown.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}: use one of {', '.join(METHODS)}")
    plan, stages = METHODS[method], stages or {}
    if unknown := sorted(set(stages) - set(plan.stages)):
        raise ValueError(f"stages has {unknown}: {method} has {', '.join(plan.stages)}")
    words = arguments.get("label_words"), arguments.get("prompt_template")
    task = infer_task(model, clean, *words)
    for name, step in plan.stages.items():
        values = arguments | stages.get(name, {}) | step.overrides
        config = plan.config(output_dir=f"{output_dir}/{name}", **values)
        trainer = step.trainer(
            model=model,
            args=config,
            train_dataset=clean,
            eval_dataset=held_out,
            processing_class=tokenizer,
            task=task,
        )
        trainer.train()
    return model


__all__ = ["METHODS", "DefenseConfig", "DefenseTrainer", "Method", "Step", "defend"]
