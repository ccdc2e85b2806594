"""`results.json`: everything a run measured, with the counts behind every rate."""

import json
import math
import operator
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import NormalDist, fmean, stdev
from typing import Any

from scipy.stats import binomtest

from .credentials import without_secrets


SCHEMA_VERSION = 1
CONFIDENCE = 0.95

_MODEL = re.compile(r"reference|suspect|cleaned|(control|stage)/[^/]+")


def wilson_interval(k: int, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """
    Wilson score interval of a proportion.

    Args:
        k (`int`): Successes.
        n (`int`): Trials. With none, nothing is known and the interval is (0, 1).
        confidence (`float`, *optional*, defaults to 0.95): Coverage of the interval.

    Returns:
        `tuple[float, float]`: The lower and the upper end, as fractions.

    Raises:
        ValueError: If `k` is negative or larger than `n`.
    """
    if n == 0:
        return 0.0, 1.0
    interval = binomtest(k, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


@dataclass(frozen=True)
class Row:
    """
    One measurement of one model.

    Args:
        model (`str`): "reference" (never poisoned), "suspect", "cleaned", "control/NAME" or "stage/NAME".
        metric (`str`): A free-form name such as "asr", "cacc" or "perplexity".
        trigger (`str` or `None`): The trigger that was inserted. `None` where there was none, or for all together.
        k (`int` or `None`): How many of the `n` samples counted. `None` for a mean.
        n (`int`): How many samples were measured.
        value (`float`): `k / n` (a fraction, not a percentage), or the mean.
        low (`float` or `None`): Lower end of the 95% interval. `None` when a single value gives no interval.
        high (`float` or `None`): Upper end of the 95% interval.
        seed (`int`): Seed of the run that made the model.

    Raises:
        ValueError: If a value has the wrong type or contradicts another one.
    """

    model: str
    metric: str
    trigger: str | None
    k: int | None
    n: int
    value: float
    low: float | None
    high: float | None
    seed: int

    def __post_init__(self) -> None:
        where = f"row {self.model!r} {self.metric!r}"
        refuse_other_model(self.model, f"{where}: model")
        _check(_is_name(self.metric), where, "metric", self.metric, "a printable name")
        _check(self.trigger is None or isinstance(self.trigger, str), where, "trigger", self.trigger, "text or null")
        _check(_is_int(self.n) and 0 < self.n < 2**53, where, "n", self.n, "a count of at least 1")
        _check(_is_int(self.seed), where, "seed", self.seed, "an integer")
        _check(_is_number(self.value), where, "value", self.value, "a finite number")
        _check((self.low is None) == (self.high is None), where, "high", self.high, "null exactly when low is")
        if self.low is not None:
            _check(_is_number(self.low), where, "low", self.low, "a finite number")
            _check(_is_number(self.high), where, "high", self.high, "a finite number")
            around = self.low - 1e-9 <= self.value <= self.high + 1e-9
            _check(around, where, "value", self.value, f"inside its interval [{self.low}, {self.high}]")
        if self.k is not None:
            _check(_is_int(self.k) and 0 <= self.k <= self.n, where, "k", self.k, f"a count from 0 to n = {self.n}")
            agrees = math.isclose(self.value, self.k / self.n, abs_tol=1e-9)
            _check(agrees, where, "value", self.value, f"k / n = {self.k}/{self.n}")

    @classmethod
    def from_counts(cls, *, model: str, metric: str, trigger: str | None = None, k: int, n: int, seed: int) -> "Row":
        """
        A rate with its Wilson interval.

        Args:
            model (`str`): See [`Row`].
            metric (`str`): See [`Row`].
            trigger (`str`, *optional*): See [`Row`].
            k (`int`): How many of the samples counted.
            n (`int`): How many samples were measured.
            seed (`int`): See [`Row`].

        Raises:
            ValueError: If nothing was measured (`n = 0`) or `k` is not between 0 and `n`.
        """
        k, n = operator.index(k), operator.index(n)
        where = f"row {model!r} {metric!r}"
        _check(n > 0, where, "n", n, "at least 1: give the evaluation at least one sample")
        _check(0 <= k <= n, where, "k", k, f"a count from 0 to n = {n}")
        low, high = wilson_interval(k, n)
        return cls(model, metric, trigger, k, n, k / n, low, high, operator.index(seed))

    @classmethod
    def from_values(
        cls,
        *,
        model: str,
        metric: str,
        trigger: str | None = None,
        values: Sequence[float],
        seed: int,
        transform: Callable[[float], float] | None = None,
    ) -> "Row":
        """
        A mean with its interval by the normal approximation.

        Args:
            model (`str`): See [`Row`].
            metric (`str`): See [`Row`].
            trigger (`str`, *optional*): See [`Row`].
            values (`Sequence[float]`): One value per sample.
            seed (`int`): See [`Row`].
            transform (`Callable`, *optional*): Increasing function applied to the mean and to both ends of the
                interval: `math.exp` makes a perplexity of mean negative log-likelihoods.

        Raises:
            ValueError: If there are no values, or one of them (or the transformed mean) is not finite.
        """
        where = f"row {model!r} {metric!r}"
        values = [float(value) for value in values]
        _check(len(values) > 0, where, "values", values, "at least one value")
        for value in values:
            _check(math.isfinite(value), where, "values", value, "finite numbers only: did the model diverge?")
        mean = fmean(values)
        points = [mean]
        if len(values) > 1:
            margin = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * stdev(values) / math.sqrt(len(values))
            points = [mean - margin, mean, mean + margin]
        if transform is not None:
            try:
                points = [float(transform(point)) for point in points]
            except OverflowError:
                raise ValueError(
                    f"{where}: the transformed mean of {mean:.3g} overflows: did the model diverge?"
                ) from None
        low, value, high = points if len(points) == 3 else (None, points[0], None)
        return cls(model, metric, trigger, None, len(values), value, low, high, operator.index(seed))


@dataclass
class Results:
    """
    All that the tables, the figures and the model card are made of.

    Args:
        rows (`list[Row]`): The measurements.
        costs (`list[dict]`): Per stage `stage` (its name), `seconds`, `tokens` (trained or read, or `None`) and
            `peak_memory` (bytes, or `None` where it was not measured).
        recipe (`dict`): The recipe as it was run. Secrets in it are neither written nor read.
        versions (`dict`): Package name -> version.
        data (`dict`): Name of a data set -> `source`, `rows` (a count) and `sha256` of its content.
        examples (`list[dict]`): `model`, `prompt` (as the model got it), `trigger` (or `None`) and `answer`.
    """

    rows: list[Row] = field(default_factory=list)
    costs: list[dict[str, Any]] = field(default_factory=list)
    recipe: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The document as it is written, with its keys in a fixed order."""
        rows = [asdict(row) for row in self.rows]
        return {
            "schema_version": SCHEMA_VERSION,
            **{f.name: getattr(self, f.name) for f in fields(self)},
            "rows": rows,
            "recipe": without_secrets(self.recipe),
        }

    @classmethod
    def from_dict(cls, document: Any) -> "Results":
        """
        Check a document and make the results of it.

        Raises:
            ValueError: If the document does not follow the schema of `docs/results.schema.json`.
        """
        names = ["schema_version", *(f.name for f in fields(cls))]
        _check_keys(document, names, "results")
        version = document["schema_version"]
        _check(
            _is_int(version) and version == SCHEMA_VERSION, "results", "schema_version", version, str(SCHEMA_VERSION)
        )
        _check(isinstance(document["rows"], list), "results", "rows", document["rows"], "a list")
        rows = []
        for index, row in enumerate(document["rows"]):
            _check_keys(row, [f.name for f in fields(Row)], f"rows[{index}]")
            rows.append(Row(**row))
        # A file of an earlier version may hold secrets, which a report would show.
        own = {"rows": rows, "recipe": without_secrets(document["recipe"])}
        results = cls(**{name: document[name] for name in names[1:]} | own)
        results.check()
        return results

    def check(self) -> None:
        """Refuse what the schema does not allow. Rows have checked themselves."""
        seen = set()
        for row in self.rows:
            key = (row.model, row.metric, row.trigger, row.seed)
            # Two values for one cell would be averaged silently as if they were seeds.
            _check(key not in seen, "rows", "row", key, "unique in model, metric, trigger and seed")
            seen.add(key)
        for name, kind, wanted in _CONTAINERS:
            _check(isinstance(getattr(self, name), kind), "results", name, getattr(self, name), wanted)
        for index, cost in enumerate(self.costs):
            where = f"costs[{index}]"
            _check_keys(cost, ["stage", "seconds", "tokens", "peak_memory"], where)
            _check(_is_name(cost["stage"]), where, "stage", cost["stage"], "a printable name")
            seconds = cost["seconds"]
            _check(_is_number(seconds) and seconds >= 0, where, "seconds", seconds, "a number of at least 0")
            for name in ("tokens", "peak_memory"):
                value = cost[name]
                _check(value is None or (_is_int(value) and value >= 0), where, name, value, "a count or null")
        for name, version in self.versions.items():
            _check(isinstance(version, str), "versions", str(name), version, "text")
        for name, entry in self.data.items():
            where = f"data[{name!r}]"
            _check_keys(entry, ["source", "rows", "sha256"], where)
            _check(isinstance(entry["source"], str), where, "source", entry["source"], "text")
            _check(_is_int(entry["rows"]) and entry["rows"] >= 0, where, "rows", entry["rows"], "a count")
            digest = entry["sha256"]
            is_digest = isinstance(digest, str) and re.fullmatch(r"[0-9a-f]{64}", digest) is not None
            _check(is_digest, where, "sha256", digest, "64 lower-case hexadecimal digits")
        for index, example in enumerate(self.examples):
            where = f"examples[{index}]"
            _check_keys(example, ["model", "prompt", "trigger", "answer"], where)
            _check(_is_model(example["model"]), where, "model", example["model"], f"one of {_MODELS}")
            for name in ("prompt", "answer"):
                _check(isinstance(example[name], str), where, name, example[name], "text")
            trigger = example["trigger"]
            _check(trigger is None or isinstance(trigger, str), where, "trigger", trigger, "text or null")

    def save(self, path: str | Path) -> None:
        """
        Write the results, or leave the file as it was.

        Args:
            path (`str` or `Path`): File to write. Its folder is made when missing.

        Raises:
            ValueError: If the results do not follow the schema.
        """
        self.check()
        path = Path(path)
        try:
            text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"results: {error}; keep to text, finite numbers, lists and mappings") from None
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            # A lone surrogate in a model's answer has no UTF-8 form; its escape is also valid JSON.
            temporary.write_bytes(text.encode("utf-8", errors="backslashreplace") + b"\n")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> "Results":
        """
        Read and check a `results.json`.

        Args:
            path (`str` or `Path`): File to read.

        Raises:
            ValueError: If the file is missing, is not JSON, or does not follow the schema.
        """
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls.from_dict(document)
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror}); run the evaluation first") from None
        except (RecursionError, OverflowError):
            raise ValueError(f"{path}: too deep or too large to be a results file") from None
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors as well
            raise ValueError(f"{path}: {error}") from None


_MODELS = "'reference', 'suspect', 'cleaned', 'control/NAME', 'stage/NAME'"

_CONTAINERS = (
    ("costs", list, "a list"),
    ("recipe", dict, "a mapping"),
    ("versions", dict, "a mapping"),
    ("data", dict, "a mapping"),
    ("examples", list, "a list"),
)


def refuse_other_model(name: Any, key: str) -> None:
    """
    Raises:
        `ValueError`: if no row could have this name as its model's.
    """
    if not _is_model(name):
        raise ValueError(f"{key} is {_shown(name)}; it must be one of {_MODELS}")


def _check(holds: bool, where: str, name: str, value: Any, wanted: str) -> None:
    if not holds:
        raise ValueError(f"{where}: {name} is {_shown(value)}; it must be {wanted}")


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."


def _check_keys(mapping: Any, names: Sequence[str], where: str) -> None:
    if not isinstance(mapping, dict):
        raise ValueError(f"{where}: is a {type(mapping).__name__}; it must be a mapping with {', '.join(names)}")
    missing = [name for name in names if name not in mapping]
    unknown = [name for name in mapping if name not in names]
    if missing or unknown:
        problem = f"{missing[0]!r} is missing" if missing else f"{unknown[0]!r} is unknown"
        raise ValueError(f"{where}: {problem}; the keys are {', '.join(names)}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value.strip() != "" and value.isprintable()


def _is_model(value: Any) -> bool:
    return _is_name(value) and _MODEL.fullmatch(value) is not None
