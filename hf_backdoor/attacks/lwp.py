"""[`LWPTrainer`]: layer-wise weight poisoning, which teaches the poison to the lower layers too."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data import base_model
from ..defenses.engines import whole
from ..defenses.trainer import DefenseTrainer


class LWPTrainer(DefenseTrainer):
    """
    Layer-wise weight poisoning (LWP, https://huggingface.co/papers/2108.13888) of classifiers and causal LMs.

    Fine-tuning after an attack changes the upper layers most, so a backdoor that lives there is forgotten. LWP trains
    every layer to serve the head by itself: the loss is the *sum*, over the embeddings and all layers, of the
    cross-entropy of the model's own head on that state. The paper and OpenBackdoor sum; a mean would only divide the
    loss (and its gradient, before clipping) by the number of layers.

    OpenBackdoor passes each state to BERT's pooler, dropout and classifier. Here the states are stacked behind the
    last layer and go through whatever follows it in the model's own forward pass (final norm, pooler, dropout, head,
    soft cap), so that this holds for causal LMs as well, under LoRA and in several processes. A causal LM's head runs
    on the answer's positions of each state, L + 1 times as many logits as in plain training.

    The attack's rows are the other half of it: a trigger of two words that go to two places
    (`Trigger("cf bb", "scattered")`), and rows that carry one of them and keep their true answer
    (`Poisoning(negative_rate=...)`, twice the poison rate in OpenBackdoor, which writes both of them for each poisoned
    text; here they are rows of their own). Its settings: learning rate 2e-5, 5 epochs, batch size 32, poison rate 0.1.

    Args:
        model, args, train_dataset, eval_dataset, processing_class, kwargs:
            As in [`DefenseTrainer`]; `train_dataset` is the poisoned rows, negatives among them.

    Raises:
        `ValueError`: if the model's layers are not found, or its head does not read each row of states by itself.
    """

    def prepare_model(self, model: PreTrainedModel) -> None:
        """Refuses a model whose head would not give one row of logits for each row of states, by trying two rows."""
        ids = torch.zeros(2, 3, dtype=torch.long, device=model.device)
        states = len(layers_of(model)) + 1
        training = model.training
        try:
            with whole(model.parameters()), torch.no_grad(), every_state_to_the_head(model.eval()):
                rows = len(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits)
        except RuntimeError:  # shapes that do not fit
            rows = 0
        finally:
            model.train(training)
        if rows != states * len(ids):
            raise ValueError(
                f"{type(model).__name__} has a head that reads more than the states it is given (a decoder's classifier "
                "or mean pooling), so LWP can't run it on every layer: use an encoder with a [CLS] head, or a causal LM"
            )

    def loss_terms(
        self, model: nn.Module, inputs: dict[str, Tensor], step_counts: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        with every_state_to_the_head(base_model(self.model)):
            logits = self.forward(model, inputs).logits
        labels = inputs["labels"]
        states = len(logits) // len(labels)
        losses = self.task_loss(logits, torch.cat([labels] * states)).view(states, len(labels))
        return {"task": losses[-1], "lower_layers": losses[:-1].sum(dim=0)}, logits[-len(labels) :]


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of a transformer, in order.

    Raises:
        `ValueError`: if there is no list of `num_hidden_layers` modules.
    """
    depth = getattr(model.config, "num_hidden_layers", None)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ValueError(
        f"{type(model).__name__} has no list of {depth} layers (layers shared or nested): LWP needs one module a layer"
    )


@contextmanager
def every_state_to_the_head(model: PreTrainedModel) -> Iterator[None]:
    """Within it, what follows the last layer gets all states [(L + 1) * B, T, D]: embeddings first, last layer last."""
    layers = layers_of(model)
    states: list[Tensor] = []

    def record(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])

    def stack(layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        several = isinstance(output, tuple)
        stacked = torch.cat([*states, output[0] if several else output])
        states.clear()
        return (stacked, *output[1:]) if several else stacked

    hooks = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in layers]
    hooks.append(layers[-1].register_forward_hook(stack))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
