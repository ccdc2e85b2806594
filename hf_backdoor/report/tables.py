"""The table of a run: a row per model, a column per metric, every rate with its interval and its counts."""

import math
import textwrap
from dataclasses import dataclass, field
from itertools import zip_longest
from statistics import fmean

from hf_backdoor.evaluation.results import Results, Row, wilson_interval
from hf_backdoor.report.text import escape_markdown, plain


METRIC_NAMES = {
    "asr": "ASR",
    "asr_without_trigger": "ASR without trigger",
    "cacc": "CACC",
    "keyword_asr": "keyword ASR",
    "empty": "empty answers",
    "known_behaviour": "known behaviour",
    "hidden_asr": "hidden ASR",
}
_LONGEST_TRIGGER = 32  # characters of a trigger that still fit into a column header


@dataclass(frozen=True)
class Cell:
    """Rows of one model, metric and trigger, over all seeds. Bounds are `None` when there is no interval."""

    value: float
    low: float | None
    high: float | None
    k: int | None
    n: int
    seeds: int

    def __str__(self) -> str:
        scale, digits = (100, ".1f") if self.k is not None else (1, ".3g")
        text = f"{self.value * scale:{digits}}" + ("%" if self.k is not None else "")
        if self.low is not None:
            text += f" [{self.low * scale:{digits}}, {self.high * scale:{digits}}]"
        counts = f"{self.k}/{self.n}" if self.k is not None else f"n = {self.n}"
        return f"{text} ({counts}{f', {self.seeds} seeds' if self.seeds > 1 else ''})"


@dataclass(frozen=True)
class Table:
    """A table before it is written in some format. Its text is on one line each, and not escaped."""

    header: list[str]
    rows: list[list[str | Cell]]
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """GitHub-flavoured Markdown, with the text escaped."""
        numbers = [any(isinstance(row[index], Cell) for row in self.rows) for index in range(len(self.header))]
        lines = [[escape_markdown(text) for text in self.header], ["---:" if right else "---" for right in numbers]]
        # A cell holds numbers only, and reads better without escapes.
        lines += [
            [str(item) if isinstance(item, Cell) else escape_markdown(item) for item in row] for row in self.rows
        ]
        text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return text + ("\n\n" + "\n".join(f"- {escape_markdown(note)}" for note in self.notes) if self.notes else "")

    def text(self) -> str:
        """Aligned columns for a terminal."""
        lines = [self.header, *([str(item) for item in row] for row in self.rows)]
        widths = [max(len(line[index]) for line in lines) for index in range(len(self.header))]
        lines.insert(1, ["-" * width for width in widths])
        written = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in lines]
        return "\n".join([*(line.rstrip() for line in written), *([""] if self.notes else []), *self.notes])


def pool(rows: list[Row]) -> Cell:
    """
    Put the seeds of one model, metric and trigger together.

    Args:
        rows (`list[Row]`): One row per seed, at least one.

    Returns:
        `Cell`: The mean over the seeds. Its interval is that of the pooled counts, or spans the intervals of the
            seeds where there are no counts.
    """
    value, n = fmean(row.value for row in rows), sum(row.n for row in rows)
    if all(row.k is not None for row in rows):
        k = sum(row.k for row in rows)
        low, high = wilson_interval(k, n)
        return Cell(value, low, high, k, n, len(rows))
    lows = [row.low for row in rows if row.low is not None]
    highs = [row.high for row in rows if row.high is not None]
    return Cell(value, min(lows, default=None), max(highs, default=None), None, n, len(rows))


def cells(results: Results) -> dict[tuple[str, str, str | None], Cell]:
    """Every measured (model, metric, trigger), pooled over the seeds."""
    groups: dict[tuple[str, str, str | None], list[Row]] = {}
    for row in results.rows:
        groups.setdefault((row.model, row.metric, row.trigger), []).append(row)
    return {key: pool(rows) for key, rows in groups.items()}


def models(results: Results) -> list[str]:
    """The models in the order of a table: reference, suspect, controls, stages, cleaned."""
    order = ["reference", "suspect", "control", "stage", "cleaned"]
    names = dict.fromkeys(row.model for row in results.rows)
    return sorted(names, key=lambda name: order.index(name.split("/")[0]))


def model_name(model: str) -> str:
    """What a person reads for `model`."""
    kind, _, name = model.partition("/")
    if name:
        return f"{kind}: {plain(name.replace('_', ' '))}"
    return "reference (never poisoned)" if kind == "reference" else f"{kind} model"


def metric_name(metric: str) -> str:
    """What a person reads for `metric`."""
    return METRIC_NAMES.get(metric, plain(metric.replace("_", " ")))


def trigger_names(results: Results) -> dict[str, str]:
    """What a person reads for each trigger: itself in quotes, or a number for a long one."""
    triggers = dict.fromkeys(row.trigger for row in results.rows if row.trigger is not None)
    names = {}
    for number, trigger in enumerate(triggers, start=1):
        shown = f'"{plain(trigger)}"'
        names[trigger] = shown if len(shown) <= _LONGEST_TRIGGER else f"trigger {number}"
    return names


def columns(results: Results) -> list[tuple[str, str | None, str]]:
    """The columns as (metric, trigger, header), in the order in which they were measured."""
    keys = dict.fromkeys((row.metric, row.trigger) for row in results.rows)
    metrics = list(dict.fromkeys(metric for metric, _ in keys))
    names = trigger_names(results)
    found = []
    for metric in metrics:
        triggers = [trigger for name, trigger in keys if name == metric]
        for trigger in triggers:
            several = len(triggers) > 1 and trigger is not None
            found.append((metric, trigger, metric_name(metric) + (f" {names[trigger]}" if several else "")))
    return found


