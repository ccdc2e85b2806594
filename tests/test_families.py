"""Families of models against the truth: what `docs/models.md` claims."""

from contextlib import nullcontext
from typing import Any

import families
import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_backdoor.data import find_blocks
from hf_backdoor.defenses import DefenseConfig, DefenseTrainer
from hf_backdoor.defenses.locphylax import LocphylaxConfig, LocphylaxTrainer
from hf_backdoor.defenses.mbtsad import MBTSADConfig, MBTSADTrainer
from hf_backdoor.defenses.reading import SoftTriggers
from hf_backdoor.defenses.readout import readout_states
from hf_backdoor.defenses.robustkd import FeatureMask, student_from_layers
from hf_backdoor.defenses.robustkd.features import model_inputs


ROWS = 6


def trainer(model, family, head, folder, make=DefenseTrainer, config=DefenseConfig, more=None, **options: Any):
    rows = tiny.reviews(ROWS) if head else tiny.instructions(ROWS)
    processor = tiny.encoder_tokenizer() if families.heads(family) else tiny.causal_tokenizer()
    args = config(
        output_dir=str(folder), use_cpu=True, report_to="none", disable_tqdm=True, per_device_train_batch_size=ROWS,
        save_strategy="no", max_steps=1, learning_rate=0.01, **options,
    )  # fmt: skip
    return make(model=model, args=args, train_dataset=rows, processing_class=processor, **(more or {}))


def batch_of(made: DefenseTrainer) -> dict[str, Tensor]:
    return made.data_collator([made.train_dataset[row] for row in range(ROWS)])


def each(names: Any, without: tuple[str, ...] = ()) -> Any:
    return pytest.mark.parametrize("family", [name for name in names if name not in without])


ALL = [(name, families.heads(name)) for name in families.ENCODERS | families.DECODERS]
ALL += [(name, True) for name in families.DECODER_HEADS]
every = pytest.mark.parametrize(
    ("family", "head"), [pytest.param(*case, id=f"{case[0]}{' head' * case[1]}") for case in ALL if case[0] != "xlnet"]
)


# ---- All trainers: the loss, what is saved ----


def losses(made: DefenseTrainer, head: bool) -> tuple[Tensor, Tensor]:
    """Of a padded batch as a trainer takes it, and of its rows one by one, by transformers alone."""
    batch, model, alone = batch_of(made), made.model.eval(), []
    with torch.no_grad():
        together = made.task_loss(made.forward(model, batch).logits, batch["labels"])
        for row in made.train_dataset:
            ids = torch.tensor([row["input_ids"]])
            logits = model(input_ids=ids).logits
            start = row.get("prompt_length", 0)
            alone.append(
                F.cross_entropy(logits, torch.tensor([row["labels"]]))
                if head
                else F.cross_entropy(logits[0, start - 1 : -1], ids[0, start:])
            )
    return together, torch.stack(alone)


@every
def test_a_batch_s_losses_are_those_of_its_rows_and_what_is_trained_loads_as_it_was(family, head, tmp_path):
    made = trainer(families.model(family, head), family, head, tmp_path)
    if family != "recurrent-gemma":  # transformers lets its recurrent layers read padding
        together, alone = losses(made, head)
        assert alone.std() > 1e-3
        assert torch.allclose(together, alone, atol=1e-4)
    before = tiny.parameters(made.model)
    made.train()
    assert tiny.largest_difference(before, tiny.parameters(made.model)) > 1e-4
    made.save_model(str(tmp_path))
    auto = AutoModelForSequenceClassification if head else AutoModelForCausalLM
    ids, loaded = torch.tensor([made.train_dataset[0]["input_ids"]]), auto.from_pretrained(tmp_path)
    if family != "funnel":  # transformers takes the embedding of its padding for zero as it loads it
        assert tiny.largest_difference(tiny.parameters(made.model), tiny.parameters(loaded)) == 0
    with torch.no_grad():
        own, again = (model.eval()(input_ids=ids).logits for model in (made.model, loaded))
    # What a head multiplies is summed in another order where loaded weights lie otherwise in memory, on some CPUs.
    torch.testing.assert_close(own, again, rtol=1e-5, atol=1e-6)


def test_a_head_that_reads_padding_is_refused(tmp_path):
    with pytest.raises(ValueError, match="summary_type is 'last'"):
        trainer(families.model("xlnet", True), "xlnet", True, tmp_path)


# ---- Representations: Locphylax, NT-ML, masks of shape "readout" ----


