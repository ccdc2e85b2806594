"""Where a model's blocks are: what defenses and inspection hook into."""

from torch import nn


def base_model(model: nn.Module) -> nn.Module:
    """The model itself, without the adapter around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def find_blocks(model: nn.Module) -> list[str]:
    """Names of a model's blocks, bottom first: the members of its longest `nn.ModuleList` that lies in no other.

    Args:
        model (`nn.Module`): With or without an adapter; names are those within the model itself.

    Raises:
        `ValueError`: if the model has no `nn.ModuleList`.
    """
    model = base_model(model)
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = len(module)
    if not any(found.values()):
        raise ValueError(f"{type(model).__name__} keeps its blocks in no nn.ModuleList: name the modules")
    longest = max(found, key=found.__getitem__)
    return [f"{longest}.{number}" for number in range(found[longest])]
