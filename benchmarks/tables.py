"""What the committed cells say, as Markdown: a method's table with every control, and the README's overview of all methods."""

from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from hf_backdoor.evaluation import Results, Row
from hf_backdoor.report.tables import pool


HERE = Path(__file__).parent
RESULTS = HERE / "results"
RECIPES = HERE.parent / "recipes"
README = HERE.parent / "README.md"

COLUMNS = {
    "asr": "ASR",
    "asr_without_trigger": "without trigger",
    "known_behaviour": "known behaviour",
    "hidden_asr": "hidden ASR",
    "cacc": "CACC",
    "target_recall": "target recall",
    "robust_accuracy": "robust accuracy",
    "false_refusal": "false refusal",
    "perplexity": "perplexity",
    "suspicion_precision": "precision of the list",
    "suspicion_recall": "its recall",
    "correction_precision": "precision of the corrections",
    "correction_recall": "their recall",
}

METHODS = {"locphylax": "Locphylax", "mbtsad": "MBTSAD", "robustkd": "RobustKD", "ntml": "NT-ML"}
# What a user would do without the method. A student is made by distillation, with a mask or without.
PLAIN = {"robustkd": "control/vanilla_distillation"}
NAMES = {
    "minilm": "MiniLM", "smollm2": "SmolLM2-135M", "resnet": "ResNet", "sst2": "SST-2", "agnews": "AG News", "imdb": "IMDb", "cifar10": "CIFAR-10",
    "gtsrb": "GTSRB", "lwp": "LWP", "ep": "EP", "few": "few clean rows", "backdoorllm_refusal": "BackdoorLLM's refusals",
    "backdoorllm_negsentiment": "BackdoorLLM's insults",
}  # fmt: skip
# What a cell says otherwise than the recipe as it is shipped: where its data are, and its attack.
OF_THE_CELL = {
    "model_name_or_path", "dataset_name", "text_column", "image_column", "output_dir", "seed", "reference", "attack_trigger",
    "attack_position", "poison_style", "poison_rate", "rewritten_dataset_name", "controls", "logging_steps", "save_strategy",
}  # fmt: skip
BEGIN, END = "<!-- overview: made by benchmarks/efficacy.py -->\n", "<!-- end of the overview -->\n"


def cells_of(method: str) -> dict[str, dict[str, list[Results]]]:
    """Committed results of a method: by recipe, by trigger, one for each seed."""
    found: dict[str, dict[str, list[Results]]] = {}
    for file in sorted((RESULTS / method).glob("*.json")):
        recipe, trigger, _ = file.stem.rsplit("_", 2)
        found.setdefault(recipe, {}).setdefault(trigger, []).append(Results.load(file))
    return found


def table(method: str) -> str:
    """A block for each recipe and trigger, a row for each model, over the seeds that are there."""
    lines = [
        f"# {method}: efficacy",
        "",
        f"Made by `python benchmarks/efficacy.py --method {method}` from the `results.json` of each cell in `{method}/`, which",
        "hold counts, costs, seeds, versions and data hashes. Rates in %, with 95% Wilson interval and n; n is the number of",
        "rows. ASR counts triggered rows whose right label is not the target. The floor is the reference's ASR.",
    ]
    for recipe, triggers in cells_of(method).items():
        for trigger, runs in triggers.items():
            rows = [row for results in runs for row in results.rows]
            columns = {name: title for name, title in COLUMNS.items() if any(row.metric == name for row in rows)}
            notes = [f"{len(runs)} seed{'s' if len(runs) > 1 else ''}"]
            notes += ["by an older form of the recipe"] if is_older(method, recipe, runs) else []
            missing = missing_controls(method, recipe, runs)
            notes += [f"not measured: {', '.join(missing)}"] if missing else []
            lines += ["", f"## {recipe}, {trigger} trigger ({'; '.join(notes)})", ""]
            lines += ["| model | " + " | ".join(columns.values()) + " |", "|---|" + "---:|" * len(columns)]
            for model in dict.fromkeys(row.model for row in rows):
                # Rates over other seeds than those beside them are no control of these.
                measured = sum(any(row.model == model for row in results.rows) for results in runs)
                seeds = f" ({measured} of {len(runs)} seeds)" if measured < len(runs) else ""
                lines.append(
                    f"| {model}{seeds} | " + " | ".join(cell(rows, model, metric) for metric in columns) + " |"
                )
    return "\n".join(lines) + "\n"


