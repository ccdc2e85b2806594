"""The report of a run: a page for a browser and the same in Markdown."""

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from hf_backdoor.evaluation.results import Results
from hf_backdoor.report import story
from hf_backdoor.report.tables import Table, costs_table, data_table, first_examples, shown_answers, table
from hf_backdoor.report.text import escape_markdown, fenced, plain


_EXAMPLES = 5  # prompts without and with each trigger
_LONGEST_ANSWER = 600  # characters; all of it is in results.json


def html_page(results: Results, figure: Path | None) -> str:
    """
    A page that needs nothing but itself: no script, no other file, no network.

    Args:
        results (`Results`): What was measured.
        figure (`Path` or `None`): A PNG to put into the page.

    Returns:
        `str`: HTML, with all text escaped.
    """
    environment = Environment(
        loader=PackageLoader("hf_backdoor.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    image = None if figure is None else "data:image/png;base64," + base64.b64encode(figure.read_bytes()).decode()
    name, _, paper = story.paper(results)
    return environment.get_template("page.html").render(
        suspicion=story.suspicion(results),
        method=name,
        paper=paper,
        findings=story.findings(results),
        results_table=table(results),
        figure=image,
        tested=story.tested(results),
        not_tested=story.not_tested(results),
        examples=examples_table(results),
        costs=costs_table(results),
        data=data_table(results),
        reproduce=story.reproduce(results),
        recipe=story.recipe_yaml(results),
        versions=story.versions(results),
    )


def markdown_page(results: Results, figure: str | None) -> str:
    """
    The report in Markdown.

    Args:
        results (`Results`): What was measured.
        figure (`str` or `None`): Address of a figure, relative to the page.

    Returns:
        `str`: GitHub-flavoured Markdown, with all text escaped.
    """
    # Markdown is escaped by hand: HTML's autoescape would be shown as it is.
    environment = Environment(
        loader=PackageLoader("hf_backdoor.report"),
        autoescape=False,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    return environment.get_template("report.md").render(
        **markdown_sections(results), examples=_markdown(examples_table(results)), figure=figure
    )


def markdown_sections(results: Results) -> dict[str, Any]:
    """The parts that the report and the model card share, as Markdown with all text escaped."""
    method, title, paper = story.paper(results)
    reproduce = [escape_markdown(story.reproduce(results))]
    if results.recipe:
        reproduce.append(fenced(story.recipe_yaml(results), "yaml"))
    if results.versions:
        reproduce.append(escape_markdown(story.versions(results)))
    return {
        "suspicion": escape_markdown(story.suspicion(results)),
        "method": None if method is None else escape_markdown(method),
        "paper_title": title,
        "paper": paper,
        "findings": [(escape_markdown(name), before, after) for name, before, after in story.findings(results)],
        "table": table(results).markdown(),
        "tested": escape_markdown(story.tested(results)),
        "not_tested": escape_markdown(story.not_tested(results)),
        "reproduce": "\n\n".join(reproduce),
        "costs": _markdown(costs_table(results)),
        "data": _markdown(data_table(results)),
    }


def examples_table(results: Results) -> Table:
    """What the suspect and the cleaned model answer with and without the trigger, side by side."""
    rows = [
        [
            plain(prompt, _LONGEST_ANSWER),
            "without" if trigger is None else f'"{plain(trigger)}"',
            *shown_answers(answers, _LONGEST_ANSWER),
        ]
        for trigger, prompt, answers in first_examples(results, _EXAMPLES)
    ]
    notes = [f"At most the first {_EXAMPLES} prompts without and with each trigger. All are in results.json."]
    return Table(["prompt", "trigger", "suspect model", "cleaned model"], rows, notes)


def _markdown(content: Table) -> str:
    return content.markdown() if content.rows else ""
