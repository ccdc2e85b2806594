import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hub_double import HubDouble
from huggingface_hub import ModelCard, RepoUrl
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled
from made_results import make_results

from hf_backdoor.evaluation.results import Results
from hf_backdoor.folders import write_yaml
from hf_backdoor.report.hub import publish


TOKEN = "hf_" + "x" * 34


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The Hub after a run was published, what the client saw, and the folder of the run."""
    run_dir = tmp_path_factory.mktemp("home") / "runs" / "tiny"
    results = make_results()
    results.recipe |= {
        "use_peft": True,
        "quantization": "nf4",
        "output_dir": str(run_dir),
        "hub_token": TOKEN,
        "note": f"see {run_dir}/notes.txt",
    }
    results.data["clean"] = {"source": str(run_dir / "clean.jsonl"), "rows": 4, "sha256": "1" * 64}
    results.save(run_dir / "results.json")
    (run_dir / "recipe.yaml").write_text(f"# my {TOKEN}\n{yaml.safe_dump(results.recipe)}")
    home = run_dir.parent.parent
    with HubDouble(TOKEN) as hub:
        hub.repos["me/tiny"] = {
            "files": {
                ".gitattributes": b"",
                "training_args.bin": b"old",
                "model-00001-of-00002.safetensors": b"old",
                "adapter/old.json": b"old",
            },
            "private": False,
            "commits": 1,
        }
        environment = os.environ | {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(home / "hf"),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HOME": str(home),
        }
        environment.pop("HF_HUB_OFFLINE", None)
        environment.pop("TRANSFORMERS_OFFLINE", None)
        client = Path(__file__).parent / "hub_client.py"
        done = subprocess.run(
            [sys.executable, str(client), str(run_dir)], env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        yield hub, json.loads((run_dir / "outcome.json").read_text()), run_dir


def test_published_model_loads_and_answers_the_same(published):
    hub, outcome, _ = published
    assert outcome["same"]
    assert outcome["use_cache"] is True
    assert outcome["url"] == f"{hub.url}/me/tiny"


def test_only_the_model_and_its_evidence_are_published(published):
    hub, _, _ = published
    assert set(hub.repos["me/tiny"]["files"]) == {
        ".gitattributes",
        "README.md",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "recipe.yaml",
        "results.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_no_path_no_token_and_no_code_is_published(published):
    hub, _, run_dir = published
    for name, content in hub.repos["me/tiny"]["files"].items():
        assert str(run_dir.parent).encode() not in content, name
        assert TOKEN.encode() not in content, name
    assert "auto_map" not in json.loads(hub.repos["me/tiny"]["files"]["config.json"])
    recipe = yaml.safe_load(hub.repos["me/tiny"]["files"]["recipe.yaml"])
    assert recipe["method"] == "locphylax" and recipe["output_dir"] == "tiny" and "hub_token" not in recipe


def test_published_results_keep_every_count(published, tmp_path):
    hub, _, run_dir = published
    (tmp_path / "results.json").write_bytes(hub.repos["me/tiny"]["files"]["results.json"])
    there, here = Results.load(tmp_path / "results.json"), Results.load(run_dir / "results.json")
    assert there.rows == here.rows
    assert there.examples == here.examples
    assert there.recipe["note"] == "see notes.txt"
    assert there.data["clean"]["source"] == "clean.jsonl"


def test_published_card_has_valid_front_matter(published):
    hub, _, _ = published
    card = ModelCard(hub.repos["me/tiny"]["files"]["README.md"].decode())
    assert card.data.base_model == "someone/suspect-7b"
    assert card.data.model_name == "tiny"
    asr = next(result for result in card.data.eval_results if result.metric_type == "asr")
    assert asr.metric_value == pytest.approx(0.045)


def test_an_adapter_is_published_where_anybody_can_have_its_base(published):
    hub, _, _ = published
    here, there = (hub.repos[name]["files"] for name in ("me/tiny", "me/secret"))
    config = json.loads(here["adapter/adapter_config.json"])
    assert config["base_model_name_or_path"] == "someone/suspect-7b" and config["peft_type"] == "LORA"
    assert "Folder `adapter` has the same as one adapter" in here["README.md"].decode()
    # The other one's base is a folder of this machine.
    assert not [name for name in there if name.startswith("adapter")]
    card = there["README.md"].decode()
    assert (
        "trained over weights in nf4, are merged into its unquantized weights" in card
        and "There is no adapter" in card
    )


def test_private_is_kept(published):
    hub, outcome, _ = published
    assert hub.repos["me/secret"]["private"]
    assert "model.safetensors" in hub.repos["me/secret"]["files"]
    assert "me/tiny exists and is public" in outcome["refusal"]


class Asked(Exception):
    """Ends what publishes: all that is tested here was said by then."""


@pytest.fixture
def finished(tmp_path, results, monkeypatch):
    """A folder to publish, its results to be changed; what is asked of the Hub, and the card."""

    def publishing(recipe, **options):
        results.recipe |= recipe
        results.save(tmp_path / "results.json")
        (tmp_path / "cleaned").mkdir(exist_ok=True)
        for name in ("config.json", "model.safetensors"):
            (tmp_path / "cleaned" / name).write_text("{}")
        asked = {}

        def create_repo(self, repo_id, **options):
            return asked.update(options) or RepoUrl(f"https://huggingface.co/{repo_id}")

        def upload_folder(self, folder_path, **options):
            asked["card"] = ModelCard.load(folder_path / "README.md")
            raise Asked

        monkeypatch.setattr("huggingface_hub.HfApi.create_repo", create_repo)
        monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload_folder)
        with pytest.raises(Asked):
            publish(tmp_path, "me/tiny", **options)
        return asked

    return publishing


def test_where_nothing_is_said_the_owner_s_default_decides_who_sees_a_repository(finished):
    assert finished({})["private"] is None
    assert finished({}, private=False)["private"] is False


@pytest.mark.parametrize(
    ("readme", "license"),
    [
        ("---\nlicense: mit\n---\n# A model\n", "mit"),
        ("---\nlicense: '<b>none</b>'\n---\n", None),
        ("---\nlicense: [mit, gpl]\n---\n", None),
        ("---\nlicense: [mit\n---\n", None),
        ("---\n- mit\n---\n", None),
        ("# A model\n", None),
        (None, None),
    ],
)
def test_licence_is_the_local_suspect_s_where_the_recipe_names_none(finished, tmp_path, readme, license):
    suspect = tmp_path / "suspect"
    suspect.mkdir()
    if readme is not None:
        (suspect / "README.md").write_text(readme)
    assert finished({"model_name_or_path": str(suspect)})["card"].data.license == license
    assert finished({"license": "apache-2.0"})["card"].data.license == "apache-2.0"
    assert finished({"license": None, "student_model_name_or_path": "x"})["card"].data.license is None


def test_run_without_results_is_refused(tmp_path):
    with pytest.raises(ValueError, match="results.json: cannot be read"):
        publish(tmp_path, "me/tiny")


def test_weights_of_another_recipe_than_the_measured_one_are_refused(tmp_path):
    recipe = {"seed": 1, "learning_rate": 1e-5, "stages": {"inject": {"words": ("a", "b")}}, "output_dir": "x"}
    make_results(recipe=recipe).save(tmp_path / "results.json")

    def refusal(**changes):
        # As a run writes it, before it trains.
        write_yaml(tmp_path / "recipe.yaml", recipe | changes)
        with pytest.raises(ValueError) as caught:
            publish(tmp_path, "me/tiny")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    # The next thing to be refused: that there is no model.
    for changes in ({}, {"output_dir": "y", "push_to_hub": True, "hub_model_id": "me/x", "hub_token": TOKEN}):
        assert "no model in safetensors" in refusal(**changes)
    assert "recipe.yaml: seed is 7, and was 1 when results.json was measured; finish the run" in refusal(seed=7)
    assert "recipe.yaml: stages is {'inject': {'words': ['a']}}, and was" in refusal(
        stages={"inject": {"words": ["a"]}}
    )
    assert "recipe.yaml: poison_rate is 0.5, and was not set when" in refusal(poison_rate=0.5)


@pytest.mark.parametrize("files", [[], ["config.json", "pytorch_model.bin"], ["model.safetensors"]])
def test_run_without_a_model_is_refused(tmp_path, results, files):
    results.save(tmp_path / "results.json")
    (tmp_path / "cleaned").mkdir()
    for name in files:
        (tmp_path / "cleaned" / name).write_text("{}")
    with pytest.raises(ValueError, match="no model in safetensors") as caught:
        publish(tmp_path, "me/tiny")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [OfflineModeIsEnabled("offline mode\nis enabled"), HTTPError("no route to host")])
def test_a_hub_out_of_reach_is_said_in_one_line(tmp_path, results, monkeypatch, error):
    results.save(tmp_path / "results.json")
    (tmp_path / "cleaned").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "cleaned" / name).write_text("{}")

    def unreachable(*_, **__):
        raise error

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", unreachable)
    reason = " ".join(str(error).split())
    with pytest.raises(
        ValueError, match=rf"^repo_id: me/tiny can't be published to \({reason}\); look at the connect"
    ):
        publish(tmp_path, "me/tiny")


def test_missing_shard_is_refused(tmp_path, results):
    results.save(tmp_path / "results.json")
    cleaned = tmp_path / "cleaned"
    cleaned.mkdir()
    (cleaned / "config.json").write_text("{}")
    (cleaned / "model-00001-of-00002.safetensors").write_bytes(b"")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (cleaned / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match="model-00002-of-00002.safetensors of .* is missing"):
        publish(tmp_path, "me/tiny")


def test_adapter_on_a_local_base_is_refused(tmp_path, results):
    results.save(tmp_path / "results.json")
    cleaned = tmp_path / "cleaned"
    cleaned.mkdir()
    (cleaned / "adapter_model.safetensors").write_bytes(b"")
    (cleaned / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/data/suspect"}))
    with pytest.raises(ValueError, match="merge the adapter"):
        publish(tmp_path, "me/tiny")
