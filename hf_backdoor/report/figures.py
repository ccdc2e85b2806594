"""The figure of a run: ASR and CACC of every model, with their intervals."""

import warnings
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hf_backdoor.evaluation.results import Results
from hf_backdoor.report.tables import Cell, cells, metric_name, model_name, models, trigger_names


_COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]  # Okabe and Ito: safe for colour-blind
_PANELS = ("asr", "cacc")


def asr_cacc_figure(results: Results, path: str | Path) -> bool:
    """
    Draw ASR and CACC of every model as a PNG.

    A point is the mean over the seeds and a bar its 95% interval. The dashed line is the floor, the ASR of the
    reference model: what a model without a backdoor reaches as well.

    Args:
        results (`Results`): What was measured.
        path (`str` or `Path`): File to write.

    Returns:
        `bool`: Whether there was an ASR or a CACC to draw.
    """
    measured = cells(results)
    panels = [panel for panel in _PANELS if any(metric == panel for _, metric, _ in measured)]
    if not panels:
        return False
    names = [
        model for model in models(results) if any((model, panel) == key[:2] for panel in panels for key in measured)
    ]
    # A trigger has one colour in both panels. What has no trigger, as CACC, is grey.
    triggers = list(
        dict.fromkeys(trigger for _, metric, trigger in measured if metric in panels and trigger is not None)
    )
    colours = {trigger: _COLOURS[number % len(_COLOURS)] for number, trigger in enumerate(triggers)} | {
        None: "#444444"
    }

    figure = Figure(figsize=(4.2 * len(panels) + 1.8, 1.9 + 0.42 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), index + 1)
        _draw(axes, panel, names, measured, colours)
        # parse_math off: a "$" in a name is a character, not the start of a formula.
        axes.set_yticks(
            range(len(names)), [model_name(name) for name in names] if index == 0 else [], parse_math=False
        )

    shown = trigger_names(results)
    marker = dict(marker="o", linewidth=2)
    handles = [
        Line2D([], [], color=colours[trigger], label=f"ASR, {shown[trigger]}", **marker) for trigger in triggers
    ]
    if any(key[:2] == ("reference", "asr") for key in measured):
        handles.append(Line2D([], [], color="#444444", linestyle="--", label="floor: ASR of the reference model"))
    if handles:
        legend = figure.legend(handles=handles, fontsize=8, loc="outside lower center", ncols=min(3, len(handles)))
        for text in legend.get_texts():
            text.set_parse_math(False)
    with warnings.catch_warnings():
        # A trigger may use a script that the font does not have; a box in its place is good enough.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        # No date and no version in the file: the same results make the same bytes.
        figure.savefig(path, format="png", dpi=150, metadata={"Software": None})
    return True


def _draw(
    axes: Axes, panel: str, names: list[str], measured: dict[tuple, Cell], colours: dict[str | None, str]
) -> None:
    series = [trigger for trigger in colours if any(key[1:] == (panel, trigger) for key in measured)]
    for number, trigger in enumerate(series):
        colour = colours[trigger]
        shift = (number - (len(series) - 1) / 2) * min(0.18, 0.7 / len(series))
        for height, name in enumerate(names):
            cell = measured.get((name, panel, trigger))
            if cell is None:
                continue
            low, high = (cell.value, cell.value) if cell.low is None else (cell.low, cell.high)
            axes.plot([100 * low, 100 * high], [height + shift] * 2, color=colour, linewidth=2, solid_capstyle="butt")
            axes.plot([100 * cell.value], [height + shift], "o", color=colour, markersize=5)
        floor = measured.get(("reference", panel, trigger))
        if panel == "asr" and floor is not None:
            axes.axvline(100 * floor.value, color=colour, linestyle="--", linewidth=1)
    axes.set_title(f"{metric_name(panel)} ({'lower' if panel == 'asr' else 'higher'} is better)", fontsize=11)
    axes.set_xlim(-2, 102)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel("%")
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
