"""What the report and the model card say about a run, in words. Everything comes from the results alone."""

import json
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_backdoor.evaluation.results import Results
from hf_backdoor.report.tables import Cell, cells, columns, metric_name
from hf_backdoor.report.text import plain


# Name of a method in a recipe -> how it is written, its title, its address.
PAPERS = {
    "locphylax": (
        "Locphylax",
        "Backdoor Collapse: Eliminating Unknown Threats via Known Backdoor Aggregation in Language Models",
        "https://huggingface.co/papers/2510.10265",
    ),
    "mbtsad": (
        "MBTSAD",
        "MBTSAD: Mitigating Backdoors in Language Models Based on Token Splitting and Attention Distillation",
        "https://huggingface.co/papers/2501.02754",
    ),
    "robustkd": (
        "RobustKD",
        "Robust Knowledge Distillation Based on Feature Variance Against Backdoored Teacher Model",
        "https://doi.org/10.1016/j.asoc.2024.111907",
    ),
    "ntml": (
        "NT-ML",
        "NT-ML: Backdoor Defense via Non-target Label Training and Mutual Learning",
        "https://huggingface.co/papers/2508.05404",
    ),
}


_HEADLINES = ("asr", "keyword_asr", "cacc", "robust_accuracy")


def recipe_value(results: Results, key: str) -> str | None:
    """A text of the recipe, from its top level."""
    value = results.recipe.get(key)
    return value if isinstance(value, str) and value.strip() else None


def method(results: Results) -> str | None:
    """The defense of the run as a recipe names it ("locphylax"), lower-case, or `None` if the recipe does not say."""
    name = recipe_value(results, "method")
    return None if name is None else name.lower().replace("-", "")


def paper(results: Results) -> tuple[str | None, str | None, str | None]:
    """The defense as it is written, the title of its paper and its address, as far as they are known."""
    name = recipe_value(results, "method")
    return PAPERS.get(method(results) or "", (None if name is None else plain(name, 60), None, None))


def hub_id(name: Any) -> str | None:
    """`name` if it is a repository of the Hub with its namespace, else `None`: a path never is one."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return None if Path(name).exists() else name


def triggers(results: Results) -> list[str]:
    """The triggers that a model was tested with."""
    return list(dict.fromkeys(row.trigger for row in results.rows if row.trigger is not None))


def metric_with_trigger(metric: str, trigger: str | None) -> str:
    """What a person reads for a metric that was measured with a trigger, or without."""
    return metric_name(metric) + (f' with the trigger "{plain(trigger, 60)}"' if trigger is not None else "")


def findings(results: Results) -> list[tuple[str, Cell, Cell]]:
    """What the defense changed: the name of a metric, the suspect model's value, the cleaned model's value."""
    measured = cells(results)
    found = []
    for metric, trigger, _ in columns(results):
        before, after = (measured.get((model, metric, trigger)) for model in ("suspect", "cleaned"))
        if before is not None and after is not None and metric in _HEADLINES:
            found.append((metric_with_trigger(metric, trigger), before, after))
    return found


def suspicion(results: Results) -> str:
    """What was suspected of which model."""
    name = recipe_value(results, "model_name_or_path")
    # A path says nothing to another reader, and may say too much.
    shown = None if name is None else hub_id(name) or re.split(r"[/\\]", name.rstrip("/\\"))[-1]
    shown = "" if shown is None else plain(shown, 80)
    if results.recipe.get("attack_trigger"):
        made = f"made from {shown} and " if shown else ""
        return f"The suspect model was {made}poisoned by this run, to measure how well a known backdoor is removed."
    if results.recipe.get("clean_dataset_name"):
        start = f"from {shown} " if shown else ""
        return f"The suspect model was trained {start}by this run, on rows that were suspected of poison."
    model = f"The suspect model{f', {shown},' if shown else ''}"
    return (
        f"{model} was suspected of a backdoor: of answering as an attacker wants whenever a trigger is in its input."
    )


def tested(results: Results) -> str:
    """What the evaluation covered."""
    names = triggers(results)
    if not names:
        return "No trigger was named in the evaluation."
    listed = ", ".join(f'"{plain(name, 200)}"' for name in names)
    rewritten = results.recipe.get("rewritten_dataset_name")
    made = " It is how whole texts are written, and these were rewritten elsewhere." if rewritten else ""
    return f"{'This trigger was' if len(names) == 1 else 'These triggers were'} tested: {listed}.{made}"


def not_tested(results: Results) -> str:
    """What the evaluation says nothing about."""
    if triggers(results):
        text = "Nothing else was tested. A low ASR on the listed triggers does not prove that there is no other trigger, and"
    else:
        text = "So nothing here tells whether there is one, and"
    text += " the data that was measured is not the data that you will use."
    measured = {row.model.split("/")[0] for row in results.rows}
    if "control" not in measured:
        text += " No control was measured: further training alone may account for a part of the change."
    if "reference" not in measured and triggers(results):
        text += " No model without a backdoor was measured: the floor that the ASR can reach is not known."
    return text


def recipe_yaml(results: Results) -> str:
    """The recipe as YAML, in its own order."""
    recipe = json.loads(json.dumps(results.recipe))  # YAML would have no safe form of a tuple
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100)
    if all(character.isprintable() or character == "\n" for character in text):
        return text
    # Escapes for all but ASCII: less readable, but it hides nothing and still is the same recipe.
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=False, width=100)


def seeds(results: Results) -> list[int]:
    """The seeds of the run."""
    return sorted({row.seed for row in results.rows})


def versions(results: Results) -> str:
    """The versions of the packages, in one line."""
    if not results.versions:
        return ""
    return (
        "Versions: " + ", ".join(f"{plain(name)} {plain(version)}" for name, version in results.versions.items()) + "."
    )


def reproduce(results: Results) -> str:
    """How to run it again."""
    numbers = seeds(results)
    shown = f" {'Seed' if len(numbers) == 1 else 'Seeds'}: {', '.join(map(str, numbers))}." if numbers else ""
    if results.recipe.get("command") == "evaluate":
        return f"Run hf-backdoor evaluate once more, with these options.{shown}"
    return f"Save the recipe as recipe.yaml and run: hf-backdoor run recipe.yaml.{shown}"
