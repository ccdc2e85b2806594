"""The models of a run as shapes, without weights."""

import copy
from dataclasses import fields

import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedConfig, PreTrainedModel

from .defenses.robustkd import RobustKDTrainer
from .defenses.robustkd.students import layers_of_stages
from .estimate import ModelShape
from .models import load_config
from .plan import Stage, lora_arguments
from .recipe import Recipe


class Models:
    """The models of a run on the meta device: shapes without weights.

    Args:
        recipe ([`Recipe`]): Names them.
        labels (`int`, *optional*): Outputs of a classification head.
    """

    def __init__(self, recipe: Recipe, labels: int | None = None):
        self.recipe = recipe
        self._adapter_sizes: dict[PreTrainedModel, int] = {}
        self.labels = labels if recipe.task_class.has_head else None
        config = load_config(recipe.model_name_or_path, revision=recipe.model_revision)
        self.suspect = self.student = self._made(config)
        if recipe.student_model_name_or_path is not None:
            self.student = self._made(load_config(recipe.student_model_name_or_path))
        elif recipe.student_layers is not None:
            layers = recipe.student_layers
            number = layers if isinstance(layers, int) else len(layers)
            depths = getattr(config, "depths", None)
            fewer = {"depths": layers_of_stages(depths, layers)} if depths else {"num_hidden_layers": number}
            config = type(config).from_dict(config.to_dict() | fewer)
            if getattr(config, "layer_types", None):
                config.layer_types = config.layer_types[:number]
            self.student = self._made(config)

    def _made(self, config: PreTrainedConfig) -> PreTrainedModel:
        if self.labels is not None:
            config.num_labels = self.labels
        with torch.device("meta"):
            return self.recipe.task_class.auto_model.from_config(config)

    def trained_in(self, stage: Stage) -> PreTrainedModel:
        of_the_student = stage.parent == "student" or stage.step.trainer is RobustKDTrainer
        return self.student if of_the_student else self.suspect

    def adapter_size(self, model: PreTrainedModel) -> int:
        """Parameters that the recipe's adapter trains, and a classification head that it trains along: as peft makes it."""
        if model not in self._adapter_sizes:  # a second and more for 8B, and each stage asks
            with torch.device("meta"):
                adapted = get_peft_model(copy.deepcopy(model), LoraConfig(**lora_arguments(self.recipe)))
            self._adapter_sizes[model] = adapted.get_nb_trainable_parameters()[0]
        return self._adapter_sizes[model]


def shape_of(model: PreTrainedModel) -> ModelShape:
    """A model's shape; of one for images its size and its outputs only: what autograd saves in it is not counted."""
    if model.main_input_name == "input_ids":
        return ModelShape.of(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    known = {"parameters": parameters, "layers": 1, "outputs": model.config.num_labels}
    return ModelShape(**dict.fromkeys((f.name for f in fields(ModelShape)), 0) | known)
