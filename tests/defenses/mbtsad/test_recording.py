import pytest
import tiny
import torch
from transformers import (
    AttentionInterface,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    Llama4ForCausalLM,
    Llama4TextConfig,
)

from hf_backdoor.defenses.mbtsad.recording import RecordedAttention, chosen_layers, record_attention


FAMILIES = ("bert", "llama", "gpt2")
SIZES = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip


def batch(padded=False, length=9):
    torch.manual_seed(3)
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, : 3 * padded] = 0
    return {"input_ids": torch.randint(8, 40, (2, length)), "attention_mask": mask}


def maps(layer: RecordedAttention, mask):
    """What an eager model makes of queries and keys."""
    length = mask.shape[1]
    key = layer.key.repeat_interleave(layer.query.shape[1] // layer.key.shape[1], dim=1)
    scores = layer.scaling * layer.query @ key.transpose(2, 3)
    unseen = torch.ones(length, length).triu(1).bool() if layer.causal else torch.zeros(length, length).bool()
    return scores.masked_fill(unseen | (mask[:, None, None] == 0), -1e30).softmax(dim=-1)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_maps_are_made_of_what_is_recorded(family, padded):
    model, inputs = tiny.model(family).eval(), batch(padded)
    with record_attention(model, compare_mask=inputs["attention_mask"]) as record:
        model(**inputs)
    model.set_attn_implementation("eager")
    real = inputs["attention_mask"].bool()
    expected = model(**inputs, output_attentions=True).attentions
    assert len(record) == len(expected) == 2
    for layer, attention in zip(record, expected, strict=True):
        found = maps(layer, inputs["attention_mask"])
        torch.testing.assert_close(found.transpose(1, 2)[real], attention.transpose(1, 2)[real])


def test_key_heads_are_kept_as_they_are():
    with record_attention(model := tiny.model("llama")) as record:
        model(**batch())
    assert record[0].query.shape == (2, 4, 9, 8) and record[0].key.shape == (2, 2, 9, 8)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_output_is_the_same_and_nothing_is_left_behind(family, tmp_path):
    model, inputs = tiny.model(family).eval(), batch(padded=True)
    model.save_pretrained(tmp_path / "before")
    function, config = AttentionInterface()["sdpa"], model.config.to_dict()
    before = model(**inputs).logits
    with record_attention(model):
        within = model(**inputs).logits
        model.save_pretrained(tmp_path / "within")
    assert torch.equal(before, within)
    assert AttentionInterface()["sdpa"] is function and model.config._attn_implementation == "sdpa"
    assert model.config.to_dict() == config
    files = [tmp_path / name / "config.json" for name in ("before", "within")]
    assert files[0].read_text() == files[1].read_text()


def test_an_error_within_takes_the_recording_off():
    function = AttentionInterface()["sdpa"]
    with pytest.raises(KeyError, match="mine"), record_attention(tiny.model("bert")):
        raise KeyError("mine")
    assert AttentionInterface()["sdpa"] is function


@pytest.mark.parametrize(("layers", "kept"), [(None, [0, 1]), ([0], [0]), ([-1], [1]), ([-1, 0, 1], [0, 1])])
def test_only_chosen_layers_are_kept(layers, kept):
    model, inputs = tiny.model("llama").eval(), batch()
    with record_attention(model) as every:
        model(**inputs)
    with record_attention(model, layers) as record:
        model(**inputs)
    assert len(record) == len(kept)
    assert all(torch.equal(layer.query, every[number].query) for layer, number in zip(record, kept, strict=True))


@pytest.mark.parametrize("layers", [[2], [-3], [0, 5], []])
def test_layers_that_are_not_there_are_refused(layers):
    with pytest.raises(ValueError, match="attention_layers"):
        chosen_layers(layers, 2)


# ---- Models whose maps are not made of queries, keys and a plain mask ----


def test_eager_attention_is_refused():
    model = tiny.model("bert")
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="attn_implementation is 'eager'"), record_attention(model):
        pass


def test_a_model_without_an_attention_function_is_refused():
    sizes = {name: SIZES[name] for name in SIZES if name not in ("head_dim", "num_key_value_heads")}
    model = DebertaV2ForSequenceClassification(DebertaV2Config(**sizes, relative_attention=True))
    with pytest.raises(ValueError, match="attention_backend='eager'"), record_attention(model):
        model(**batch())


@pytest.mark.parametrize("passes", [0, 2])
def test_one_forward_pass_is_recorded(passes):
    model = tiny.model("bert")
    with (
        pytest.raises(ValueError, match=f"attention function {2 * passes} times in 2 layers"),
        record_attention(model),
    ):
        for _ in range(passes):
            model(**batch())


@pytest.mark.parametrize("option", ["softcap", "s_aux", "position_bias", "cu_seq_lens_q"])
def test_scores_of_more_than_queries_and_keys_are_refused(option):
    model = tiny.model("llama")
    with pytest.raises(ValueError, match=r"LlamaAttention .* set attention_backend"), record_attention(model):
        model(**batch(), **{option: torch.zeros(4)})


def test_cached_keys_are_refused():
    model, inputs = tiny.model("llama"), batch()
    past = model(**inputs, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="9 queries and 18 keys"), record_attention(model):
        model(inputs["input_ids"], past_key_values=past)


def test_masks_of_chunks_are_refused():
    config = Llama4TextConfig(
        **SIZES, intermediate_size_mlp=48, attention_chunk_size=4, num_local_experts=2, no_rope_layers=[1, 1],
        layer_types=["chunked_attention"] * 2,
    )  # fmt: skip
    inputs = batch()
    refused = pytest.raises(ValueError, match="Llama4TextAttention masks its attention by more")
    with refused, record_attention(model := Llama4ForCausalLM(config), compare_mask=inputs["attention_mask"]):
        model(**inputs)


def test_packed_samples_are_refused():
    inputs = batch()
    packed = {"input_ids": inputs["input_ids"], "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]] * 2)}
    refused = pytest.raises(ValueError, match="masks its attention by more")
    with refused, record_attention(model := tiny.model("llama"), compare_mask=inputs["attention_mask"]):
        model(**packed, use_cache=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_that_the_model_does_not_see_is_refused(family):
    inputs = batch(padded=True)
    refused = pytest.raises(ValueError, match="masks its attention by more")
    with refused, record_attention(model := tiny.model(family), compare_mask=inputs["attention_mask"]):
        model(inputs["input_ids"])


def test_a_mask_to_compare_has_one_value_for_each_token():
    inputs = batch()
    refused = pytest.raises(ValueError, match="attention_mask has shape")
    with refused, record_attention(model := tiny.model("bert"), compare_mask=inputs["attention_mask"][:, 1:]):
        model(**inputs)
