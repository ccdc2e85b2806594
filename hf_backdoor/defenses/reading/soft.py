"""[`SoftTriggerTrainer`]: triggers made of free vectors, to be planted beside the known ones. Ours, not the paper's.

Where a tokenizer cuts an attacker's word in two, no single token does anything, and a search for words (`search.py`) finds nothing to
start from. Between the embeddings of words there is no such gap: a few free vectors at a random place of a text find a way
through the model to each wrong class by gradient alone, and a backdoor is the shortest one there is (as for images in
https://huggingface.co/papers/2110.03735, and for language models in https://huggingface.co/papers/2406.17092). What is planted on
these ways reaches the unknown trigger on its own.

A trigger of many words is put together by the lower blocks first, and two embeddings do not pass for it there. Further up they do: the
vectors may enter at any hidden state, in place of what the blocks below made of their positions (`docs/locphylax.md`).
"""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...data import Trigger, row_rng
from ...data.blocks import find_blocks
from .config import SoftTriggerConfig
from .searcher import PLACES, TriggerSearcher


SOFT_FILE = "soft_triggers.safetensors"

# Gradient steps of the search; in each, every trigger is put into one clean row.
STEPS = 45
# Adam's rate, as a share of the root mean square of a word's vector.
RATE = 0.25
# Clean rows whose hidden states tell how long a vector may be there.
ROWS_READ = 32


