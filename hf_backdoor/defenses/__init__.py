"""The defenses. They see a suspect and clean rows; no attack, no trigger of an attacker, no evaluation set."""

from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import infer_task
from . import locphylax, mbtsad
from .config import DefenseConfig
from .method import Method, Step
from .trainer import DefenseTrainer


METHODS: dict[str, Method] = {"locphylax": locphylax.METHOD, "mbtsad": mbtsad.METHOD}


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
    suspect = {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}
    for name, step in plan.stages.items():
        if step.starts_from == "suspect":
            model.load_state_dict(suspect)
        values = arguments | stages.get(name, {}) | step.overrides
        trainer = step.trainer(
            model=model,
            args=plan.config(output_dir=f"{output_dir}/{name}", **values),
            train_dataset=clean,
            eval_dataset=held_out,
            processing_class=tokenizer,
            task=task,
            **{argument: f"{output_dir}/{made_by}" for argument, made_by in step.inputs.items()},
        )
        trainer.train()
        if any(name in later.inputs.values() for later in plan.stages.values()):
            trainer.save_model()
    return model


__all__ = ["METHODS", "DefenseConfig", "DefenseTrainer", "Method", "Step", "defend"]
