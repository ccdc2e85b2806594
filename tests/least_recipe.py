"""The least recipe, what tests put into it, and how it is refused."""

import pytest
import yaml

from hf_backdoor.recipe_file import make_recipe


LEAST = {
    "model_name_or_path": "model", "task": "sequence_classification", "dataset_name": "data", "output_dir": "runs/x",
}  # fmt: skip
ATTACK = {"attack_trigger": "zq", "target_label": 1}
DEFENSE = {"method": "locphylax"}
IMAGES = {"task": "image_classification"}
IMAGE_ATTACK = {**IMAGES, "attack_trigger": "patch", "target_label": 0}


def written(folder, values):
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def refused(line, **values):
    with pytest.raises(ValueError, match=line) as caught:
        make_recipe({**LEAST, **values})
    assert "\n" not in str(caught.value)
