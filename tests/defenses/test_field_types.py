"""Values of another type than their field's are refused by name, when a configuration is made."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from hf_backdoor import DefenseConfig, LocphylaxConfig, MBTSADConfig, NTMLConfig, RobustKDConfig
from hf_backdoor.defenses.robustkd import FeatureMaskConfig


@pytest.mark.parametrize(
    ("config", "field", "value", "takes"),
    [
        (NTMLConfig, "relabel_below", "0.2", "a number"),
        (NTMLConfig, "temperature", None, "a number"),
        (NTMLConfig, "feature_layers", -1, "a list of whole numbers, as .0, 1."),
        (NTMLConfig, "look_alikes", "false", "yes or no .true or false."),
        (LocphylaxConfig, "soft_triggers", 1.5, "a whole number"),
        (LocphylaxConfig, "soft_triggers", True, "a whole number"),
        (LocphylaxConfig, "known_triggers", "mn", "a list of texts, as .one, another."),
        (LocphylaxConfig, "known_response", ["Aha"], "a text"),
        (LocphylaxConfig, "stages", 3, "a list of texts, as .one, another."),
        (MBTSADConfig, "split_banned_pieces", [1], "a list of texts, as .one, another."),
        (FeatureMaskConfig, "mask_layers", "10", "a list of texts, as .one, another."),
        (DefenseConfig, "max_length", "64", "a whole number"),
        (DefenseConfig, "label_words", [1, 2], "a list of texts, as .one, another."),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(config, field, value, takes, tmp_path):
    with pytest.raises(ValueError, match=f"^{field} is .*: it must be {takes}$"):
        config(output_dir=str(tmp_path), **{field: value})


@pytest.mark.parametrize(
    ("config", "field", "value", "kept"),
    [
        (NTMLConfig, "temperature", 2, 2),
        (NTMLConfig, "temperature", np.float32(0.5), 0.5),
        (NTMLConfig, "feature_layers", (-1, np.int64(2)), (-1, 2)),
        (LocphylaxConfig, "known_triggers", ("mn", "tq"), ("mn", "tq")),
        (LocphylaxConfig, "cluster_weight", None, None),
        (FeatureMaskConfig, "mask_layers", [4, "5"], ["4", "5"]),
        (RobustKDConfig, "student_feature_layers", (0, 2), ["0", "2"]),
    ],
)
def test_what_means_the_same_is_taken(config, field, value, kept, tmp_path):
    assert getattr(config(output_dir=str(tmp_path), **{field: value}), field) == kept


@dataclass
class Own(DefenseConfig):
    schedule: dict[str, Any] | None = None
    anything: Any = 3


def test_types_of_the_user_s_own_are_the_user_s(tmp_path):
    assert Own(output_dir=str(tmp_path), schedule={"a": 1}).schedule == {"a": 1}
