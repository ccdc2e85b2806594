"""From `results.json` to tables, a page, a model card and the Hub."""

from pathlib import Path

from hf_backdoor.evaluation.results import Results


def write_report(run_dir: str | Path) -> Path:
    """
    Write `report/README.md`, `report/index.html` and `report/asr_cacc.png` into a run, from its `results.json` alone.

    The figure is left out when neither an ASR nor a CACC was measured.

    Args:
        run_dir (`str` or `Path`): Folder of a run.

    Returns:
        `Path`: The folder of the report.

    Raises:
        ValueError: If there is no valid `results.json`.
    """
    # Imported here so that a terminal table does not wait for matplotlib.
    from hf_backdoor.report.figures import asr_cacc_figure
    from hf_backdoor.report.page import html_page, markdown_page

    results = Results.load(Path(run_dir) / "results.json")
    folder = Path(run_dir) / "report"
    folder.mkdir(exist_ok=True)
    figure = folder / "asr_cacc.png"
    if not asr_cacc_figure(results, figure):
        figure.unlink(missing_ok=True)  # one of an earlier run would be wrong now
    drawn = figure.exists()
    (folder / "README.md").write_text(markdown_page(results, figure.name if drawn else None), encoding="utf-8")
    (folder / "index.html").write_text(html_page(results, figure if drawn else None), encoding="utf-8")
    return folder