@pytest.mark.parametrize(
    "family", [name for name, head in ALL if head and name not in ("xlnet", "funnel", "longformer")]
)
def test_a_head_reads_the_read_out_position_and_nothing_else(family, tmp_path):
    made = trainer(families.model(family, True), family, True, tmp_path)
    batch = batch_of(made)
    outputs = made.forward(made.model.eval(), batch, hidden_states=[-1])
    (gradient,) = torch.autograd.grad(outputs.logits.sum(), outputs.hidden_states[-1])
    read = gradient.abs().sum(dim=-1) > 1e-9
    expected = batch["attention_mask"].bool()  # a mean over the text
    if "readout_position" in batch:
        expected = F.one_hot(batch["readout_position"], read.shape[1]).bool()
    assert torch.equal(read, expected)
    assert ("readout_position" in batch) == (family not in ("modernbert, mean", "eurobert"))


@each(["modernbert, mean", "eurobert"])
def test_the_state_of_a_head_that_reads_a_mean_is_the_mean_over_the_text(family, tmp_path):
    made = trainer(families.model(family, True), family, True, tmp_path)
    model, batch = made.model.eval(), batch_of(made)
    with torch.no_grad():
        states = readout_states(made.forward(model, batch, hidden_states=[-1]).hidden_states[-1], batch)
        for row, state in zip(made.train_dataset, states, strict=True):
            alone = model(input_ids=torch.tensor([row["input_ids"]]), output_hidden_states=True).hidden_states[-1]
            assert torch.allclose(state, alone[0].mean(dim=0), atol=1e-5)


def test_a_model_without_a_state_for_each_token_is_refused_where_states_are_read(tmp_path):
    planted = {"known_triggers": list(tiny.KNOWN[:2]), "known_response": tiny.RESPONSE}
    made = trainer(
        families.model("funnel", True), "funnel", True, tmp_path, LocphylaxTrainer, LocphylaxConfig, **planted
    )
    with pytest.raises(ValueError, match="gives no state for each token"):
        made.train()


# ---- MBTSAD ----

OWN_ATTENTION = ("deberta-v2", "longformer", "mpnet", "gpt-neo", "bloom", "falcon")
NO_SDPA = ("gemma2", "gpt-oss")
HYBRID = ("qwen3-next", "lfm2", "jamba", "recurrent-gemma")
NO_ATTENTION = ("mamba", "mamba2")
LEAN_ONLY_REFUSED = (*OWN_ATTENTION, *NO_SDPA)


def distilling(family: str, head: bool, folder, backend: str, **options: Any) -> dict[str, Tensor]:
    attention = "eager" if backend == "eager" else None
    student, teacher = (families.model(family, head, seed, attention) for seed in (0, 1))
    made = trainer(
        student, family, head, folder, MBTSADTrainer, MBTSADConfig, {"teacher_model": teacher}, stages=["distil"],
        attention_backend=backend, **options,
    )  # fmt: skip
    with torch.no_grad():
        return made.loss_terms(made.model, batch_of(made), torch.tensor([ROWS]))[0]


@each(families.ENCODERS | families.DECODERS, (*LEAN_ONLY_REFUSED, *HYBRID, *NO_ATTENTION, "xlnet", "funnel"))
def test_attention_losses_are_those_of_the_maps(family, tmp_path):
    head = families.heads(family)
    lean, eager = (distilling(family, head, tmp_path, backend) for backend in ("lean", "eager"))
    for name, value in eager.items():
        assert value.min() > 0
        assert torch.allclose(lean[name], value, rtol=1e-4)


@each(LEAN_ONLY_REFUSED, ("longformer",))
def test_attention_that_can_t_be_recorded_is_compared_on_maps_and_refused_at_once_without(family, tmp_path):
    head = families.heads(family)
    assert distilling(family, head, tmp_path, "eager")["attention"].min() > 0
    with pytest.raises(ValueError, match="attention_backend='eager'"):
        distilling(family, head, tmp_path, "lean")


@each(HYBRID)
def test_hybrids_compare_the_maps_of_the_layers_that_have_some(family, tmp_path):
    assert distilling(family, False, tmp_path, "lean")["attention"].min() > 0
    with pytest.raises(ValueError, match="has layers without attention"):
        distilling(family, False, tmp_path, "eager")
    with pytest.raises(ValueError, match="layer 0 of .* has no attention"):
        distilling(family, False, tmp_path, "lean", attention_layers=[0])


