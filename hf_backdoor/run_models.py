"""The models of a run: where each lies, what it was made from, how it is loaded and saved."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel

from .adapters import find_adapter, save_adapter, stackable
from .data import Processor, Task
from .defenses import DefenseTrainer
from .defenses.robustkd import student_from_layers
from .folders import STAGE, clear, fingerprint, finished, main_process, write_json
from .model_files import resolve, without_weights
from .models import is_quantized, load_model, merged, save_model
from .plan import Stage, base_model_name
from .recipe import Recipe


@dataclass
class RunModels:
    """Models of a run by name: a folder of the run (`suspect`, `cleaned`, ...), or what the recipe names.

    Args:
        recipe ([`Recipe`]): What is run.
        processor (`Processor`): Tokenizer or image processor. Saved along with every model.
        task ([`~hf_backdoor.data.Task`]): Its labels decide the size of a fresh head.
        prints (`dict[str, str]`): Fingerprint of what each folder of the run was made from.
    """

    recipe: Recipe
    processor: Processor
    task: Task
    prints: dict[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return Path(self.recipe.output_dir)

    def path(self, name: str) -> str:
        """A folder of the run, or a model's name from elsewhere."""
        return str(self.folder / name) if name in self.prints else name

    def origin(self, name: str) -> Any:
        """What a model was made from: a stage and its fingerprint, a local folder's files, or a name and its revision."""
        if name in self.prints:
            return name, self.prints[name]
        folder, gguf = resolve(name)
        kept = ["config.json"] if without_weights(name) else [gguf] if gguf else ["config.json", "*.safetensors"]
        files = sorted(file for pattern in kept for file in Path(folder).glob(pattern))
        found = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        return name, self.recipe.model_revision, found

    def convert(self) -> None:
        """A GGUF file is slow to load and can't be trained on, and an adapter is half a model: they become safetensors once."""
        folder, name = self.folder / "base", self.recipe.model_name_or_path
        adapter = find_adapter(name, revision=self.recipe.model_revision)
        made_from = {"model": self.origin(name), "dtype": self.recipe.dtype}
        if adapter:
            made_from["the adapter's base"] = self.origin(adapter.base)
        if self.recipe.task_class.has_head:
            made_from |= {"num_labels": self.task.num_labels, "seed": self.recipe.seed}  # its fresh head
        self._make(folder, made_from, lambda: self.load(name))

    def make_student(self) -> None:
        """Some of the suspect's layers, as a model of their own."""
        folder = self.folder / "student"
        suspect = "suspect" if self.recipe.trains_suspect else base_model_name(self.recipe)
        layers = self.recipe.student_layers
        made_from = {"model": self.origin(suspect), "student_layers": layers, "dtype": self.recipe.dtype}
        self._make(folder, made_from, lambda: student_from_layers(self.load(suspect), layers))

    def _make(self, folder: Path, made_from: dict[str, Any], model: Callable[[], PreTrainedModel]) -> None:
        """A model that is made, and not trained."""
        print_ = self.prints[folder.name] = fingerprint(made_from)
        # Looked up by the first process alone: another one, later, would find the folder finished and not wait.
        with main_process() as first:
            if first and finished(folder, print_) is None:
                clear(folder, made_from)
                save_model(model(), self.processor, folder)
                write_json(folder / STAGE, {"fingerprint": print_})

    def load(self, name: str, quantization: str | None = None) -> PreTrainedModel:
        labels = getattr(self.task, "num_labels", None)
        head = labels if self.recipe.task_class.has_head and name not in self.prints else None
        return load_model(
            self.path(name),
            self.recipe.task_class,
            num_labels=head,
            seed=self.recipe.seed,
            revision=self.recipe.model_revision if name == self.recipe.model_name_or_path else None,
            dtype=self.recipe.dtype,
            attn_implementation=self.recipe.attn_implementation,
            quantization=quantization,
            compute_dtype="bfloat16" if self.recipe.training.get("bf16") else self.recipe.dtype,
            from_scratch=name in (self.recipe.model_name_or_path, self.recipe.student_model_name_or_path),
        )

    def save(self, trainer: DefenseTrainer, stage: Stage, findings: dict[str, Dataset]) -> None:
        """What a stage has trained, as plain weights, and what it has found out."""
        folder = self.folder / stage.folder
        with main_process() as first:
            if first:
                result = trainer.result()
                for name, table in findings.items():
                    table.to_parquet(folder / f"{name}.parquet")
                if isinstance(result, PreTrainedModel | PeftModel):
                    # Which of the stage's models was trained: NT-ML trains two of them.
                    models = {self.path(name): name for name in (stage.parent, *stage.inputs.values())}
                    origin = models.get(result.name_or_path, stage.parent)
                    if isinstance(result, PeftModel):
                        self._keep_adapter(result, origin, folder / "adapter")
                    base = None
                    if is_quantized(result):
                        base = self.load(origin)
                        trainer.prepare_model(base)
                    save_model(merged(result, base), self.processor, folder)
                else:
                    result.save_pretrained(folder)

    def _keep_adapter(self, trained: PeftModel, origin: str, folder: Path) -> None:
        """What takes the suspect to this model: the stage's adapter, and under it that of the model which the stage started from.
        None where that model isn't made of the suspect by adapters: then only the merged weights are the defense."""
        suspect = "suspect" if self.recipe.trains_suspect else base_model_name(self.recipe)
        before = None if origin == suspect else self.folder / origin / "adapter"
        if before is None or (origin in self.prints and before.is_dir() and stackable(trained, before)):
            revision = self.recipe.model_revision
            save_adapter(trained, self.path(suspect), folder, base_revision=revision, before=before)
