"""Token splitting: words of the user's text are cut in two ("beauty" becomes "be auty"), so that it leaves the training
distribution while its label stays.

Splitting makes short pieces by chance, among them "mb" or "tq", which attackers use as triggers: a trigger's own embedding
then gets trained on clean labels. [`short_pieces`] counts them, and `banned_pieces` keeps chosen ones out.
"""

import hashlib
import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ...data import SIDE_COLUMNS, DefenseCollator, Task, beginning, map_rows


# A word is what stands between white space and punctuation: tokenizers part it from both, so its pieces are theirs. Not
# "\w+", which would end a word at every vowel sign of, say, Hindi.
PUNCTUATION = string.punctuation + "‘’“”«»…–—¡¿、。，！？：；（）「」"
WORD = re.compile(rf"[^\s{re.escape(PUNCTUATION)}]+")


@dataclass(frozen=True)
class TokenSplit:
    """The split of MBTSAD (https://huggingface.co/papers/2501.02754): some words of a text, each cut in two at random.

    A word is a run of characters without white space and punctuation. White space and punctuation stay as they are.

    Args:
        rate (`float`, *optional*, defaults to 0.3):
            Share of a text's words that are cut, rounded up; at most as many as there are words to cut. 0 cuts none.
        copies (`int`, *optional*, defaults to 3):
            Split versions of each row.
        min_chars (`int`, *optional*, defaults to 4):
            Characters of the shortest word that is cut, 3 or more: the left part has 1 or more, the right part 2 or more.
        max_words (`int`, *optional*):
            Most words of a text that are cut. No limit by default; the tool that the paper's settings are the defaults of
            (nlpaug) stops at 10, which on a review of 230 words is 4%, not 30%.
        keep_originals (`bool`, *optional*, defaults to `False`):
            Whether each row also stays as it was.
        banned_pieces (`Sequence[str]`, *optional*):
            Words that no cut may make, whatever their case: a suspected trigger, in the ablation. A tokenizer can still
            find one at the start of a longer piece.

    Raises:
        `ValueError`: if a value makes no sense. The line names the recipe's key, `split_` and the name here.
    """

    rate: float = 0.3
    copies: int = 3
    min_chars: int = 4
    max_words: int | None = None
    keep_originals: bool = False
    banned_pieces: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise ValueError(f"split_rate is {self.rate}: choose a share from 0 to 1, for example 0.3")
        if not isinstance(self.copies, int) or self.copies < 1:
            raise ValueError(f"split_copies is {self.copies}: choose a whole number, 1 or more")
        if not isinstance(self.min_chars, int) or self.min_chars < 3:
            raise ValueError(
                f"split_min_chars is {self.min_chars}: choose 3 or more, for a cut leaves 1 + 2 characters"
            )
        if self.max_words is not None and (not isinstance(self.max_words, int) or self.max_words < 1):
            raise ValueError(f"split_max_words is {self.max_words}: choose 1 or more, or null for no limit")
        if isinstance(self.banned_pieces, str):
            raise ValueError(f"split_banned_pieces is {self.banned_pieces!r}: give a list, [{self.banned_pieces!r}]")
        for piece in self.banned_pieces:
            if not WORD.fullmatch(piece):
                raise ValueError(
                    f"split_banned_pieces has {piece!r}: give single words, without white space and punctuation"
                )
        object.__setattr__(self, "banned_pieces", tuple(self.banned_pieces))

    @property
    def factor(self) -> int:
        """Rows that one row becomes."""
        return self.copies + self.keep_originals

    def split(self, text: str, generator: torch.Generator | None = None) -> str:
        """One split version of a text.

        Args:
            text (`str`): Text of the user: never a template, never an answer.
            generator (`torch.Generator`, *optional*): Where chance comes from; by default torch's own generator, which a
                `DataLoader` seeds for each worker.
        """
        words = list(WORD.finditer(text))
        banned = {piece.casefold() for piece in self.banned_pieces}
        # Places in the text where each word may be cut; a word without any is not drawn.
        places = [cuts for word in words if (cuts := self._cuts(word, banned))]
        # The small number undoes rounding: 0.07 * 100 is 7.000000000000001.
        count = min(math.ceil(self.rate * len(words) - 1e-9), len(places), self.max_words or len(places))
        drawn = sorted(torch.randperm(len(places), generator=generator)[:count].tolist())
        cuts = [places[word][torch.randint(len(places[word]), (), generator=generator)] for word in drawn]
        return " ".join(text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True))

    def _cuts(self, word: re.Match[str], banned: set[str]) -> Sequence[int]:
        start, end = word.span()
        if end - start < self.min_chars:
            return ()
        cuts = range(start + 1, end - 1)
        if not banned:
            return cuts
        whole = word.string
        return [cut for cut in cuts if banned.isdisjoint((whole[start:cut].casefold(), whole[cut:end].casefold()))]

    def versions(self, text: str, seed: int | None = None) -> list[str]:
        """A text's `factor` versions: itself if originals are kept, then its copies.

        With a seed, the copies depend on seed and text alone. Without one, they draw from torch's own generator.
        """
        generators = [None if seed is None else text_generator(seed, copy, text) for copy in range(self.copies)]
        kept = [text] if self.keep_originals else []
        return kept + [self.split(text, generator) for generator in generators]

    def apply(self, dataset: Dataset, column: str, seed: int, num_proc: int | None = None) -> Dataset:
        """The rows with `factor` versions of each in its place, one after the other, every other column as it was.

        A row's copies depend on the seed and on its text alone: they stay the same when other rows are dropped or moved.
        (Rows of the same text therefore get the same copies.)

        Args:
            dataset (`Dataset`): N raw rows.
            column (`str`): Column of the user's text.
            seed (`int`): Seed of all draws.
            num_proc (`int`, *optional*): Processes that share the work.

        Returns:
            `Dataset`: N * `factor` rows, with the split text in `column`.

        Raises:
            `ValueError`: if the column is missing.
        """
        if column not in dataset.column_names:
            raise ValueError(
                f"column {column!r} is not in the data set ({', '.join(dataset.column_names)}): "
                "token splitting needs raw rows, with their text"
            )

        def grow(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
            grown = {name: [value for value in values for _ in range(self.factor)] for name, values in batch.items()}
            return {**grown, column: [version for text in batch[column] for version in self.versions(text, seed)]}

        return map_rows(dataset, grow, batched=True, desc=f"Splitting words of {column}", num_proc=num_proc)


def cut_to_fit(row: dict[str, Any], task: Task, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """A row that the model has positions for: its text loses the words at its end that splitting pushed beyond the last one.

    Template and answer stay whole. What a model takes is `tokenizer.model_max_length`.

    Raises:
        `ValueError`: if template and answer alone take more.
    """
    text, limit = row[task.input_column], tokenizer.model_max_length
    while (excess := len(task.encode({**row, task.input_column: text}, tokenizer)["input_ids"]) - limit) > 0:
        kept = len(tokenizer(text, add_special_tokens=False)["input_ids"]) - excess
        if kept < 0:
            raise ValueError(f"a row takes more than {limit} tokens (model_max_length) without its text: leave it out")
        text = beginning(text, tokenizer, kept)
    return {**row, task.input_column: text}


def text_generator(seed: int, copy: int, text: str) -> torch.Generator:
    """A generator of its own for each text and copy."""
    digest = hashlib.sha256(f"{seed}/{copy}/{text}".encode("utf-8", "surrogatepass")).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))