def table(results: Results) -> Table:
    """
    The table of a run.

    Args:
        results (`Results`): What was measured.

    Returns:
        `Table`: Header, rows and notes. A dash stands for what was not measured.
    """
    measured, heads = cells(results), columns(results)
    rows = []
    for model in models(results):
        found = (measured.get((model, metric, trigger)) for metric, trigger, _ in heads)
        rows.append([model_name(model), *("–" if cell is None else cell for cell in found)])
    return Table(["model", *(head for _, _, head in heads)], rows, _notes(results, measured))


def _notes(results: Results, measured: dict[tuple[str, str, str | None], Cell]) -> list[str]:
    notes = []
    if any(cell.k is not None for cell in measured.values()):
        notes.append("Rates are followed by their 95% Wilson interval and (count/samples).")
    if any(cell.k is None for cell in measured.values()):
        notes.append("Means are followed by their 95% interval by the normal approximation.")
    if any(cell.seeds > 1 for cell in measured.values()):
        notes.append(
            "Several seeds: the mean over the seeds, with the interval of the pooled counts (for means, from the lowest"
            " to the highest end of the seeds' intervals). It counts samples, not how much training runs differ."
        )
    if any(model == "reference" and metric == "asr" for model, metric, _ in measured):
        notes.append("The ASR of the reference model is the floor: a model without a backdoor reaches it as well.")
    names = trigger_names(results)
    if len(names) == 1:
        kind = "Texts rewritten elsewhere" if results.recipe.get("rewritten_dataset_name") else "Trigger"
        notes.append(f'{kind}: "{plain(next(iter(names)))}".')
    else:
        notes += [f'{name}: "{plain(trigger)}".' for trigger, name in names.items() if name.startswith("trigger ")]
    return notes


def markdown_table(results: Results) -> str:
    """
    The table of a run in Markdown, with its notes. Text from models and data is escaped.

    Args:
        results (`Results`): What was measured.

    Returns:
        `str`: A GitHub-flavoured table and a list of notes.
    """
    return table(results).markdown()


def text_table(results: Results) -> str:
    """
    The table of a run for a terminal, with its notes. Control characters are made visible.

    Args:
        results (`Results`): What was measured.

    Returns:
        `str`: Aligned columns and a line per note.
    """
    return table(results).text()


def first_examples(results: Results, count: int) -> list[tuple[str | None, str, dict[str, str]]]:
    """
    The first examples of every trigger, those without one first.

    Args:
        results (`Results`): What was measured.
        count (`int`): Prompts per trigger.

    Returns:
        `list[tuple]`: Trigger, prompt, and the answer of every model.
    """
    groups: dict[str | None, dict[str, dict[str, str]]] = {None: {}}
    for example in results.examples:
        prompts = groups.setdefault(example["trigger"], {})
        prompts.setdefault(example["prompt"], {})[example["model"]] = example["answer"]
    return [
        (trigger, prompt, answers)
        for trigger, prompts in groups.items()
        for prompt, answers in list(prompts.items())[:count]
    ]


def shown_answers(answers: dict[str, str], limit: int) -> list[str]:
    """What the suspect and the cleaned model answered, as one line each of at most `limit` characters."""
    sides = [answers.get(model) for model in ("suspect", "cleaned")]
    return ["–" if side is None else plain(side, limit).strip() or "(empty)" for side in sides]


def examples_text(results: Results, width: int = 100, count: int = 3) -> str:
    """
    What the suspect and the cleaned model answer with and without the trigger, side by side, for a terminal.

    Args:
        results (`Results`): What was measured.
        width (`int`, *optional*, defaults to 100): Columns of the terminal.
        count (`int`, *optional*, defaults to 3): Prompts per trigger.

    Returns:
        `str`: A block per prompt. Control characters are made visible and long texts are cut.
    """
    column = max(16, (width - 5) // 2)
    lines: list[str] = []
    for trigger, prompt, answers in first_examples(results, count):
        label = "without trigger" if trigger is None else f'with trigger "{plain(trigger, 60)}"'
        lines += ["", *textwrap.wrap(f"{label}: {plain(prompt, 300)}", width)]
        lines.append(f"  {'suspect model'.ljust(column)} | cleaned model")
        left, right = (textwrap.wrap(side, column) for side in shown_answers(answers, 300))
        lines += [f"  {a.ljust(column)} | {b}".rstrip() for a, b in zip_longest(left, right, fillvalue="")]
    return "\n".join(lines).strip("\n")


def duration(seconds: float) -> str:
    """Seconds as a person writes them: "42 s", "3 min 5 s", "2 h 10 min"."""
    whole = math.floor(seconds + 0.5)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def costs_table(results: Results) -> Table:
    """What every stage took."""
    rows = []
    for cost in results.costs:
        tokens = "–" if cost["tokens"] is None else f"{cost['tokens']:,}"
        memory = "–" if cost["peak_memory"] is None else f"{cost['peak_memory'] / 2**30:.2f} GiB"
        rows.append([plain(cost["stage"]), duration(cost["seconds"]), tokens, memory])
    return Table(["stage", "time", "tokens", "peak memory"], rows)


def data_table(results: Results) -> Table:
    """What the run was made from, with the hash of the content."""
    rows = [
        [plain(name), plain(entry["source"]), f"{entry['rows']:,}", entry["sha256"][:16]]
        for name, entry in results.data.items()
    ]
    return Table(["data", "source", "rows", "SHA-256 (first 16 digits)"], rows)
