"""[`TriggerSearchTrainer`]: words that a suspect reacts to, to be planted beside the known triggers. Ours, not the paper's.

A planted trigger takes an unknown one along only as far as the two share a way through the model, and a word of the
defender's own invention often shares none (`docs/locphylax.md`). So this looks for words that do: those which, put into
clean rows, raise the loss of their right answers the most. By the gradient at a word's embedding all words of the
vocabulary are ranked at once (as in https://huggingface.co/papers/1908.07125), the best are tried on the rows, and from
the best of these it goes on. It needs the suspect and clean rows, and no knowledge of trigger or target.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ...data import Trigger, row_rng
from ..divergence import sound_attention
from ..reading import PLACES, Tokens, TriggerSearcher, found_file
from .config import LocphylaxConfig


FOUND_FILE = "found_triggers.json"

# Rows that the losses are means over, and as many of them as sort out which candidates are worth all.
ROWS = 48
FIRST_ROWS = 12
# Candidates that the gradients propose in a round, those of them that all rows are run for, and those that it goes on from.
CANDIDATES = 128
FINALISTS = 16
BEAM = 6
ROUNDS = 2

# What a further token must add, in nats, to be worth it.
WORTH = 0.5


class FoundTriggers(list[str]):
    """Texts, the one that raises the loss most first; a folder holds them as `found_triggers.json`."""

    def save_pretrained(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, FOUND_FILE).write_text(json.dumps(self, indent=1), encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "FoundTriggers":
        """What [`save_pretrained`] wrote.

        Raises:
            `ValueError`: if it is not there.
        """
        return cls(json.loads(found_file(folder, FOUND_FILE, "found_triggers").read_text(encoding="utf-8")))


class TriggerSearchTrainer(TriggerSearcher):
    """
    Searches a suspect for words that it reacts to; trains nothing. [`found`] holds them after `train()`.

    Args:
        model, args, train_dataset, processing_class, kwargs:
            As in [`SuspectReader`]; `args.searched_triggers` is how many are kept, `args.searched_tokens` how many
            tokens the longest may have.

    Raises:
        `ValueError`: under DeepSpeed ZeRO-3, or if the rows are tokenized already.
    """

    asked_by = "searched_triggers"
    found: FoundTriggers | None

    @classmethod
    def config_class(cls) -> type[LocphylaxConfig]:
        return LocphylaxConfig

    def read(self) -> FoundTriggers:
        effects = self._search()
        # What the clean rows say themselves is what the task is about: to plant it would cost the model its meaning.
        said = f" {' '.join(plain_words(text) for text in self.clean[self.task.input_column])} "
        foreign = {text: effect for text, effect in effects.items() if f" {plain_words(text)} " not in said}
        return FoundTriggers(strongest(foreign or effects)[: self.args.searched_triggers])

    # ---- The search ----

    def _search(self) -> dict[str, Tensor]:
        """What each text that was tried on all rows does, [P * C]: at each place, to each of the aims of [`_aims`]."""
        generator = torch.Generator().manual_seed(self.args.seed)
        order = torch.randperm(len(self.clean), generator=generator)[:ROWS].tolist()
        self.rows = [self.clean[row] for row in order]
        self.plain = [self._features(None, row)["input_ids"] for row in range(len(self.rows))]
        words, aims = self._words(), len(PLACES) * self.num_aims
        tried: dict[str, Tensor] = {}
        tokens_of: dict[str, Tokens] = {}
        lengths = range(1, self.args.searched_tokens + 1)
        progress = tqdm(
            total=len(lengths) * ROUNDS,
            desc="Searching",
            disable=self.args.disable_tqdm or not self.is_world_process_zero(),
        )
        for length in lengths:
            # From scratch, and the best so far with one token more.
            drawn = words[torch.randint(len(words), (2 * BEAM, length), generator=generator)].tolist()
            beam = [(tuple(tokens), number % aims) for number, tokens in enumerate(drawn)]
            for number, (text, aim) in enumerate(best_of_each(tried, BEAM)):
                beam[number] = ((*tokens_of[text], drawn[number][-1]), aim)
            for _ in range(ROUNDS):
                proposed = self._proposed(beam, words)
                tokens_of |= proposed
                first = self._effects(list(proposed), FIRST_ROWS)
                tried |= self._effects([text for text, _ in best_of_each(first, FINALISTS) if text not in tried], ROWS)
                here = {text: effect for text, effect in tried.items() if len(tokens_of[text]) == length}
                beam = [(tokens_of[text], aim) for text, aim in best_of_each(here, BEAM)]
                progress.set_postfix_str(repr(strongest(tried)[0]), refresh=False)
                progress.update()
        progress.close()
        return tried

    def _reads_back(self, text: str, tokens: Tokens) -> bool:
        return bool(text) and tuple(self.processing_class(" " + text, add_special_tokens=False)["input_ids"]) == tokens

    def _proposed(self, beam: list[tuple[Tokens, int]], words: Tensor) -> dict[str, Tokens]:
        """Candidates by text: each sequence with one token replaced by one that, by the gradient, serves its aim."""
        found: dict[str, Tokens] = {}
        embeddings = self.model.get_input_embeddings().weight.detach().float()
        share = max(1, CANDIDATES // sum(len(tokens) for tokens, _ in beam))
        for tokens, aim in beam:
            for slot, gradient in enumerate(self._gradients(tokens, aim)):
                scores = (embeddings @ gradient).cpu()
                # The first token starts a word; the next may go on with it, if the tokenizer reads it back so.
                allowed = words if slot == 0 else torch.arange(len(scores))
                ranked = allowed[scores[allowed].topk(min(8 * share, len(allowed))).indices]
                changed = [(*tokens[:slot], token, *tokens[slot + 1 :]) for token in ranked.tolist()]
                readable = ((self._text(candidate), candidate) for candidate in changed)
                kept = ((text, candidate) for text, candidate in readable if self._reads_back(text, candidate))
                found |= dict(islice(kept, share))
        return found

    def _features(self, text: str | None, row: int) -> dict[str, Any]:
        """A row's features with a text in it, at a place that depends on the row alone."""
        raw, column = self.rows[row], self.task.input_column
        if text is not None:
            trigger = Trigger(text, PLACES[row % len(PLACES)])
            raw = {**raw, column: trigger.insert(raw[column], row_rng(self.args.seed, "search", row))}
        return self.task.encode(raw, self.processing_class)

    def _gradients(self, tokens: Tokens, aim: int) -> Tensor:
        """Gradient of an aim at each token's embedding, [L, D], summed over the rows of its place."""
        text = self._text(tokens) or "a"
        total = torch.zeros(len(tokens), self.model.get_input_embeddings().weight.shape[1])
        place, aim = divmod(aim, self.num_aims)
        rows = list(range(len(self.rows)))[place :: len(PLACES)]
        size = self.args.per_device_train_batch_size
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            features = [self._features(text, row) for row in part]
            batch = self._prepare_inputs(self.data_collator(features))
            pairs = zip(part, features, strict=True)
            starts = torch.tensor([common_prefix(self.plain[row], each["input_ids"]) for row, each in pairs])
            if batch["labels"].dim() == 2:  # padded on the left
                starts += batch["input_ids"].shape[1] - torch.tensor([len(each["input_ids"]) for each in features])
            length = batch["input_ids"].shape[1]
            with sound_attention(length), embeddings_kept(self.model) as kept:
                aims, counted = self._aims(self.forward(self.model, batch).logits, batch)
            (gradient,) = torch.autograd.grad((aims * counted)[:, aim].sum(), kept)
            slots = (starts[:, None] + torch.arange(len(tokens))).clamp(max=length - 1)
            total = total + gradient.float().cpu()[torch.arange(len(part))[:, None], slots].sum(dim=0)
        return total.to(self.args.device)

    @torch.no_grad()
    def _effects(self, texts: list[str], rows: int) -> dict[str, Tensor]:
        """Mean of each aim at each place, [P * C], over those of the first rows with each text in them where it is counted."""
        number = min(rows, len(self.rows))
        pairs = [(text, row) for text in texts for row in range(number)]
        features = [self._features(*pair) for pair in pairs]
        order = sorted(range(len(pairs)), key=lambda item: len(features[item]["input_ids"]))
        found, size = {}, self.args.eval_batch_size
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            batch = self._prepare_inputs(self.data_collator([features[item] for item in chosen]))
            aims, counted = self._aims(self.forward(self.model, batch).logits, batch)
            found |= dict(zip(chosen, torch.stack([aims * counted, counted], dim=1).cpu(), strict=True))
        effects = {}
        for text, first in zip(texts, range(0, len(pairs), number), strict=True):
            values = torch.stack([found[item] for item in range(first, first + number)])
            total, count = torch.stack(
                [values[place :: len(PLACES)].sum(dim=0) for place in range(len(PLACES))], dim=1
            )
            effects[text] = torch.where(count > 0, total / count.clamp(min=1), -torch.inf).flatten()
        return effects


