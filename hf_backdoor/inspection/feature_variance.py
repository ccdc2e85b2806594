"""[`feature_variance`]: do the features of backdoored models vary more? The premise of RobustKD
(https://doi.org/10.1016/j.asoc.2024.111907), measured layer by layer.

The paper does not say which variance it means. Three readings are measured at once, `MEASURES`; the fourth, over all
entries of a normed feature, is 1 for every model.
"""

import csv
import dataclasses
import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import Dataset
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import DefenseCollator, ImageClassification, Task, check_raw, find_blocks


MEASURES = {
    "tokens, normed": "over tokens, after a norm",
    "tokens, raw": "over tokens, raw",
    "all, raw": "over all entries, raw",
}
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]  # Okabe and Ito: safe for colour-blind
LINES = ["-", "--", ":", "-."]


@dataclass(frozen=True)
class VarianceRow:
    """The mean over `n` samples of a feature's variance in a sample, with its 95% interval.

    Args:
        model, texts (`str`): The caller's names of the model and of the rows it read.
        layer (`int`): Number of the block whose output is the feature, from 0, as in RobustKD's `mask_layers`.
        measure (`str`): One of `MEASURES`.
        value, low, high (`float`): Mean, and mean -/+ 1.96 standard errors.
        n (`int`): Samples.
    """

    model: str
    texts: str
    layer: int
    measure: str
    value: float
    low: float
    high: float
    n: int


