"""[`SoftTriggerTrainer`]: triggers made of embeddings, to be planted beside the known ones. Ours, not the paper's.

Where a tokenizer cuts an attacker's word in two, no single token does anything, and a search for words (`search.py`) finds nothing to
start from. Between the embeddings of words there is no such gap: a few free vectors at a random place of a text find a way
through the model to each wrong class by gradient alone, and a backdoor is the shortest one there is (as for images in
https://huggingface.co/papers/2110.03735, and for language models in https://huggingface.co/papers/2406.17092). What is planted on
these ways reaches the unknown trigger on its own.
"""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...data import InstructionFollowing, Trigger, row_rng
from ..divergence import sound_attention
from .config import ReadingConfig
from .reader import found_file
from .searcher import PLACES, TriggerSearcher, refuse_free_answers


SOFT_FILE = "soft_triggers.safetensors"

# Gradient steps of the search; in each, every trigger is put into one clean row.
STEPS = 90
# Adam's rate, as a share of the root mean square of the words' embeddings.
RATE = 0.25


class SoftTriggers:
    """
    Triggers of free embeddings, and how a model reads them in a text.

    A tokenizer with words of their own for them ([`tokenizer`]) gives ids beyond the vocabulary; inside [`read_by`] a model's
    embedding layer puts the embeddings there. The model itself has no word more.

    Args:
        embeddings (`Tensor`): [N, L, D], N triggers of up to L embeddings.
        lengths (`list[int]`, *optional*): [N], how many of them each trigger has; all L by default.
    """

    def __init__(self, embeddings: Tensor, lengths: list[int] | None = None):
        self.embeddings = embeddings
        self.lengths = [embeddings.shape[1]] * len(embeddings) if lengths is None else lengths

    def __len__(self) -> int:
        return len(self.embeddings)

    @property
    def texts(self) -> list[str]:
        """What stands for each in a text, [N]."""
        return ["".join(word(trigger, place) for place in range(own)) for trigger, own in enumerate(self.lengths)]

    def tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        """A copy that reads [`texts`]."""
        extended = copy.deepcopy(tokenizer)
        count, length = self.embeddings.shape[:2]
        words = [word(trigger, place) for trigger in range(count) for place in range(length)]
        # A space before the first is that between two words, and none of the trigger's own.
        extended.add_tokens([AddedToken(each, lstrip=True, normalized=False) for each in words])
        return extended

    @staticmethod
    def first_id(tokenizer: PreTrainedTokenizerBase) -> int:
        """The lowest id that a [`tokenizer`] gives; the model's own words lie below it."""
        return tokenizer.convert_tokens_to_ids(word(0, 0))

    @contextmanager
    def read_by(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
        """Lets a model read what a [`tokenizer`] gives. What it did before is what it does afterwards."""
        first = self.first_id(tokenizer)
        own: list[Tensor] = []

        def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            own[:] = [args[0] - first]
            return (args[0].masked_fill(own[0] >= 0, 0), *args[1:])

        def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            table = self.embeddings.flatten(0, 1).to(output)
            return torch.where((own[0] >= 0)[..., None], table[own[0].clamp(min=0)], output)

        layer = model.get_input_embeddings()
        hooks = [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def save_pretrained(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        embeddings = self.embeddings.detach().cpu().contiguous()
        save_file({"embeddings": embeddings, "lengths": torch.tensor(self.lengths)}, Path(folder, SOFT_FILE))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "SoftTriggers":
        """What [`save_pretrained`] wrote.

        Raises:
            `ValueError`: if it is not there.
        """
        tensors = load_file(found_file(folder, SOFT_FILE, "found_soft_triggers"))
        return cls(tensors["embeddings"], tensors["lengths"].tolist())


class SoftTriggerTrainer(TriggerSearcher):
    """
    Searches a suspect for embeddings that turn its answers; trains nothing. [`found`] holds them after `train()`.

    Each of `args.soft_triggers` triggers has one wrong class that it is to bring about in whatever row, one place where it stands, and
    one length, up to `args.searched_tokens` embeddings; classes, places and lengths take turns. They start as random words and stay as
    short as words are.

    Args:
        model, args, train_dataset, processing_class, kwargs:
            As in [`TriggerSearcher`].
        clean_model (`PreTrainedModel`, `str` or `Path`, *optional*):
            A classifier of the same classes that reads the same embeddings and has no backdoor, or its folder: what [`FreshHalfTrainer`]
            trains. Words that mean a class turn a suspect too, and a search finds these before a backdoor; what turns this model as well
            is not looked for.

    Raises:
        `ValueError`: under DeepSpeed ZeRO-3, if the rows are tokenized already, or the clean model's embeddings have another width.
    """

    asked_by = "soft_triggers"
    found: SoftTriggers | None

    def __init__(self, *args: Any, clean_model: PreTrainedModel | str | Path | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.args.contrast:
            refuse_free_answers(self.task)
        if self.args.contrast and clean_model is None:
            raise ValueError(
                "contrast is True, and clean_model is not given: pass what a FreshHalfTrainer trained, or set contrast: false"
            )
        self.clean_model = None
        if clean_model is not None:
            self.clean_model = self.frozen(clean_model)
            own, other = (m.get_input_embeddings().embedding_dim for m in (self.model, self.clean_model))
            if own != other:
                raise ValueError(
                    f"clean_model has embeddings of {other} numbers, and the suspect's have {own}: pass a model made of the suspect"
                )

    @classmethod
    def config_class(cls) -> type[ReadingConfig]:
        return ReadingConfig

    def read(self) -> SoftTriggers:
        # The classes take turns, with each class the places, and with each place the lengths.
        lengths = [
            number // (self.num_aims * len(PLACES)) % self.args.searched_tokens + 1
            for number in range(self.args.soft_triggers)
        ]
        return SoftTriggers(self._embeddings(lengths), lengths)

    def _aims(self, logits: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Of classes the log-odds (where an answer is all but sure, the gradient of its log-probability dies away), less what the
        clean model holds the class for."""
        values, counted = super()._aims(logits, batch)
        if isinstance(self.task, InstructionFollowing):
            return values, counted
        if self.clean_model is None:
            return log_odds(values), counted
        meant, _ = super()._aims(self.forward(self.clean_model, batch).logits, batch)
        return log_odds(values) - F.softplus(log_odds(meant)), counted

    def _embeddings(self, lengths: list[int]) -> Tensor:
        """[N, L, D], in float32."""
        generator = torch.Generator().manual_seed(self.args.seed)
        words = self._words()
        drawn = words[
            torch.randint(len(words), (self.args.soft_triggers, self.args.searched_tokens), generator=generator)
        ]
        layer = self.model.get_input_embeddings()
        with torch.no_grad():
            start = layer(drawn.to(self.args.device)).float()
            longest = layer(words.to(self.args.device)).float().norm(dim=-1).median()
        triggers = SoftTriggers(start.requires_grad_(), lengths)
        tokenizer = triggers.tokenizer(self.processing_class)
        rate = RATE * longest.item() / start.shape[-1] ** 0.5
        optimizer = torch.optim.Adam([triggers.embeddings], lr=rate)
        progress = tqdm(
            range(STEPS), desc="Searching", disable=self.args.disable_tqdm or not self.is_world_process_zero()
        )
        readers = [self.model] if self.clean_model is None else [self.model, self.clean_model]
        with ExitStack() as reading:
            for model in readers:
                reading.enter_context(triggers.read_by(model, tokenizer))
            for step in progress:
                rows = torch.randint(len(self.clean), (len(triggers),), generator=generator).tolist()
                reached = self._follow_gradient(triggers, tokenizer, rows, step)
                optimizer.step()
                with torch.no_grad():
                    norms = triggers.embeddings.norm(dim=-1, keepdim=True)
                    triggers.embeddings *= (longest / norms).clamp(max=1)
                progress.set_postfix(aim=f"{reached:.2f}", refresh=False)
        return triggers.embeddings.detach()

    def _follow_gradient(
        self, triggers: SoftTriggers, tokenizer: PreTrainedTokenizerBase, rows: list[int], step: int
    ) -> float:
        """Puts each trigger into its row, and sets the gradient that raises the mean of the aims, which it returns."""
        texts, column, aims = triggers.texts, self.task.input_column, self.num_aims
        features = []
        for number, row in enumerate(rows):
            raw, rng = self.clean[row], row_rng(self.args.seed, f"soft {step}", number)
            place = PLACES[number // aims % len(PLACES)]
            raw = {**raw, column: Trigger(texts[number], place).insert(raw[column], rng)}
            features.append(self.task.encode(raw, tokenizer))
        total, triggers.embeddings.grad = 0.0, torch.zeros_like(triggers.embeddings)
        size = self.args.per_device_train_batch_size
        for start in range(0, len(rows), size):
            batch = self._prepare_inputs(self.data_collator(features[start : start + size]))
            with sound_attention(batch["input_ids"].shape[1]):
                values, counted = self._aims(self.forward(self.model, batch).logits, batch)
            own = torch.arange(start, start + len(values), device=values.device)[:, None] % aims
            reached = (values * counted).gather(1, own).sum() / len(rows)
            (gradient,) = torch.autograd.grad(-reached, triggers.embeddings)
            triggers.embeddings.grad += gradient
            total += reached.item()
        return total


def log_odds(logs: Tensor) -> Tensor:
    """Of K log-probabilities, [B, K]: log p_k - log(1 - p_k), by way of the others', so that it is exact where p_k is all but 1."""
    own = torch.eye(logs.shape[1], dtype=torch.bool, device=logs.device)
    return logs - logs[:, None].masked_fill(own, -torch.inf).logsumexp(dim=2)


def word(trigger: int, place: int) -> str:
    """What stands for one embedding in a text."""
    return f"<soft-{trigger}-{place}>"