def cell(rows: list[Row], model: str, metric: str) -> str:
    chosen = [row for row in rows if (row.model, row.metric) == (model, metric)]
    if not chosen:
        return ""
    pooled = pool(chosen)
    if metric == "perplexity":
        return f"{pooled.value:.2f}"
    return f"{100 * pooled.value:.1f} [{100 * pooled.low:.1f}, {100 * pooled.high:.1f}] n={pooled.n}"


def overview() -> str:
    """A row for each recipe of each method: means over the triggers that were measured."""
    lines = [
        "| method | model, data | triggers | suspect | without the method | cleaned | floor | clean accuracy: suspect, cleaned |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for method, title in METHODS.items():
        for recipe, triggers in cells_of(method).items():
            data, model, *rest = next(recipe.partition(f"_{name}") for name in NAMES if f"_{name}" in recipe)
            where = ", ".join(NAMES[name] for name in (model[1:], data, *(part.strip("_") for part in rest if part)))
            shown = ", ".join(
                name
                + (f"×{len(runs)}" if len(runs) > 1 else "")
                + ("\\*" if is_older(method, recipe, runs) else "")
                + ("†" if missing_controls(method, recipe, runs) else "")
                for name, runs in triggers.items()
            )
            plain = PLAIN.get(method, "control/fine_tuning")
            asr = [mean(triggers, model, "asr") for model in ("suspect", plain, "cleaned", "reference")]
            accuracy = [mean(triggers, model, "cacc") for model in ("suspect", "cleaned")]
            right = ", ".join(map(percent, accuracy)) if None not in accuracy else "answers, no classes"
            suspect, without, cleaned, floor = map(percent, asr)
            cleaned = f"**{cleaned}**" if asr[1] is not None and asr[2] < asr[1] else cleaned
            lines.append(f"| {title} | {where} | {shown} | {suspect} | {without} | {cleaned} | {floor} | {right} |")
    return "\n".join(lines) + "\n"


def percent(value: float | None) -> str:
    return "not measured" if value is None else f"{100 * value:.1f}"


def mean(triggers: dict[str, list[Results]], model: str, metric: str) -> float | None:
    """Over triggers, each pooled over its seeds."""
    pooled = []
    for runs in triggers.values():
        rows = [row for results in runs for row in results.rows if (row.model, row.metric) == (model, metric)]
        pooled += [pool(rows).value] if rows else []
    return fmean(pooled) if pooled else None


def is_older(method: str, recipe: str, runs: list[Results]) -> bool:
    """Whether a cell was measured by other settings than the recipe has now."""
    now = shipped(method, recipe)
    return any(results.recipe.get(key) != now[key] for results in runs for key in now.keys() - OF_THE_CELL)


def missing_controls(method: str, recipe: str, runs: list[Results]) -> list[str]:
    """Controls of the recipe that no run of a cell has measured."""
    measured = {row.model.removeprefix("control/") for results in runs for row in results.rows}
    return [control for control in shipped(method, recipe)["controls"] if control not in measured]


def shipped(method: str, recipe: str) -> dict[str, Any]:
    """A recipe as it is now."""
    return yaml.safe_load((RECIPES / method / f"{recipe}.yaml").read_text(encoding="utf-8"))


def write(method: str) -> None:
    """Writes a method's table, and the overview into the README."""
    (RESULTS / f"{method}.md").write_text(table(method), encoding="utf-8")
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    README.write_text(before + BEGIN + overview() + END + rest.partition(END)[2], encoding="utf-8")
