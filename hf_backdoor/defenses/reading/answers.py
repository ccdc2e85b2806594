"""[`OwnAnswersTrainer`]: the suspect's own answers to clean rows, which training may teach in place of the right ones. Ours.

A backdoor is what a trigger changes. So a defense need not teach the task again, from few rows, at the cost of what the suspect
knew of it: it is enough that a planted trigger leaves the answer as it is without. The probabilities that the suspect gives to
clean rows say what that is; they are read off once, before it is changed. One thing in them shows on clean rows, and is put right:
poisoned rows have taught it to expect their target too often ([`aligned`]).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from ...data import InstructionFollowing
from .config import ReadingConfig
from .reader import SuspectReader, found_file


ANSWERS_FILE = "own_answers.safetensors"

# Of an answer token's distribution the largest probabilities are kept, and scaled so that they sum to 1.
KEPT = 16

# Rounds of alignment.
ROUNDS = 100


class OwnAnswers:
    """
    What a suspect answers to each row: at each of the answer's tokens (a classification head has one), the likeliest tokens
    (or classes) and their probabilities. A folder holds them as `own_answers.safetensors`.

    Args:
        ids (`Tensor`): [S, k], int32, of the tokens of all rows one after another.
        probabilities (`Tensor`): [S, k], float32.
        lengths (`Tensor`): [N], tokens of each row's answer, S in all.
    """

    def __init__(self, ids: Tensor, probabilities: Tensor, lengths: Tensor):
        self.ids, self.probabilities, self.lengths = ids, probabilities, lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def rows(self) -> list[tuple[Tensor, Tensor]]:
        """Ids and probabilities of each row, [A, k] both."""
        parts = self.lengths.tolist()
        return list(zip(self.ids.split(parts), self.probabilities.split(parts), strict=True))

    def save_pretrained(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file(vars(self), Path(folder, ANSWERS_FILE))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "OwnAnswers":
        """What [`save_pretrained`] wrote.

        Raises:
            `ValueError`: if it is not there.
        """
        return cls(**load_file(found_file(folder, ANSWERS_FILE, "found_answers")))


def aligned(answers: OwnAnswers, right: Tensor) -> OwnAnswers:
    """Answers that give each class as often as it is right.

    Each class's logit is shifted by one number, the same in all rows: the one with which its mean probability is its share of the
    right answers (a logit adjustment, https://huggingface.co/papers/2007.07314, by what shows on the rows themselves).

    Where the right class is not among the likeliest that were kept, a place does not count: with few kept of many classes there might
    be no such numbers.

    Args:
        answers ([`OwnAnswers`]): As the suspect gave them.
        right (`Tensor`): [S], the right class (or label word's token) at each place.
    """
    counted = (answers.ids == right[:, None]).any(dim=1)
    if not counted.any():
        return answers
    classes, counts = right[counted].unique(return_counts=True)
    index = torch.searchsorted(classes, answers.ids.long()).clamp(max=len(classes) - 1)  # [S, k]
    known = classes[index] == answers.ids
    within = known & counted[:, None]
    logits, shift = answers.probabilities.log(), torch.zeros(len(classes))
    for _ in range(ROUNDS):
        shifted = (logits + torch.where(known, shift[index], 0.0)).softmax(dim=-1)
        given = torch.zeros(len(classes)).index_add(0, index[within], shifted[within])
        shift += (counts / given.clamp(min=1e-9)).log()
    return OwnAnswers(answers.ids, shifted, answers.lengths)


class OwnAnswersTrainer(SuspectReader):
    """
    Reads a suspect's own answers to clean rows off it, with the classes' shares put right ([`aligned`]; free answers stay as they
    are); trains nothing. [`found`] holds them after `train()`.

    Args:
        model, args, train_dataset, processing_class, kwargs:
            As in [`SuspectReader`].

    Raises:
        `ValueError`: under DeepSpeed ZeRO-3, or if the rows are tokenized already.
    """

    asked_by = "own_answers"
    found: OwnAnswers | None

    @classmethod
    def config_class(cls) -> type[ReadingConfig]:
        return ReadingConfig

    @torch.no_grad()
    def read(self) -> OwnAnswers:
        rows = self._remove_unused_columns(self.train_dataset)
        size = self.args.eval_batch_size
        progress = tqdm(
            range(0, len(rows), size),
            desc="Reading answers",
            disable=self.args.disable_tqdm or not self.is_world_process_zero(),
        )
        ids, probabilities, lengths, right = [], [], [], []
        for start in progress:
            features = [rows[row] for row in range(start, min(start + size, len(rows)))]
            batch = self._prepare_inputs(self.data_collator(features))
            logits, labels = self.forward(self.model, batch).logits, batch["labels"]
            if labels.dim() == 2:  # the answer's tokens, row by row
                answer = labels != -100
                logits, labels = logits[:, :-1][answer], labels[answer]
                lengths.append(answer.sum(dim=1))
            else:
                lengths.append(torch.ones_like(labels))
            likeliest = logits.float().softmax(dim=-1).topk(min(KEPT, logits.shape[-1]))
            ids.append(likeliest.indices.int())
            probabilities.append(likeliest.values / likeliest.values.sum(dim=-1, keepdim=True))
            right.append(labels)
        answers = OwnAnswers(*(torch.cat(parts).cpu() for parts in (ids, probabilities, lengths)))
        return answers if isinstance(self.task, InstructionFollowing) else aligned(answers, torch.cat(right).cpu())


# What a row's answer is to be: ids, and the probability of each, [A][k].
SOFT_COLUMNS = ("answer_ids", "answer_probabilities")


def with_soft_answers(rows: Dataset, answers: OwnAnswers, weight: float, sources: Sequence[int]) -> Dataset:
    """Encoded rows with columns that say what each is to answer: the suspect's own answer at `weight`, the right one for the rest.

    Args:
        rows (`Dataset`): Versions of the clean rows.
        answers ([`OwnAnswers`]): To the clean rows, in their order.
        weight (`float`): 0 to 1.
        sources (`Sequence[int]`): The clean row that each row is a version of.

    Raises:
        `ValueError`: if the rows are not those that were answered.
    """
    own = answers.rows()
    if len(own) != max(sources) + 1:
        raise ValueError(
            f"found_answers has answers to {len(own)} rows, which are not the clean rows given: make them anew, of these"
        )

    def change(row: dict[str, Any], index: int) -> dict[str, Any]:
        right = row["input_ids"][row["prompt_length"] :] if "prompt_length" in row else [row["labels"]]
        source = sources[index]
        ids, probabilities = own[source]
        if len(right) != len(ids):
            raise ValueError(
                f"found_answers has an answer of {len(ids)} tokens to clean row {source}, whose right one has {len(right)}: "
                "make them anew, of the clean rows given"
            )
        right, rest = torch.tensor(right)[:, None], torch.full((len(ids), 1), 1 - weight)
        both = torch.cat([right, ids], dim=1), torch.cat([rest, weight * probabilities], dim=1)
        return dict(zip(SOFT_COLUMNS, (part.tolist() for part in both), strict=True))

    return rows.map(change, with_indices=True, desc="Own answers", keep_in_memory=True, load_from_cache_file=False)


class WithSoftAnswers:
    """A collator that makes [B, A, k] of the columns above, ending at the last token like `labels`, zeros in front."""

    def __init__(self, collator: Any):
        self.collator = collator

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Tensor]:
        others = [{name: value for name, value in row.items() if name not in SOFT_COLUMNS} for row in features]
        batch = dict(self.collator(others))
        if SOFT_COLUMNS[0] not in features[0]:
            return batch
        for column in SOFT_COLUMNS:
            values = [torch.tensor(row[column]) for row in features]
            longest = max(len(value) for value in values)
            padded = [torch.nn.functional.pad(value, (0, 0, longest - len(value), 0)) for value in values]
            batch[column] = torch.stack(padded)
        return batch