def feature_variance(
    models: dict[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    texts: dict[str, Dataset],
    *,
    output_dir: str | Path | None = None,
    batch_size: int = 32,
) -> list[VarianceRow]:
    """How much the features of several models vary in each layer, on several sets of text.

    Args:
        models (`dict[str, PreTrainedModel]`): By name, `{"reference": ..., "suspect": ...}`: of one architecture, with
            one tokenizer. A model under a `FeatureMask` is measured as masked.
        tokenizer (`PreTrainedTokenizerBase`): Theirs.
        task ([`~hf_backdoor.data.Task`]): How rows are read.
        texts (`dict[str, Dataset]`): Raw rows by name, `{"clean": ..., "triggered": ...}`.
        output_dir (`str` or `Path`, *optional*): Folder for `feature_variance.csv` and `feature_variance.png`.
        batch_size (`int`, *optional*, defaults to 32): Rows at a time.

    Returns:
        `list[VarianceRow]`: For each model, set, measure and layer.

    Raises:
        `ValueError`: if there is no model, a set has no rows, or something else than a text stands in a row.
    """
    if not models:
        raise ValueError("models is empty: name one model or more")
    if isinstance(task, ImageClassification):
        raise ValueError(
            "task is that of pictures, and variances are taken over a text's tokens: pass a task of texts"
        )
    rows = []
    for texts_name, dataset in texts.items():
        if not len(dataset):
            raise ValueError(f"texts[{texts_name!r}] has no rows: leave it out, or give it some")
        check_raw(dataset, task)
        tokenized = task.encode_rows(dataset, tokenizer)
        for model_name, model in models.items():
            batches = list(_batches(tokenized, tokenizer, batch_size))
            progress = tqdm(batches, desc=f"Variance in {model_name}, {texts_name} text", leave=False)
            found = torch.cat([_variances(model, batch) for batch in progress])
            rows += [
                VarianceRow(model_name, texts_name, layer, measure, *_mean(found[:, number, layer]), n=len(found))
                for number, measure in enumerate(MEASURES)
                for layer in range(found.shape[2])
            ]
    if output_dir is not None:
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_table(rows, folder / "feature_variance.csv")
        draw(rows, folder / "feature_variance.png")
    return rows


def _batches(tokenized: Dataset, tokenizer: PreTrainedTokenizerBase, size: int) -> Iterator[dict[str, Tensor]]:
    collate = DefenseCollator(tokenizer)
    for start in range(0, len(tokenized), size):
        yield collate([tokenized[row] for row in range(start, min(start + size, len(tokenized)))])


@torch.no_grad()
def _variances(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """[B, measures, layers]."""
    takes = inspect.signature(model.forward).parameters
    inputs = {name: value.to(model.device) for name, value in batch.items() if name in takes and name != "labels"}
    valid, found, training = inputs["attention_mask"].bool(), [], model.training

    def measure(block: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        found.append(variances(output if isinstance(output, Tensor) else output[0], valid))

    # Not `output_hidden_states`: a decoder's last one has gone through the final norm.
    handles = [model.get_submodule(block).register_forward_hook(measure) for block in find_blocks(model)]
    try:
        model.eval()(**inputs)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return torch.stack(found, dim=2).cpu()


def variances(feature: Tensor, valid: Tensor) -> Tensor:
    """Population variances of each sample's valid tokens, as in `MEASURES`.

    Args:
        feature (`Tensor`): [B, T, D].
        valid (`Tensor`): [B, T] of booleans.

    Returns:
        `Tensor`: [B, 3], float32: of each channel over tokens, averaged over channels, after a layer norm without
            parameters; the same of the feature as it is; over all entries of the feature as it is.
    """
    raw = feature.float()
    weight = valid[..., None] / valid.sum(dim=1)[:, None, None].clamp(min=1)

    def spread(tokens: Tensor, together: bool) -> Tensor:
        mean = (tokens * weight).sum(dim=1, keepdim=True)
        mean = mean.mean(dim=2, keepdim=True) if together else mean
        return ((tokens - mean).square() * weight).sum(dim=1).mean(dim=1)

    return torch.stack(
        [spread(F.layer_norm(raw, raw.shape[-1:]), False), spread(raw, False), spread(raw, True)], dim=1
    )


def _mean(values: Tensor) -> tuple[float, float, float]:
    mean = values.double().mean().item()
    error = values.double().std().item() / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return mean, mean - 1.96 * error, mean + 1.96 * error


# ---- Files ----


def write_table(rows: list[VarianceRow], path: str | Path) -> None:
    """One line a row, as CSV."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(VarianceRow)])
        writer.writeheader()
        writer.writerows(dataclasses.asdict(row) for row in rows)


def draw(rows: list[VarianceRow], path: str | Path) -> None:
    """A panel for each measure: variance by layer, a colour for each model, a line style for each set of text."""
    models = list(dict.fromkeys(row.model for row in rows))
    sets = list(dict.fromkeys(row.texts for row in rows))
    figure = Figure(figsize=(4 * len(MEASURES), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    for number, (measure, title) in enumerate(MEASURES.items()):
        axes = figure.add_subplot(1, len(MEASURES), number + 1)
        for series in [(model, texts) for model in models for texts in sets]:
            colour, line = COLOURS[models.index(series[0]) % len(COLOURS)], LINES[sets.index(series[1]) % len(LINES)]
            points = [row for row in rows if (row.model, row.texts) == series and row.measure == measure]
            _line(axes, points, colour, line, ", ".join(series))
        axes.set_title(f"Variance {title}", fontsize=10)
        axes.set_xlabel("layer")
        if measure != "tokens, normed":
            axes.set_yscale("log")  # a decoder's raw features grow by orders of magnitude from layer to layer
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
    legend = figure.legend(
        *figure.axes[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=4
    )
    for text in legend.get_texts():
        text.set_parse_math(False)  # a "$" in a name is a character, not the start of a formula
    # No date and no version in the file: the same rows make the same bytes.
    figure.savefig(path, format="png", dpi=150, metadata={"Software": None})


def _line(axes: Axes, points: list[VarianceRow], colour: str, line: str, label: str) -> None:
    layers = [row.layer for row in points]
    axes.plot(layers, [row.value for row in points], line, color=colour, label=label, linewidth=1.5)
    axes.fill_between(
        layers, [row.low for row in points], [row.high for row in points], color=colour, alpha=0.15, linewidth=0
    )
