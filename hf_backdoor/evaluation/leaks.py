"""Rows that stand on both sides of an evaluation: a defense that trained on its test prompts proves nothing."""

from collections.abc import Iterable, Sequence

import numpy as np
from accelerate import PartialState
from datasets import Dataset, Image
from PIL.Image import Image as Picture
from scipy.sparse import csr_array
from transformers.utils import logging

from ..data import pixels_digest
from .words import normalized, words_of


logger = logging.get_logger(__name__)

# Rows compared at a time: bounds the memory of the product of the two word matrices.
CHUNK = 2000
# Share of the texts, and least number of them, above which a word is taken to be a template's where most rows look alike.
COMMON, FEWEST = 0.1, 20


def overlapping(
    texts: Sequence[str], others: Sequence[str], threshold: float = 0.5, *, common: int | None = None
) -> list[int]:
    """Which of `texts` say almost what one of `others` says: word-set Jaccard over `threshold`, or the same text but for case
    and white space (marks alone have no words). Words that stand in every text are those of a template, and don't count.

    Args:
        texts, others (`Sequence[str]`): The defender's texts, and the evaluation's.
        threshold (`float`, *optional*, defaults to 0.5): Jaccard index above which two texts overlap.
        common (`int`, *optional*): Words that stand in more texts than this don't count either.

    Returns:
        `list[int]`: Indices into `texts`, ascending.
    """
    texts, others = ([normalized(text) for text in part] for part in (texts, others))
    words: dict[str, int] = {}
    counts = [_word_matrix(part, words) for part in (texts, others)]
    first, second = (csr_array(parts, shape=(len(parts[2]) - 1, len(words))) for parts in counts)
    everywhere = len(texts) + len(others) - 1
    telling = np.flatnonzero(
        first.sum(axis=0) + second.sum(axis=0) <= (everywhere if common is None else min(common, everywhere))
    )
    first, second = first[:, telling], second[:, telling]
    sizes = [matrix.sum(axis=1) for matrix in (first, second)]
    same = set(others) - {""}
    found = {row for row, text in enumerate(texts) if text in same}
    if len(telling) < len(words) and not all(sizes[1]):
        found.update(np.flatnonzero(sizes[0] == 0).tolist())  # nothing but the template's words, on both sides
    for start in range(0, first.shape[0], CHUNK):
        shared = (first[start : start + CHUNK] @ second.T).tocoo()
        rows, columns = shared.coords
        union = sizes[0][start + rows] + sizes[1][columns] - shared.data
        found.update((start + rows[shared.data / union > threshold]).tolist())
    return sorted(found)


def _word_matrix(texts: Sequence[str], words: dict[str, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Data, column indices and row pointers of a text-by-word matrix of ones; new words are added to `words`."""
    indices, pointers = [], [0]
    for text in texts:
        indices.extend({words.setdefault(word, len(words)) for word in words_of(text)})
        pointers.append(len(indices))
    return np.ones(len(indices)), np.array(indices, dtype=np.int64), np.array(pointers)


def same_pictures(pictures: Iterable[Picture], others: Iterable[Picture]) -> list[int]:
    """Which of `pictures` have the very pixels of one of `others`."""
    known = {pixels_digest(picture) for picture in others}
    return [number for number, picture in enumerate(pictures) if pixels_digest(picture) in known]


def not_leaking(train: Dataset, test: Dataset, column: str) -> list[int]:
    """Indices of the training rows whose text is not (nearly), or whose picture is not pixel by pixel, in the test rows."""
    find = same_pictures if isinstance(train.features[column], Image) else overlapping
    leaked = set(find(train[column], test[column]))
    if find is overlapping and len(leaked) > len(train) / 2:
        # So many are alike by their templates: of several ones, or of one that some rows lack, no word stands in every text.
        common = max(FEWEST, int(COMMON * (len(train) + len(test))))
        leaked = set(overlapping(train[column], test[column], common=common))
    if leaked and PartialState().is_main_process:
        logger.warning(f"{len(leaked)} of {len(train)} training rows say what a test row says, and are left out")
    return [row for row in range(len(train)) if row not in leaked]
