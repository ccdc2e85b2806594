"""Publishing a cleaned model with its evidence on the Hub."""

import contextlib
import json
import logging
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, metadata_load
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import validate_repo_id

from hf_backdoor.evaluation.differences import recipe_differences
from hf_backdoor.evaluation.results import Results
from hf_backdoor.report.card import model_card
from hf_backdoor.report.scrub import scrub, scrub_results
from hf_backdoor.report.story import hub_id, recipe_yaml


logger = logging.getLogger(__name__)

# All that is ever uploaded from the model's folder. A pickle or a file of the training cannot slip in.
_WEIGHTS = ("*.safetensors",)
_CONFIGS = ("config.json", "generation_config.json", "adapter_config.json", "tokenizer_config.json")
_VERBATIM = (
    "*.safetensors.index.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)
# What an earlier upload may have left, and a reader would load instead: other weights, or pickles.
_STALE = [
    "*.safetensors",
    "*.safetensors.index.json",
    "*.bin",
    "*.bin.index.json",
    "*.pt",
    "*.pth",
    "*.pkl",
    "adapter/*",
]

# Keys of a configuration that hold paths. Elsewhere a text that looks like a path may be a token.
_PATH_KEYS = {
    "_name_or_path",
    "name_or_path",
    "tokenizer_file",
    "vocab_file",
    "merges_file",
    "special_tokens_map_file",
}
# Code that a suspect model asks its readers to run.
_CODE_KEYS = {"auto_map", "custom_pipelines"}


def publish(run_dir: str | Path, repo_id: str, *, private: bool | None = None, token: str | bool | None = None) -> str:
    """
    Upload the cleaned model of a run, its card, its recipe and its results.

    Only files of an allow list leave the machine: safetensors, configurations and the tokenizer; and the adapter, if one
    takes a suspect on the Hub to the cleaned model. Local paths become their last component. Weights and pickles of an earlier upload are deleted from the repository in the same commit.

    Args:
        run_dir (`str` or `Path`): Folder of a run, with `cleaned/` and `results.json`.
        repo_id (`str`): Repository to publish to. It is made when missing.
        private (`bool`, *optional*): Whether nobody else may see a new repository; what its owner has set for new ones by default.
        token (`str` or `bool`, *optional*): Token of the Hub. Defaults to the one that is logged in.

    Returns:
        `str`: Address of the repository.

    Raises:
        ValueError: If the run has no complete model in safetensors, no valid results or those of another recipe, or if a
            private repository was asked for and a public one with this name exists, or if the Hub can't be reached or says no.
    """
    run_dir = Path(run_dir)
    validate_repo_id(repo_id)
    results = Results.load(run_dir / "results.json")
    recipe = _recipe(run_dir / "recipe.yaml", results)
    # A student from elsewhere has a licence of its own, and two are nothing to choose from here.
    own_student = results.recipe.get("student_model_name_or_path") is not None
    suspect_license = None if own_student else _license(results.recipe.get("model_name_or_path"))
    results = scrub_results(results)
    with tempfile.TemporaryDirectory(prefix="hf-backdoor-") as temporary:
        staged = Path(temporary)
        adapter = _stage_model(run_dir / "cleaned", staged)
        (staged / "recipe.yaml").write_text(recipe, encoding="utf-8")
        results.save(staged / "results.json")
        # From here on the Hub is asked: everything that can be refused was refused before.
        api = HfApi(token=token)
        with _one_line(repo_id):
            repo = api.create_repo(repo_id, private=private, exist_ok=True)
            if private and not api.repo_info(repo.repo_id).private:
                raise ValueError(
                    f"repo_id: {repo.repo_id} exists and is public; make it private or choose another name"
                )
            card = model_card(results, repo.repo_id, adapter=adapter, suspect_license=suspect_license)
            card.save(staged / "README.md")
            api.upload_folder(
                repo_id=repo.repo_id,
                folder_path=staged,
                commit_message="Upload the cleaned model and its evidence",
                delete_patterns=_STALE,
            )
    return str(repo)


@contextlib.contextmanager
def _one_line(repo_id: str) -> Iterator[None]:
    """What the Hub, or the way to it, refuses, in one line; what was staged is gone, and the run as it was."""
    try:
        yield
    except (OSError, HTTPError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"repo_id: {repo_id} can't be published to ({reason}); look at the connection, and log in by `hf auth login`"
        ) from None


def _license(model: Any) -> str | None:
    """The licence that the card of a local model names. Whoever made the model wrote it: what is no licence's name is not taken over."""
    readme = Path(str(model), "README.md")
    try:
        found = (metadata_load(readme) or {}).get("license") if readme.is_file() else None
    except (ValueError, yaml.YAMLError):
        return None
    return found if isinstance(found, str) and re.fullmatch(r"[a-z0-9][a-z0-9.-]{0,60}", found) else None


def _stage_model(model: Path, staged: Path) -> bool:
    """Puts what is published of a model into a folder, and says whether an adapter is among it."""
    weights = _files(model, _WEIGHTS)
    if not weights or not any((model / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ValueError(f"{model}: no model in safetensors; finish the run with `hf-backdoor run` first")
    for index in _files(model, ["*.safetensors.index.json"]):
        missing = set(_read_json(index).get("weight_map", {}).values()) - {path.name for path in weights}
        if missing:
            raise ValueError(f"{model}: {sorted(missing)[0]} of {index.name} is missing; save the model again")
    for path in weights:
        # A link: weights may be larger than the temporary folder.
        (staged / path.name).symlink_to(path.resolve())
    for path in _files(model, _VERBATIM):
        target = staged / path.relative_to(model)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    for path in _files(model, _CONFIGS):
        text = json.dumps(_config(path), indent=2, ensure_ascii=False) + "\n"
        (staged / path.name).write_text(text, encoding="utf-8")
    adapter = _stage_adapter(model / "adapter", staged)
    published = {path.relative_to(staged) for path in staged.rglob("*")}
    left = sorted(
        str(path.relative_to(model)) for path in model.rglob("*") if path.relative_to(model) not in published
    )
    if left:
        logger.info("Not published from %s: %s", model, ", ".join(left))
    return adapter


def _stage_adapter(adapter: Path, staged: Path) -> bool:
    """The adapter that makes the cleaned model of the suspect, if the suspect is on the Hub: nobody could use it otherwise."""
    files = _files(adapter, ("adapter_model.safetensors", "adapter_config.json"))
    if len(files) < 2 or hub_id(_read_json(files[1]).get("base_model_name_or_path")) is None:
        return False
    (staged / adapter.name).mkdir()
    (staged / adapter.name / files[0].name).symlink_to(files[0].resolve())
    text = json.dumps(_config(files[1]), indent=2, ensure_ascii=False) + "\n"
    (staged / adapter.name / files[1].name).write_text(text, encoding="utf-8")
    return True


def _files(folder: Path, patterns: tuple[str, ...] | list[str]) -> list[Path]:
    """The files that match, without links: one could lead to any file of this machine."""
    found = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
    return [path for path in found if path.is_file() and not path.is_symlink()]


def _config(path: Path) -> dict[str, Any]:
    config = {key: value for key, value in _read_json(path).items() if key not in _CODE_KEYS}
    if path.name == "adapter_config.json" and hub_id(config.get("base_model_name_or_path")) is None:
        base = config.get("base_model_name_or_path")
        raise ValueError(
            f"{path}: base_model_name_or_path is {base!r}, not on the Hub; merge the adapter into its base"
        )
    if path.name == "config.json":
        config = scrub(config)
        if "use_cache" in config:
            config["use_cache"] = True  # Trainer turns it off for the training
    for key in _PATH_KEYS & config.keys():
        if isinstance(config[key], str) and hub_id(config[key]) is None:
            config[key] = Path(config[key]).name
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); save the model again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a {type(content).__name__}, not a mapping; save the model again")
    return content


def _recipe(path: Path, results: Results) -> str:
    """The recipe as YAML, scrubbed. Comments are left out: they may say anything."""
    if not path.is_file():
        return recipe_yaml(scrub_results(results))
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML ({' '.join(str(error).split())}); correct the recipe") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a {type(content).__name__}, not a mapping; correct the recipe")
    # A run writes its recipe when it begins, and its results when it ends.
    if changed := recipe_differences(content, results.recipe):
        raise ValueError(
            f"{path}: {changed[0]} when results.json was measured; finish the run with `hf-backdoor run` first"
        )
    return yaml.safe_dump(scrub(content), sort_keys=False, allow_unicode=True, width=100)