def short_pieces(original: Dataset, split: Dataset, column: str, longest: int = 3) -> Counter[str]:
    """How often each short piece arose by splitting. Words that stood in the text before do not count.

    Args:
        original (`Dataset`): Rows as they were.
        split (`Dataset`): What [`TokenSplit.apply`] made of them.
        column (`str`): Column of the user's text.
        longest (`int`, *optional*, defaults to 3): Characters of the longest piece that is counted.

    Returns:
        `Counter`: Pieces in lower case, most frequent first.

    Raises:
        `ValueError`: if `split` was not made from `original`.
    """
    factor, rest = divmod(len(split), max(len(original), 1))
    if rest:
        raise ValueError(
            f"split has {len(split)} rows, no multiple of the {len(original)} of original: pass the rows it was made from"
        )
    pieces: Counter[str] = Counter()
    texts = [text for text in original[column] for _ in range(factor)]
    for row, (before, after) in enumerate(zip(texts, split[column], strict=True)):
        found = iter(WORD.findall(after))
        for word in WORD.findall(before):
            left = next(found, "")
            if left != word:
                right = next(found, "")
                if left + right != word:
                    raise ValueError(
                        f"split row {row} does not hold the word {word!r}: pass the rows it was made from"
                    )
                pieces.update(piece.casefold() for piece in (left, right) if len(piece) <= longest)
    return Counter(dict(sorted(pieces.items(), key=lambda item: (-item[1], item[0]))))


@dataclass
class DataCollatorForTokenSplit:
    """Splits words of raw rows on the fly, so that every epoch sees other cuts, in any `transformers.Trainer`.

    Set `remove_unused_columns=False`, so that the rows arrive with their text. It is for training only: `Trainer` would
    collate (and split) the rows of `eval_dataset` with it too.

    A batch holds `token_split.factor` versions of each row, so it is that much larger than
    `per_device_train_batch_size`. Only the text of `task.input_column` is split, before the task puts its template and its
    answer around it.

    Draws come from torch's own generator: `torch.manual_seed` (or the trainer's `seed`) repeats a run. For splits to look
    at, or to be the same after resuming from a checkpoint, use [`TokenSplit.apply`].

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        task ([`~hf_backdoor.data.Task`]): How rows become tokens.
        token_split ([`TokenSplit`], *optional*): Which words are split, and how many versions are made.

    Raises:
        `ValueError`: if rows come without their text.
    """

    tokenizer: PreTrainedTokenizerBase
    task: Task
    token_split: TokenSplit = TokenSplit()

    def features(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The versions of all rows, tokenized: what [`~hf_backdoor.data.DefenseCollator`] takes."""
        column = self.task.input_column
        if column not in rows[0]:
            raise ValueError(
                f"column {column!r} is not in the rows ({', '.join(rows[0])}): "
                "pass raw rows, and set remove_unused_columns=False"
            )
        return [
            {**self.task.encode(version, self.tokenizer), "trigger_id": row.get("trigger_id", 0)}
            for row in rows
            for text in self.token_split.versions(row[column])
            for version in [cut_to_fit({**row, column: text}, self.task, self.tokenizer)]
        ]

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """[`~hf_backdoor.data.DefenseCollator`]'s batch, in the form that a model takes for its own loss.

        Returns:
            `dict[str, Tensor]`: What the model reads, and `labels`, [B * factor] or for a causal LM [B * factor, T]: -100
            up to the answer. The columns that only this package's trainers read are left out.
        """
        batch = DefenseCollator(self.tokenizer)(self.features(rows))
        labels = batch["labels"]
        if labels.dim() == 2:
            batch["labels"] = F.pad(labels, (batch["input_ids"].shape[1] - labels.shape[1], 0), value=-100)
        return {name: value for name, value in batch.items() if name not in SIDE_COLUMNS}