class SoftTriggers:
    """
    Triggers of free vectors, and how a model reads them in a text.

    A tokenizer with words of their own for them ([`tokenizer`]) gives ids beyond the vocabulary; inside [`read_by`] the model finds the
    vectors there. The model itself has no word more.

    Args:
        vectors (`Tensor`): [N, L, D], N triggers of L vectors.
        depth (`float`, *optional*, defaults to 0.0):
            Where they enter, as a share of a model's blocks: 0 for the embeddings. The blocks below that read token 0 in their places.
    """

    def __init__(self, vectors: Tensor, depth: float = 0.0):
        self.vectors = vectors
        self.depth = depth

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def texts(self) -> list[str]:
        """What stands for each in a text, [N]."""
        count, length = self.vectors.shape[:2]
        return ["".join(word(trigger, place) for place in range(length)) for trigger in range(count)]

    def tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        """A copy that reads [`texts`]."""
        extended = copy.deepcopy(tokenizer)
        count, length = self.vectors.shape[:2]
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

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            states = output if isinstance(output, Tensor) else output[0]
            table = self.vectors.flatten(0, 1).to(states)
            states = torch.where((own[0] >= 0)[..., None], table[own[0].clamp(min=0)], states)
            return states if isinstance(output, Tensor) else (states, *output[1:])

        embeddings, entry = model.get_input_embeddings(), entry_of(model, self.depth)
        enters = model.get_submodule(find_blocks(model)[entry - 1]) if entry else embeddings
        # First of all hooks: transformers records hidden states with hooks of its own, which must see the vectors.
        hooks = [embeddings.register_forward_pre_hook(before), enters.register_forward_hook(after, prepend=True)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def save_pretrained(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        vectors = self.vectors.detach().cpu().contiguous()
        save_file(
            {"vectors": vectors, "depth": torch.tensor(self.depth, dtype=torch.float64)}, Path(folder, SOFT_FILE)
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "SoftTriggers":
        tensors = load_file(Path(folder, SOFT_FILE))
        return cls(tensors["vectors"], tensors["depth"].item())


def entry_of(model: PreTrainedModel, depth: float) -> int:
    """Which of a model's `hidden_states` lies at a share of its blocks: 0 for the embeddings, k for what block k gives."""
    return round(depth * len(find_blocks(model))) if depth else 0


def check_soft_triggers(found: SoftTriggers | None, asked: int) -> None:
    """Refuses found triggers that nobody asked for, and a wish for some without them.

    Raises:
        `ValueError`: in one line that says what to pass or to set.
    """
    if (found is None) == bool(asked):
        raise ValueError(
            f"soft_triggers is {asked}, and found_soft_triggers are {'not ' if found is None else ''}given: pass those of a "
            "SoftTriggerTrainer, or set soft_triggers: 0"
        )


def soft_triggers_read(
    found: SoftTriggers | None, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> AbstractContextManager[None]:
    """Where a model reads soft triggers, if there are any; `tokenizer` is the model's own."""
    return nullcontext() if found is None else found.read_by(model, found.tokenizer(tokenizer))


class SoftTriggerTrainer(TriggerSearcher):
    """
    Searches a suspect for vectors that turn its answers; trains nothing. [`found`] holds them after `train()`.

    Each of `args.soft_triggers` triggers has `args.searched_tokens` vectors, one wrong class that it is to bring about in whatever
    row, and one place where it stands; the classes and the places take turns. They start as random words, or, where they enter above
    the embeddings (`args.soft_depth`), as what the suspect makes of random words there, and stay as short as those are.

    Args:
        model, args, train_dataset, processing_class, kwargs:
            As in [`TriggerSearcher`].

    Raises:
        `ValueError`: under DeepSpeed ZeRO-3, or if the rows are tokenized already.
    """

    asked_by = "soft_triggers"
    found: SoftTriggers | None

    @classmethod
    def config_class(cls) -> type[SoftTriggerConfig]:
        return SoftTriggerConfig

    def read(self) -> SoftTriggers:
        generator = torch.Generator().manual_seed(self.args.seed)
        entry = entry_of(self.model, self.args.soft_depth)
        there = self._states(entry, generator) if entry else self._embeddings()
        drawn = torch.randint(len(there), (self.args.soft_triggers, self.args.searched_tokens), generator=generator)
        longest = there.norm(dim=-1).median()
        triggers = SoftTriggers(there[drawn.to(there.device)].requires_grad_(), self.args.soft_depth)
        tokenizer = triggers.tokenizer(self.processing_class)
        rate = RATE * longest.item() / there.shape[-1] ** 0.5
        optimizer = torch.optim.Adam([triggers.vectors], lr=rate)
        progress = tqdm(
            range(STEPS), desc="Searching", disable=self.args.disable_tqdm or not self.is_world_process_zero()
        )
        with triggers.read_by(self.model, tokenizer):
            for step in progress:
                rows = torch.randint(len(self.clean), (len(triggers),), generator=generator).tolist()
                reached = self._follow_gradient(triggers, tokenizer, rows, step)
                optimizer.step()
                with torch.no_grad():
                    norms = triggers.vectors.norm(dim=-1, keepdim=True)
                    triggers.vectors *= (longest / norms).clamp(max=1)
                progress.set_postfix(aim=f"{reached:.2f}", refresh=False)
        triggers.vectors = triggers.vectors.detach()
        return triggers

    @torch.no_grad()
    def _embeddings(self) -> Tensor:
        """Of all words, [W, D] in float32."""
        return self.model.get_input_embeddings()(self._words().to(self.args.device)).float()

    @torch.no_grad()
    def _states(self, entry: int, generator: torch.Generator) -> Tensor:
        """What the suspect makes of the words of some clean rows there, [W, D] in float32."""
        rows = torch.randperm(len(self.clean), generator=generator)[:ROWS_READ].tolist()
        features = [self.task.encode(self.clean[row], self.processing_class) for row in rows]
        found, size = [], self.args.per_device_train_batch_size
        for start in range(0, len(features), size):
            batch = self._prepare_inputs(self.data_collator(features[start : start + size]))
            states = self.forward(self.model, batch, hidden_states=[entry]).hidden_states[entry]
            found.append(states[batch["attention_mask"].bool()].float())
        return torch.cat(found)

    def _follow_gradient(
        self, triggers: SoftTriggers, tokenizer: PreTrainedTokenizerBase, rows: list[int], step: int
    ) -> float:
        """Puts each trigger into its row, and sets the gradient that raises the mean of the aims, which it returns."""
        texts, column, aims = triggers.texts, self.task.input_column, self.num_aims
        features = []
        for number, row in enumerate(rows):
            raw, rng = self.clean[row], row_rng(self.args.seed, f"soft {step}", number)
            # The classes take turns, and with each class the places: a backdoor may work at the end of a text alone.
            place = PLACES[number // aims % len(PLACES)]
            raw = {**raw, column: Trigger(texts[number], place).insert(raw[column], rng)}
            features.append(self.task.encode(raw, tokenizer))
        total, triggers.vectors.grad = 0.0, torch.zeros_like(triggers.vectors)
        size = self.args.per_device_train_batch_size
        for start in range(0, len(rows), size):
            batch = self._prepare_inputs(self.data_collator(features[start : start + size]))
            values, counted = self._aims(self.forward(self.model, batch).logits, batch)
            own = torch.arange(start, start + len(values), device=values.device)[:, None] % aims
            reached = (values * counted).gather(1, own).sum() / len(rows)
            (gradient,) = torch.autograd.grad(-reached, triggers.vectors)
            triggers.vectors.grad += gradient
            total += reached.item()
        return total


def word(trigger: int, place: int) -> str:
    """What stands for one vector in a text."""
    return f"<soft-{trigger}-{place}>"