@pytest.mark.parametrize("backend", ["lean", "eager"])
@each(NO_ATTENTION)
def test_models_without_attention_are_distilled_by_their_states(family, backend, tmp_path):
    with pytest.raises(ValueError, match="has no attention: set attention_weight: 0"):
        distilling(family, False, tmp_path, backend)
    assert distilling(family, False, tmp_path, "lean", attention_weight=0.0)["hidden"].min() > 0


@each(["funnel", "longformer"])
def test_maps_that_are_not_of_all_tokens_are_refused(family, tmp_path):
    with pytest.raises(ValueError, match="gives no map of"):
        distilling(family, True, tmp_path, "eager")


# ---- RobustKD ----

FIXED = {
    "albert": "blocks, which several layers share",
    "funnel": "can't be cut",
    "gpt-neo": "can't be cut",
    "modernbert": "blocks are not all alike",
    "modernbert, mean": "blocks are not all alike",
    "deepseek-v3": "blocks are not all alike",
    "jamba": "blocks are not all alike",
    "recurrent-gemma": "blocks are not all alike",
}


def skipped(model: nn.Module, kept: list[int]) -> list[Any]:
    """Lets a model's other blocks give what they were given."""

    def same(module: nn.Module, args: tuple, named: dict[str, Any], output: Any) -> Any:
        given = args[0] if args else named["hidden_states"]
        return given if isinstance(output, Tensor) else (given, *output[1:])

    blocks = find_blocks(model)
    others = [model.get_submodule(block) for number, block in enumerate(blocks) if number not in kept]
    return [block.register_forward_hook(same, with_kwargs=True) for block in others]


@pytest.mark.parametrize("layer", [0, 1])
@each(families.ENCODERS | families.DECODERS)
def test_a_student_of_one_layer_answers_as_the_teacher_does_without_the_others(family, layer):
    head = families.heads(family)
    teacher, ids = families.model(family, head), torch.arange(8, 20)[None]
    always = family in ("albert", "funnel", "gpt-neo")
    with pytest.raises(ValueError, match=FIXED[family]) if family in FIXED and (always or layer) else nullcontext():
        student = student_from_layers(teacher, [layer])
        options = {} if head else {"use_cache": False}
        hooks = skipped(teacher, [layer])
        with torch.no_grad():
            expected, found = (model(input_ids=ids, **options).logits for model in (teacher, student))
        for hook in hooks:
            hook.remove()
        assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("shape", ["channel", "readout", "position"])
@each(families.ENCODERS | families.DECODERS, ("xlnet",))
def test_a_mask_over_the_last_block_leaves_nothing_of_the_text(family, shape, tmp_path):
    head = families.heads(family)
    model = families.model(family, head)
    made = trainer(model, family, head, tmp_path)
    batch = batch_of(made)
    why = {"funnel": "gives no feature", "longformer": "gives features of shape"}.get(family)
    if shape == "readout" and family in ("modernbert, mean", "eurobert"):
        why = "reads the mean of all positions"
    with nullcontext() if why is None else pytest.raises(ValueError, match=why):
        mask = FeatureMask.for_model(model, batch, [-1], threshold=1.0, shape=shape)
        for weight, feature in zip(mask.weights, mask.features, strict=True):
            weight.data.fill_(100.0)
            feature.data.copy_(torch.linspace(-1, 1, feature.shape[-1]).expand_as(feature))
        with torch.no_grad(), mask.applied_to(model, batch.get("readout_position")):
            logits = model(**model_inputs(model, batch)).logits
        if not head:
            logits = logits[torch.arange(ROWS), batch["readout_position"]]
        assert torch.allclose(logits, logits[:1].expand_as(logits), atol=1e-4)


# ---- Soft triggers ----


@each(families.ENCODERS | families.DECODERS)
def test_a_soft_trigger_is_read_as_a_word_of_its_embedding_is(family):
    head = families.heads(family)
    model = families.model(family, head)
    tokenizer = tiny.encoder_tokenizer() if head else tiny.causal_tokenizer()
    word, ids = tiny.VOCABULARY.index("film"), [9, 10, 11, 12]
    with torch.no_grad():
        embedding = model.get_input_embeddings()(torch.tensor([word]))
        triggers = SoftTriggers(embedding[None])
        first = triggers.first_id(triggers.tokenizer(tokenizer))
        expected = model(input_ids=torch.tensor([[*ids, word, *ids]])).logits
        with triggers.read_by(model, triggers.tokenizer(tokenizer)):
            found = model(input_ids=torch.tensor([[*ids, first, *ids]])).logits
    assert torch.allclose(found, expected, atol=1e-5)
