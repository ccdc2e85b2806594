"""The model card of a cleaned model."""

import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id

from hf_backdoor.evaluation.results import Results
from hf_backdoor.report import story
from hf_backdoor.report.page import markdown_sections
from hf_backdoor.report.scrub import scrub_results
from hf_backdoor.report.tables import cells, columns
from hf_backdoor.report.text import plain


_TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"


def model_card(
    results: Results, repo_id: str, *, adapter: bool = False, suspect_license: str | None = None
) -> ModelCard:
    """
    The card of a cleaned model, made from the results of its run alone.

    Args:
        results (`Results`): What was measured. Local paths and secrets are left out of the card.
        repo_id (`str`): Repository that the card is for.
        suspect_license (`str`, *optional*): Of the suspect, which is the card's where the recipe names none.
        adapter (`bool`): Whether folder `adapter` in it takes the suspect to the cleaned model.

    Returns:
        `ModelCard`: The card. Its front matter has the cleaned model's results as a `model-index`.

    Raises:
        ValueError: If `repo_id` is not a valid name of a repository.
    """
    validate_repo_id(repo_id)
    results = scrub_results(results)
    name = repo_id.split("/")[-1]
    base_model = story.hub_id(story.recipe_value(results, "model_name_or_path"))
    evaluations = _evaluations(results)
    sources = [story.hub_id(entry["source"]) for entry in results.data.values()]
    data = ModelCardData(
        base_model=base_model,
        datasets=list(dict.fromkeys(filter(None, sources))) or None,
        eval_results=evaluations or None,
        library_name="transformers",
        license=story.recipe_value(results, "license") or suspect_license,
        model_name=name if evaluations else None,
        tags=["hf_backdoor", "backdoor-defense", *_method_tag(results)],
    )
    return ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        title=name,
        base_model=base_model,
        weights=_weights(results, adapter),
        **markdown_sections(results),
    )


def _weights(results: Results, adapter: bool) -> str | None:
    """What the files are, where adapters were trained."""
    if results.recipe.get("use_peft") is not True:
        return None
    kind = results.recipe.get("quantization")
    trained = f", trained over weights in {kind}," if kind in ("nf4", "int8") else ""
    text = f"This is a whole model: the defense's LoRA adapters{trained} are merged into its unquantized weights."
    if adapter:
        return text + " Folder `adapter` has the same as one adapter over the suspect, this card's base model."
    return text + " There is no adapter to it: none over a suspect on the Hub makes this model."


def _method_tag(results: Results) -> list[str]:
    name = story.method(results)
    return [name] if name is not None and re.fullmatch(r"[a-z0-9_.]{1,40}", name) else []


def _evaluations(results: Results) -> list[EvalResult]:
    dataset, dataset_name = _evaluated_on(results)
    task = story.recipe_value(results, "task") or ""
    kinds = {"sequence_classification": "text-classification", "image_classification": "image-classification"}
    found = []
    measured = cells(results)
    for metric, trigger, _ in columns(results):
        cell = measured.get(("cleaned", metric, trigger))
        if cell is None:
            continue
        interval = {} if cell.low is None else {"low": round(cell.low, 6), "high": round(cell.high, 6)}
        found.append(
            EvalResult(
                task_type=kinds.get(task, "text-generation"),
                dataset_type=dataset,
                dataset_name=dataset_name,
                metric_type="accuracy" if metric == "cacc" else metric,
                metric_name=story.metric_with_trigger(metric, trigger),
                metric_value=round(cell.value, 6),
                metric_args={"n": cell.n, **interval},
            )
        )
    return found


def _evaluated_on(results: Results) -> tuple[str, str]:
    """The data that was evaluated on, as the type and the name that a `model-index` asks for."""
    for name, entry in results.data.items():
        if name.lower().startswith(("test", "eval", "validation")):
            return story.hub_id(entry["source"]) or "custom", plain(entry["source"], 80) or name
    return "custom", "evaluation data of the run"
