"""The defenses. They see a suspect and clean rows; no attack, no trigger of an attacker, no evaluation set."""

from dataclasses import fields
from typing import Any

from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from ..data import ImageClassification, Processor, Task, infer_task
from . import locphylax, mbtsad, ntml, robustkd
from .arguments import refuse_names
from .config import DefenseConfig
from .method import Method, Step, asked_for
from .trainer import DefenseTrainer


METHODS: dict[str, Method] = {
    "locphylax": locphylax.METHOD,
    "mbtsad": mbtsad.METHOD,
    "robustkd": robustkd.METHOD,
    "ntml": ntml.METHOD,
}


def refuse_images(method: str, task: type[Task]) -> None:
    """Refuses images where a method is made for texts.

    Raises:
        `ValueError`: in one line that names a method for images.
    """
    if task is ImageClassification and not METHODS[method].images:
        able = " or ".join(name for name, known in METHODS.items() if known.images)
        raise ValueError(f"method is {method!r}, which is for texts, and task is image_classification: use {able}")


def defend(
    method: str,
    model: PreTrainedModel,
    tokenizer: Processor,
    clean: Dataset,
    *,
    output_dir: str,
    held_out: Dataset | None = None,
    student: PreTrainedModel | None = None,
    stages: dict[str, dict[str, Any]] | None = None,
    **arguments: Any,
) -> PreTrainedModel:
    """Runs all the stages of a method on a suspect model.

    Args:
        method (`str`): A key of `METHODS`.
        model (`PreTrainedModel`): The suspect. It is changed in place.
        tokenizer (`Processor`): Its tokenizer, or image processor.
        clean (`Dataset`): Clean rows, `text` and `label`, `image` and `label`, or `prompt` and `response`.
        output_dir (`str`): Checkpoints go into a folder for each stage in it.
        held_out (`Dataset`, *optional*): Clean rows to evaluate on while training.
        student (`PreTrainedModel`, *optional*): The smaller model of a method that distils into one.
        stages (`dict[str, dict[str, Any]]`, *optional*): Arguments of one stage, by its name.
        arguments: Of the method's configuration, for all stages.

    Returns:
        `PreTrainedModel`: The cleaned model: `model`, or `student` where there is one.

    Raises:
        `ValueError`: if a name stands for the model or the tokenizer, the method, a stage or an argument is unknown or would not be read, or a student is missing.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}: use one of {', '.join(METHODS)}")
    refuse_names(model, tokenizer)
    plan, stages = METHODS[method], stages or {}
    if not isinstance(stages, dict) or not all(isinstance(own, dict) for own in stages.values()):
        raise ValueError(
            f"stages is {stages!r}: give arguments by a stage's name, for example "
            f"{{{next(iter(plan.stages))!r}: {{'learning_rate': 1e-4}}}}"
        )
    if unknown := sorted(set(stages) - set(plan.stages)):
        raise ValueError(f"stages has {unknown}: {method} has {', '.join(plan.stages)}")
    configs = {name: step.trainer.config_class() for name, step in plan.stages.items()} | {"arguments": plan.config}
    for name, values in {"arguments": arguments, **stages}.items():
        if unknown := sorted(set(values) - {field.name for field in fields(configs[name])}):
            raise ValueError(f"{name} has {unknown}: see {configs[name].__name__} for what there is")
        if "output_dir" in values:
            raise ValueError(
                f"stages.{name}.output_dir is {values['output_dir']!r}, and each stage has a folder in output_dir: leave it out"
            )
    if plan.trains_on_suspect_rows:
        raise ValueError(
            f"method is {method!r}, which needs the rows that made the suspect too: run a recipe, or its trainers"
        )
    distils = any(step.starts_from == "student" for step in plan.stages.values())
    if student is None and distils:
        raise ValueError(f"student is None, and {method} distils into one: pass student_from_layers(model, ...)")
    if student is not None and not distils:
        raise ValueError(f"student is given, and {method} cleans the model itself: leave it out, or use robustkd")
    words = {key: arguments.get(key) for key in ("label_words", "prompt_template", "system_prompt")}
    task = infer_task(model, clean, **words)
    refuse_images(method, type(task))
    suspect = {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trained: nn.Module = model

    def values_of(name: str, step: Step) -> dict[str, Any]:
        return step.trainer.config_class().takes(arguments, stages.get(name, {}), plan.config) | step.overrides

    steps = asked_for(plan.stages, plan.stages, values_of)
    if idle := [name for name in stages if name not in steps]:
        reason = plan.stages[idle[0]].only_with
        raise ValueError(
            f"stages has {idle}, and {reason} is 0, which leaves {idle[0]} out: set {reason}, or leave it out here"
        )
    _refuse_lost_base(model, steps)
    for name, step in steps.items():
        if step.starts_from == "suspect":
            model.load_state_dict(suspect)
        trained = {"suspect": model, "student": student}.get(step.starts_from, trained)
        inputs = {
            argument: model if made_by == "suspect" else f"{output_dir}/{made_by}"
            for argument, made_by in step.inputs.items()
        }
        trainer = step.trainer(
            model=trained,
            args=step.trainer.config_class()(output_dir=f"{output_dir}/{name}", **values_of(name, step)),
            train_dataset=clean,
            eval_dataset=held_out,
            processing_class=tokenizer,
            task=task,
            **inputs,
        )
        trainer.train()
        trained = trainer.result()
        if any(name in later.inputs.values() for later in steps.values()):
            trainer.save_model()
    for parameter in trainable:
        parameter.requires_grad_(True)  # as a teacher the suspect was frozen
    return trained


def _refuse_lost_base(model: nn.Module, steps: dict[str, Step]) -> None:
    """
    Raises:
        `ValueError`: if a stage is to load what an earlier one leaves of an adapter's model, and nobody could tell its base.
    """
    if not isinstance(model, PeftModel) or model.active_peft_config.base_model_name_or_path:
        return
    for name, step in steps.items():
        for made_by in step.inputs.values():
            if made_by in steps and steps[made_by].makes_model:
                raise ValueError(
                    f"base_model_name_or_path is not set in model's adapter, whose base was made in memory, and {name} loads what "
                    f"{made_by} leaves: put the adapter on a base that is loaded from a folder, or pass model.merge_and_unload()"
                )


__all__ = ["METHODS", "DefenseConfig", "DefenseTrainer", "Method", "Step", "defend", "refuse_images"]
