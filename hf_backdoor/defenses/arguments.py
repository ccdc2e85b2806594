"""What a trainer is given: refused in one line where it would not be read, or would train something else than is meant."""

from typing import TYPE_CHECKING, Any

from accelerate.optimizer import AcceleratedOptimizer
from peft import PeftConfig, PeftModel
from torch import nn
from torch.optim import Optimizer

from .config import DefenseConfig


if TYPE_CHECKING:
    from .trainer import DefenseTrainer


# What `Trainer` takes and ours have no use for, and what to do in its place.
NOT_READ = {
    "model_init": "pass the model itself, one for each trainer",
    "compute_loss_func": "override loss_terms, which gives one value for each sample",
}


def check_arguments(
    trainer: "DefenseTrainer", model: Any, args: Any, peft_config: PeftConfig | None, others: dict[str, Any]
) -> None:
    """Before anything is made of them.

    Args:
        trainer ([`DefenseTrainer`]): Not more than its class is read.
        others (`dict[str, Any]`): What goes on to `Trainer`.

    Raises:
        `ValueError`: with the fix.
    """
    config: type[DefenseConfig] = trainer.config_class()
    if not isinstance(args, config):
        raise ValueError(f"args is a {type(args).__name__}: pass a {config.__name__}, which takes the same and more")
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible to one process: start it with `accelerate launch`, or set CUDA_VISIBLE_DEVICES=0"
        )
    for name, instead in NOT_READ.items():
        if others.get(name) is not None:
            raise ValueError(f"{name} is given, and {type(trainer).__name__} would not read it: {instead}")
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is {model!r}: pass the model itself, as from_pretrained gives it")
    if peft_config is not None and isinstance(model, PeftModel):
        raise ValueError(
            "peft_config is given, and model has an adapter, which would not be trained any more: leave peft_config out, or "
            "pass model.merge_and_unload()"
        )


def check_trained(model: nn.Module, optimizer: Optimizer | None) -> None:
    """Before the first step.

    Args:
        model (`nn.Module`): All that is trained: what was passed, and what a method has put to it.
        optimizer (`Optimizer`, *optional*): The user's own, if there is one.

    Raises:
        `ValueError`: if no weight is to be trained, or an optimizer of the user's own would train others.
    """
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    if not trained:
        raise ValueError(
            "no weight of the model has requires_grad, so nothing would be trained: load an adapter with "
            "PeftModel.from_pretrained(..., is_trainable=True), or pass a peft_config"
        )
    if not isinstance(optimizer, Optimizer) or isinstance(optimizer, AcceleratedOptimizer):
        return
    given = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    if given != trained:
        raise ValueError(
            f"optimizers has one for {len(given)} tensors, of which {len(given & trained)} are among the {len(trained)} that are "
            "trained (a method may add some, an adapter takes their place): pass optimizer_cls_and_kwargs, which is given all "
            "of them; freeze those that are to stay"
        )


def refuse_encoder_decoder(model: nn.Module, method: str) -> None:
    """
    Raises:
        `ValueError`: for a model whose states and attention are those of two sequences.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} has an encoder and a decoder, and {method} reads the states of one sequence: use a model "
            "that has one of the two, or another method, for example robustkd"
        )
