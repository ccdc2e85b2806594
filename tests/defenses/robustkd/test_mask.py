"""What a mask does to a model, and that it leaves nothing behind."""

import pytest
import robust
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_backdoor.data import find_blocks
from hf_backdoor.defenses.robustkd import FeatureMask
from hf_backdoor.defenses.robustkd.features import captured, layer_names, spread


FAMILIES = [("bert", "sequence_classification"), ("llama", "label_words"), ("gpt2", "label_words")]
EVERY_FAMILY = pytest.mark.parametrize("family, name", FAMILIES)
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")


def model_and_batch(family, name, count=6):
    task, rows = tiny.task(name), tiny.reviews(count)
    made = robust.batch(family, task, rows)
    return tiny.model(family).eval(), made, {key: made[key] for key in MODEL_INPUTS if key in made}


@torch.no_grad()
def features_of(model, inputs, layers, mask=None, **options):
    import contextlib

    with mask.applied_to(model, **options) if mask else contextlib.nullcontext(), captured(model, layers) as features:
        model(**inputs)
    return features


@EVERY_FAMILY
@pytest.mark.parametrize("form", ["additive", "blend"])
@pytest.mark.parametrize("shape", ["channel", "position", "readout"])
def test_the_layer_s_feature_becomes_what_the_formula_says(family, name, form, shape):
    model, made, inputs = model_and_batch(family, name)
    mask = robust.mask_for(model, made, [0], form=form, shape=shape, threshold=0.9, positions=5)
    options = {"readout_position": made["readout_position"]} if shape == "readout" else {}
    (layer,) = mask.layers
    before = features_of(model, inputs, [layer])[layer]
    after = features_of(model, inputs, [layer], mask, **options)[layer]
    p, m = mask.features[0].detach(), 0.9 * torch.sigmoid(mask.weights[0].detach())
    for sample, attention in enumerate(made["attention_mask"]):
        start = attention.nonzero()[0].item()
        for token in attention.nonzero()[:, 0].tolist():
            row = {"channel": ..., "position": token - start, "readout": ...}[shape]
            here = shape != "readout" or token == made["readout_position"][sample]
            here &= shape != "position" or row < 5
            feature = before[sample, token]
            masked = feature + m[row] * p[row] if form == "additive" and here else feature
            if form == "blend" and here:
                masked = (1 - m[row]) * feature + m[row] * p[row]
            torch.testing.assert_close(after[sample, token], masked)


@EVERY_FAMILY
def test_layers_above_and_recorded_hidden_states_see_the_mask(family, name):
    model, made, inputs = model_and_batch(family, name)
    mask = robust.mask_for(model, made, [0])
    plain = model(**inputs, output_hidden_states=True)  # transformers' own hooks are there from now on
    with mask.applied_to(model):
        masked = model(**inputs, output_hidden_states=True)
    layer = mask.layers[0]
    assert torch.equal(masked.hidden_states[1], features_of(model, inputs, [layer], mask)[layer])
    assert not torch.equal(masked.hidden_states[1], plain.hidden_states[1])
    assert not torch.allclose(masked.logits, plain.logits, atol=1e-5, rtol=0)


@EVERY_FAMILY
def test_it_leaves_nothing_behind(family, name, tmp_path):
    model, made, inputs = model_and_batch(family, name)
    mask = robust.mask_for(model, made, shape="position")
    logits = model(**inputs).logits
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "before")
    with mask.applied_to(model):
        assert not torch.equal(model(**inputs).logits, logits)
    assert torch.equal(model(**inputs).logits, logits)
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    model.save_pretrained(tmp_path / "after")
    for file in (tmp_path / "before").iterdir():
        assert file.read_bytes() == (tmp_path / "after" / file.name).read_bytes(), file.name


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("layers", [[0], ["bert.encoder.layer.0", "bert.gone"]], ids=["in the block", "before it"])
def test_hooks_are_removed_on_errors(layers):
    model, made, inputs = model_and_batch("bert", "sequence_classification")
    mask = robust.mask_for(model, made, [0, 1], shape="position")
    if "bert.gone" in layers:
        mask.sizes = dict.fromkeys(layers, ())
    with pytest.raises((ZeroDivisionError, AttributeError)), mask.applied_to(model):
        _ = 1 / 0
    assert hooks(model) == 0