@contextmanager
def embeddings_kept(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """The embeddings of the last forward pass in the block, [B, T, D], to ask gradients for. The model itself is given ids:
    a decoder's classification head finds the last token by them, and would read padding if it were given embeddings."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        kept[:] = [output.detach().requires_grad_()]
        return kept[0]

    hook = model.get_input_embeddings().register_forward_hook(keep)
    try:
        yield kept
    finally:
        hook.remove()


def strongest(effects: dict[str, Tensor]) -> list[str]:
    """Texts by their effect, strongest first. Of texts that share a word there is one: the strongest, unless less suffices."""
    strength = {text: effect.max().item() for text, effect in effects.items()}
    kept: list[str] = []
    for text in sorted(strength, key=strength.__getitem__, reverse=True):
        words = set(text.split())
        idle = any(part in text and strength[part] > strength[text] - WORTH for part in strength if part != text)
        if not idle and not any(words & set(other.split()) for other in kept):
            kept.append(text)
    return kept


def best_of_each(effects: dict[str, Tensor], number: int) -> list[tuple[str, int]]:
    """The best text of each aim, with the aim, then the second best of each, and so on; first the aims that are reached best."""
    if not effects:
        return []
    texts, table = list(effects), torch.stack(list(effects.values()))
    ranked = table.argsort(dim=0, descending=True)
    aims = table.max(dim=0).values.argsort(descending=True).tolist()
    found: dict[str, int] = {}
    for place in ranked.tolist():
        for aim in aims:
            found.setdefault(texts[place[aim]], aim)
    return list(found.items())[:number]


def plain_words(text: str) -> str:
    """Its words alone, in small letters; a text without any stays as it is."""
    return " ".join(re.findall(r"\w+", text.casefold())) or text


def common_prefix(one: list[int], other: list[int]) -> int:
    """Tokens that two lists start with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))
