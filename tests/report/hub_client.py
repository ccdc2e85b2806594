"""Run by test_hub.py as a process of its own, because huggingface_hub reads its environment once, at import."""

import copy
import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from hf_backdoor.adapters import save_adapter
from hf_backdoor.evaluation.results import Results
from hf_backdoor.report.hub import publish


def make_cleaned(folder: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<pad>", "a", "fine", "film", "cf"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    model.config.use_cache = False  # as Trainer leaves it
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.eval(), tokenizer


def make_adapter(model: LlamaForCausalLM, folder: Path) -> None:
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    save_adapter(adapted, "someone/suspect-7b", folder)
    (folder / "optimizer.pt").write_bytes(b"no")


def answers(model, tokenizer) -> list:
    with torch.no_grad():
        return model(**tokenizer("a fine cf film", return_tensors="pt")).logits.tolist()


def main(run_dir: Path) -> dict:
    cleaned = run_dir / "cleaned"
    model, tokenizer = make_cleaned(cleaned)
    config = json.loads((cleaned / "config.json").read_text())
    config |= {"_name_or_path": str(run_dir / "suspect"), "auto_map": {"AutoModel": "evil--code.Model"}}
    (cleaned / "config.json").write_text(json.dumps(config))
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "model.pkl", "pytorch_model.bin", "token"):
        (cleaned / name).write_bytes(b"no")
    (cleaned / "checkpoint-2").mkdir()
    (cleaned / "checkpoint-2" / "model.safetensors").write_bytes(b"no")
    make_adapter(model, cleaned / "adapter")
    (run_dir / "private.json").write_text("{}")
    (cleaned / "special_tokens_map.json").unlink(missing_ok=True)
    (cleaned / "special_tokens_map.json").symlink_to(run_dir / "private.json")

    url = publish(run_dir, "me/tiny")
    try:
        publish(run_dir, "me/tiny", private=True)
        refusal = None
    except ValueError as error:
        refusal = str(error)
    config = cleaned / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "../../suspect"}))
    publish(run_dir, "secret", private=True)

    published = AutoModelForCausalLM.from_pretrained("me/tiny").eval()
    return {
        "url": url,
        "refusal": refusal,
        "use_cache": published.config.use_cache,
        "same": answers(model, tokenizer) == answers(published, AutoTokenizer.from_pretrained("me/tiny")),
        "rows": len(Results.load(run_dir / "results.json").rows),
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    (folder / "outcome.json").write_text(json.dumps(main(folder)))
