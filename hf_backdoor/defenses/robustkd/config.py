"""Arguments of RobustKD: of the mask, and of the distillation."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..config import DefenseConfig, choose
from ..reading import ReadingConfig


FORMS = ("blend", "additive")
SHAPES = ("channel", "position", "readout")
AXES = ("tokens", "all")
PLACES = ("normed", "raw")
FEATURE_LOSSES = ("mse", "margin")


@dataclass
class FeatureMaskConfig(DefenseConfig):
    r"""
    Configuration of [`FeatureMaskTrainer`].

    Args:
        > Parameters that control the mask

        mask_layers (`list[str]`, *optional*):
            The teacher's layers whose features are masked: numbers of its blocks, from 0 (negative ones count from the
            top), or names of modules. By default three blocks, evenly spread, the last one among them.
        mask_form (`str`, *optional*, defaults to `"blend"`):
            `"blend"`, (1 - m) * F + m * p, or the paper's `"additive"`, F + m * p.
        mask_shape (`str`, *optional*, defaults to `"channel"`):
            What has a value of its own: each `"channel"`, each `"position"` and channel, or each channel at the
            `"readout"` position only.
        mask_threshold (`float`, *optional*, defaults to 0.2):
            tau, the largest value of m = tau * sigmoid(w). The paper's files show 0.05, 0.2 and 0.9.
        mask_positions (`int`, *optional*, defaults to 128):
            Tokens that a mask of shape `"position"` reaches; later ones are left as they are.

        > Parameters that control the fitting

        variance_weight (`float`, *optional*, defaults to 1.0):
            lambda, the weight of the features' variance. 0 leaves it out.
        variance_axes (`str`, *optional*, defaults to `"tokens"`):
            The variance of each channel over a sample's `"tokens"`, averaged over channels; or over `"all"` (token,
            channel) entries of a sample.
        variance_place (`str`, *optional*, defaults to `"normed"`):
            Of the feature after a layer norm without parameters (`"normed"`), or as it is (`"raw"`).
        mask_patience (`int`, *optional*):
            Evaluations without a better clean loss after which fitting stops; only with an `eval_strategy`.

    NOTE: `learning_rate` is 0.01 by default, for the mask alone is trained.
    """

    learning_rate: float = field(default=0.01, metadata={"help": "The initial learning rate."})
    mask_layers: list[str] | None = field(
        default=None, metadata={"help": "Teacher's layers that are masked: block numbers or module names."}
    )
    mask_form: str = field(default="blend", metadata={"help": "blend, (1 - m) F + m p, or additive, F + m p."})
    mask_shape: str = field(default="channel", metadata={"help": "channel, position or readout."})
    mask_threshold: float = field(default=0.2, metadata={"help": "tau, the largest value of the mask."})
    mask_positions: int = field(default=128, metadata={"help": "Tokens that a position-wise mask reaches."})
    variance_weight: float = field(default=1.0, metadata={"help": "lambda, weight of the features' variance."})
    variance_axes: str = field(default="tokens", metadata={"help": "Variance over tokens, or over all entries."})
    variance_place: str = field(default="normed", metadata={"help": "Variance of the normed or the raw feature."})
    mask_patience: int | None = field(
        default=None, metadata={"help": "Evaluations without a better clean loss that end the fitting."}
    )

    def __post_init__(self) -> None:
        self.mask_layers = texts(self.mask_layers)
        super().__post_init__()

    def check(self) -> None:
        choose("mask_form", self.mask_form, FORMS)
        choose("mask_shape", self.mask_shape, SHAPES)
        choose("variance_axes", self.variance_axes, AXES)
        choose("variance_place", self.variance_place, PLACES)
        if not 0 < self.mask_threshold <= 1:
            raise ValueError(f"mask_threshold is {self.mask_threshold}: choose a number above 0 and up to 1")
        self.refuse_negative("variance_weight")
        if self.mask_positions < 1:
            raise ValueError(f"mask_positions is {self.mask_positions}: choose 1 or more")
        if (self.variance_axes, self.variance_place) == ("all", "normed"):
            raise ValueError(
                "variance_axes is 'all' and variance_place is 'normed': the variance over all entries of a normed "
                "feature is 1 whatever the mask does; set variance_place to 'raw' or variance_axes to 'tokens'"
            )
        if self.mask_patience is not None:
            if self.mask_patience < 1:
                raise ValueError(f"mask_patience is {self.mask_patience}: choose 1 or more, or null")
            self.metric_for_best_model = self.metric_for_best_model or "loss"
        super().check()


@dataclass
class RobustKDConfig(ReadingConfig, FeatureMaskConfig):
    r"""
    Configuration of [`RobustKDTrainer`], and of both stages in a recipe.

    Args:
        > Parameters that control the layers

        teacher_feature_layers (`list[str]`, *optional*):
            The teacher's layers that the student learns from, bottom first: block numbers or module names. By default
            the mask's; without a mask three blocks, evenly spread.
        student_feature_layers (`list[str]`, *optional*):
            The student's layers that learn from them, one for each. By default its blocks at the same relative depth.

        > Parameters that control the losses

        feature_weight (`float`, *optional*, defaults to 1.0):
            Weight of the feature loss. The last layer counts fully, the one before it half, and so on. 0 leaves it out.
        feature_loss (`str`, *optional*, defaults to `"mse"`):
            `"mse"`, between the connected student feature and the teacher's normed one, or `"margin"`, the partial
            distance of the paper's distiller (https://huggingface.co/papers/1904.01866), for images.
        logit_weight (`float`, *optional*, defaults to 0.0):
            Weight of the divergence between the masked teacher's logits and the student's. 0 leaves it out; with no features and no
            own answers either there would be no teacher, which is refused.
        temperature (`float`, *optional*, defaults to 2.0):
            Of that divergence.

        > Parameters that control what is read off the teacher (ours)

        soft_triggers, searched_tokens, own_answers:
            As in [`ReadingConfig`]. With soft triggers the student also learns from a copy of each row that has one in it,
            which the teacher does not see. 0 leaves them out, as the paper does.

        > Parameters of the mask, see [`FeatureMaskConfig`]
    """

    learning_rate: float = field(default=5e-5, metadata={"help": "The initial learning rate."})
    teacher_feature_layers: list[str] | None = field(
        default=None, metadata={"help": "Teacher's layers learnt from: block numbers or module names."}
    )
    student_feature_layers: list[str] | None = field(
        default=None, metadata={"help": "Student's layers that learn, one for each of the teacher's."}
    )
    feature_weight: float = field(default=1.0, metadata={"help": "Weight of the feature loss."})
    feature_loss: str = field(default="mse", metadata={"help": "mse, or margin for images."})
    logit_weight: float = field(default=0.0, metadata={"help": "Weight of the logits' divergence."})
    temperature: float = field(default=2.0, metadata={"help": "Temperature of the logits' divergence."})

    @property
    def rows_factor(self) -> int:
        return 1 + bool(self.soft_triggers)

    def __post_init__(self) -> None:
        self.teacher_feature_layers = texts(self.teacher_feature_layers)
        self.student_feature_layers = texts(self.student_feature_layers)
        super().__post_init__()

    def check(self) -> None:
        choose("feature_loss", self.feature_loss, FEATURE_LOSSES)
        self.refuse_negative("feature_weight", "logit_weight")
        if not (self.feature_weight or self.logit_weight or self.own_answers):
            raise ValueError(
                "feature_weight, logit_weight and own_answers are all 0: there is nothing to learn from the teacher; raise one, or train "
                "the student by itself with DefenseTrainer (in a recipe the control student_alone)"
            )
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}: choose a number above 0, for example 2")
        super().check()


def texts(layers: Sequence[str | int] | None) -> Sequence[str] | None:
    """Block numbers may come as numbers."""
    if not isinstance(layers, list | tuple):
        return layers
    return [str(layer) if isinstance(layer, int) else layer for layer in layers]