def test_left_padding_does_not_move_positions():
    model, made, inputs = model_and_batch("llama", "label_words")
    mask = robust.mask_for(model, made, shape="position", threshold=0.9)
    shortest = made["attention_mask"].sum(1).argmin()
    length = made["attention_mask"][shortest].sum()
    assert length < made["input_ids"].shape[1]
    with torch.no_grad(), mask.applied_to(model):
        padded = model(**inputs).logits[shortest, -length:]
        without_ids = model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[shortest, -length:]
        alone = model(inputs["input_ids"][shortest, None, -length:]).logits[0]
    torch.testing.assert_close(padded, alone, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(without_ids, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", ["channel", "position"])
def test_generation_with_a_cache_masks_every_token_once(shape):
    model, made, inputs = model_and_batch("llama", "label_words", 2)
    mask = robust.mask_for(model, made, shape=shape, threshold=0.9)
    kwargs = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    prompt = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    with mask.applied_to(model):
        cached = model.generate(**prompt, **kwargs, use_cache=True)
        plain = model.generate(**prompt, **kwargs, use_cache=False)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), atol=1e-4, rtol=1e-4)


def test_a_token_read_on_from_a_cache_keeps_its_position():
    model, made, inputs = model_and_batch("llama", "label_words", 3)
    ids, attention = inputs["input_ids"], inputs["attention_mask"]
    mask = robust.mask_for(model, made, shape="position", threshold=0.9)
    with torch.no_grad(), mask.applied_to(model):
        whole = model(ids, attention_mask=attention).logits[:, -1]
        cache = model(ids[:, :-1], attention_mask=attention[:, :-1], use_cache=True).past_key_values
        last = model(ids[:, -1:], attention_mask=attention, past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(last, whole, atol=1e-4, rtol=1e-4)


@EVERY_FAMILY
def test_activation_checkpointing_changes_no_gradient(family, name):
    model, made, inputs = model_and_batch(family, name)
    mask = robust.mask_for(model, made, shape="position")

    def gradients():
        model.zero_grad()
        mask.zero_grad()
        with mask.applied_to(model):
            model.train()(**inputs).logits.square().sum().backward()
        return [
            parameter.grad.clone()
            for module in (mask, model)
            for parameter in module.parameters()
            if parameter.grad is not None
        ]

    expected = gradients()
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert len(expected) > 4
    for found, wanted in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_under_an_adapter_it_is_the_same():
    model, made, inputs = model_and_batch("llama", "label_words")
    mask = robust.mask_for(model, made, shape="position")
    with torch.no_grad(), mask.applied_to(model):
        expected = model(**inputs).logits
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")).eval()
    with torch.no_grad(), mask.applied_to(adapted):
        assert torch.equal(adapted(**inputs).logits, expected)
    assert hooks(adapted) == 0


class Tupled(nn.Module):
    """Blocks that return a tuple, as older ones do."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        for block in self.blocks:
            x, kept = block(x)
        return x, kept


class Block(nn.Module):
    def forward(self, x):
        return 2 * x, "more"


def test_blocks_that_return_a_tuple_keep_the_rest_of_it():
    mask = FeatureMask({"blocks.0": [3], "blocks.1": [3]}, threshold=1.0, form="additive")
    for p in mask.features:
        p.data.fill_(10.0)
    output, rest = mask(Tupled(), x=torch.ones(1, 4, 3))
    assert rest == "more"
    assert torch.equal(output, torch.full((1, 4, 3), 2 * (2 + 5.0) + 5.0))


def test_a_half_precision_feature_keeps_its_type():
    mask = FeatureMask({"blocks.0": [3]})
    output, _ = mask(Tupled(), x=torch.ones(1, 4, 3, dtype=torch.bfloat16))
    assert output.dtype == torch.bfloat16


# ---- p at the start ----


@pytest.mark.parametrize("shape", ["channel", "position", "readout"])
@pytest.mark.parametrize("family, name", FAMILIES[:2])
def test_p_starts_at_the_mean_clean_feature(family, name, shape):
    model, made, inputs = model_and_batch(family, name, 9)
    mask = FeatureMask.for_model(model, made, shape=shape, positions=40)
    halves = [{key: value[part] for key, value in made.items()} for part in (slice(0, 4), slice(4, 9))]
    model.train()
    mask.initialize(model, halves)
    assert model.training
    model.eval()
    features = features_of(model, inputs, mask.layers)
    for p, layer in zip(mask.features, mask.layers, strict=True):
        by_place = {}
        for sample, attention in enumerate(made["attention_mask"]):
            start = attention.nonzero()[0].item()
            for token in attention.nonzero()[:, 0].tolist():
                if shape == "readout" and token != made["readout_position"][sample]:
                    continue
                place = token - start if shape == "position" else 0
                by_place.setdefault(place, []).append(features[layer][sample, token])
        every = torch.stack([state for states in by_place.values() for state in states]).mean(0)
        for place in range(len(p) if shape == "position" else 1):
            wanted = torch.stack(by_place[place]).mean(0) if place in by_place else every
            torch.testing.assert_close(p[place] if shape == "position" else p, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", ["channel", "position"])
def test_images_have_their_channels_first(shape):
    model, made = robust.resnet().eval(), robust.collate(list(robust.Pictures()))
    mask = FeatureMask.for_model(model, made, shape=shape, threshold=0.9)
    mask.initialize(model, [made])
    features = features_of(model, {"pixel_values": made["pixel_values"]}, mask.layers)
    assert [features[layer].dim() for layer in mask.layers] == [4, 4]
    for p, layer in zip(mask.features, mask.layers, strict=True):
        wanted = features[layer].mean(0) if shape == "position" else features[layer].mean((0, 2, 3))
        torch.testing.assert_close(p, wanted, atol=1e-5, rtol=1e-4)
    first, m = mask.layers[0], mask.masks[0]
    p, m = (value if shape == "position" else value[:, None, None] for value in (mask.features[0], m))
    masked = features_of(model, {"pixel_values": made["pixel_values"]}, [first], mask)[first]
    torch.testing.assert_close(masked, (1 - m) * features[first] + m * p)


# ---- Folders, layers, errors ----


def test_a_saved_mask_comes_back(tmp_path):
    model, made, inputs = model_and_batch("bert", "sequence_classification")
    mask = robust.mask_for(model, made, ["bert.encoder.layer.1"], form="additive", shape="position", threshold=0.05)
    mask.save_pretrained(tmp_path)
    assert {file.suffix for file in tmp_path.iterdir()} == {".safetensors", ".json"}
    again = FeatureMask.from_pretrained(tmp_path)
    assert (again.layers, again.form, again.shape, again.threshold) == (mask.layers, "additive", "position", 0.05)
    assert torch.equal(again(model, **inputs).logits, mask(model, **inputs).logits)


def test_masks_lie_between_zero_and_the_threshold():
    mask = FeatureMask({"a": [5]}, threshold=0.3)
    mask.weights[0].data = torch.tensor([-1e4, -1.0, 0.0, 1.0, 1e4])
    found = mask.masks[0].detach()
    assert found[0] == 0 and found[-1].item() == pytest.approx(0.3)
    assert (found.diff() > 0).all()


def test_blocks_are_found_in_every_family():
    assert find_blocks(tiny.model("bert")) == ["bert.encoder.layer.0", "bert.encoder.layer.1"]
    assert find_blocks(tiny.model("llama")) == ["model.layers.0", "model.layers.1"]
    assert find_blocks(tiny.model("gpt2")) == ["transformer.h.0", "transformer.h.1"]
    assert find_blocks(robust.resnet()) == ["resnet.encoder.stages.0", "resnet.encoder.stages.1"]
    experts = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleList([nn.Linear(1, 1)] * 9), nn.Linear(1, 1)])})
    assert find_blocks(experts) == ["layers.0", "layers.1"]
    assert len(find_blocks(robust.vit())) == 4


@pytest.mark.parametrize(
    "number, count, blocks", [(6, 3, [1, 3, 5]), (30, 3, [9, 19, 29]), (2, 3, [0, 1]), (7, 1, [6])]
)
def test_layers_are_evenly_spread_with_the_last_among_them(number, count, blocks):
    assert spread(number, count) == blocks


def test_layers_are_numbers_or_names():
    model = tiny.model("llama")
    assert layer_names(model, ["-1", 0, "model.norm"]) == ["model.layers.1", "model.layers.0", "model.norm"]
    for wrong, line in [
        (["2"], "has 2: the model has blocks 0 to 1"),
        (["x"], "has 'x': no such"),
        ([0, "-2"], "once"),
    ]:
        with pytest.raises(ValueError, match=f"mask_layers .*{line}"):
            FeatureMask.for_model(model, {}, wrong)
    with pytest.raises(ValueError, match="Linear keeps its blocks in no nn.ModuleList"):
        find_blocks(nn.Linear(1, 1))


def test_what_makes_no_sense_is_refused(tmp_path):
    for wrong in ({"threshold": 0.0}, {"threshold": 1.5}, {"form": "times"}, {"shape": "head"}):
        with pytest.raises(ValueError, match=f"^{next(iter(wrong))} is"):
            FeatureMask({"a": [2]}, **wrong)
    model, made, inputs = model_and_batch("bert", "sequence_classification")
    mask = robust.mask_for(model, made, shape="readout")
    with pytest.raises(ValueError, match="^readout_position is None"), mask.applied_to(model):
        pass
    with pytest.raises(ValueError, match="^feature_mask is .*fit a mask first"):
        FeatureMask.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="^mask_shape is 'readout', and an image"):
        FeatureMask.for_model(robust.resnet(), robust.collate([robust.Pictures()[0]]), shape="readout")
