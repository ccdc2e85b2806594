"""Arguments of NT-ML."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from ..config import DefenseConfig, choose


SoftLabels = Literal["renormalised", "negative", "all_classes"]
Direction = Literal["crossed", "swapped", "both"]
Product = Literal["auto", "target", "non_target"]


@dataclass
class NTMLConfig(DefenseConfig):
    r"""
    Configuration of [`NonTargetTrainer`], [`NTMLTrainer`] and [`RelabellingTrainer`].

    Args:
        > Parameters that control every stage

        temperature (`float`, *optional*, defaults to 1.0):
            tau of every softmax in a distillation loss. Raise it for non-target training where the target network is so
            sure of the given labels that nothing can be read in the rest.

        > Parameters that control non-target training

        soft_labels (`str`, *optional*, defaults to `"renormalised"`):
            What the second network learns of the target network's probabilities: `"renormalised"` leaves each sample's
            given label out of both networks' softmax, `"negative"` out of the target network's alone, so that the second
            learns to deny it, and `"all_classes"` keeps it (plain distillation, a control).

        sharpening (`float`, *optional*, defaults to 1.0):
            Ours: what the target network's logits are multiplied by for the soft labels. An early target network is
            unsure of all the other classes alike, and a network that learns so much of a triggered row falls back on the
            given one; 2 tells it more plainly which of the others it is.

        > Parameters that control mutual learning

        mutual_direction (`str`, *optional*, defaults to `"crossed"`):
            `"crossed"`: the non-target network learns the target network's predictions, the target network the other's
            features. `"swapped"`: the other way round. `"both"`: each learns both.
        feature_weight (`float`, *optional*, defaults to 1.0):
            alpha, the weight of the feature loss: by the paper, more of it removes more and costs accuracy.
        feature_layers (`list[int]`, *optional*, defaults to `[-1]`):
            Entries of `hidden_states` that the feature loss compares.
        product (`str`, *optional*, defaults to `"auto"`):
            Which network is the result: `"target"`, `"non_target"`, or `"auto"`. That is the non-target network, unless
            there are held-out rows without *and* with a trigger of the defender's own (`known_trigger`, or an
            `eval_dataset` of several sets): then the network with the higher mean accuracy over these sets. Accuracy
            without a trigger alone would choose the target network, backdoor and all.
        known_trigger (`str`, *optional*):
            A text (for images `patch`, `corners` or `warp`) that the defender planted in some suspect rows, with a label
            of its own choice, before the target network was trained. Held-out rows are measured with it as well, their
            labels as they are.

        > Parameters that control the training on corrected labels (ours)

        relabel_below (`float`, *optional*, defaults to 0.0):
            After mutual learning, a fresh network is trained on the suspect rows, those that lie relabelled or left out: in the
            class whose rows fall apart in the target network's states, and there where the product of mutual learning contradicts a
            label. Away from the group that stands apart it is changed below this probability; see [`RelabellingTrainer`]. A second
            network is trained likewise, by what the first one says. 0 leaves both stages out: the product is the result then, as in
            the paper.
        look_alikes (`bool`, *optional*, defaults to `False`):
            Whether rows of that class which look like those that stand apart count as such: a row that carries the trigger and is
            labelled rightly does not stand apart, and teaches the trigger all the same. For texts, and not under DeepSpeed ZeRO-3.
    """

    temperature: float = field(default=1.0, metadata={"help": "tau of every softmax in a distillation loss."})
    soft_labels: str = field(
        default="renormalised",
        metadata={"help": "What non-target training learns: renormalised, negative or all_classes."},
    )
    sharpening: float = field(
        default=1.0, metadata={"help": "What the target network's logits are multiplied by for the soft labels."}
    )
    mutual_direction: str = field(
        default="crossed", metadata={"help": "Who learns what from whom: crossed, swapped or both."}
    )
    feature_weight: float = field(default=1.0, metadata={"help": "alpha, the weight of the feature loss."})
    feature_layers: list[int] = field(
        default_factory=lambda: [-1], metadata={"help": "Hidden states that the feature loss compares."}
    )
    product: str = field(default="auto", metadata={"help": "Network that is the result: auto, target or non_target."})
    known_trigger: str | None = field(
        default=None, metadata={"help": "Text that the defender planted in suspect rows, to measure both networks by."}
    )
    relabel_below: float = field(
        default=0.0,
        metadata={
            "help": "Probability below which a suspect row's given label is changed for two last trainings; 0: none."
        },
    )
    look_alikes: bool = field(
        default=False,
        metadata={"help": "Whether rows that look like those which stand apart count as such in the last trainings."},
    )

    def check(self) -> None:
        for name, choices in {"soft_labels": SoftLabels, "mutual_direction": Direction, "product": Product}.items():
            choose(name, getattr(self, name), get_args(choices))
        for name in ("temperature", "sharpening"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}: choose one above 0, for example 1.0")
        self.refuse_negative("feature_weight")
        if not 0 <= self.relabel_below <= 1:
            raise ValueError(f"relabel_below is {self.relabel_below}: choose a probability, for example 0.2, or 0")
        if not self.feature_layers:
            raise ValueError("feature_layers is empty: name one hidden state or more, for example [-1]")
        super().check()
