"""The losses on attention maps of recorded layers, block by block: equal to those of maps that are built, which never are."""

import pytest
import torch
from maps import LENGTH, LOSSES, assert_equal, batch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_backdoor.defenses.mbtsad.attention import (
    _block_difference,
    _by_key_head,
    _map_norms,
    _part,
    attention_map_loss,
)
from hf_backdoor.defenses.mbtsad.blocks import BlockPlan
from hf_backdoor.defenses.mbtsad.losses import valid_entries
from hf_backdoor.defenses.mbtsad.recording import RecordedAttention


def records(batch=2, heads=4, key_heads=2, length=LENGTH, width=8, seed=0, dtype=torch.float32, **options):
    """Queries and keys of one layer, with gradients."""
    torch.manual_seed(seed)
    query, key = (torch.randn(batch, count, length, width, dtype=dtype).mul_(2) for count in (heads, key_heads))
    options = {"scaling": width**-0.5, "causal": True} | options
    return RecordedAttention(query.requires_grad_(), key.requires_grad_(), **options)


def attention_map(layer, mask):
    """[B, H, T, T], as an eager model would build it."""
    key = layer.key.repeat_interleave(layer.query.shape[1] // layer.key.shape[1], dim=1)
    scores = layer.scaling * layer.query.float() @ key.float().transpose(2, 3)
    valid = valid_entries(mask, layer.causal, layer.sliding_window)
    return scores.masked_fill(~valid[:, None], -1e30).softmax(dim=-1), valid


def of_maps(loss, student, teacher, mask):
    (mine, valid), (theirs, _) = attention_map(student, mask), attention_map(teacher, mask)
    return LOSSES[loss](mine, theirs.detach(), valid)


def layer_gradients(losses, layer, scale=1.0):
    (scale * losses).sum().backward()
    found = {"query": layer.query.grad, "key": layer.key.grad}
    layer.query.grad = layer.key.grad = None
    return found


# ---- Equal to materialised maps ----


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("padding", ["none", "left", "right", "holes"])
@pytest.mark.parametrize(
    "options", [{}, {"causal": False}, {"sliding_window": 4}, {"causal": False, "sliding_window": 3}]
)
@pytest.mark.parametrize("entries", [1, 50, 210, 4 * LENGTH**2, 10**6])
def test_blocks_of_any_size_give_the_same(entries, options, padding, loss):
    mask = batch(padding)["attention_mask"]
    student, teacher = (records(batch=3, seed=seed, **options) for seed in (0, 1))
    expected = of_maps(loss, student, teacher, mask)
    wanted = layer_gradients(expected, student)
    found = loss([student], [teacher], mask, block_entries=entries)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert_equal(layer_gradients(found, student), wanted)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_sample_s_loss_does_not_depend_on_the_batch_or_its_padding(loss):
    student, teacher = (records(batch=1, length=6, seed=seed) for seed in (0, 1))
    alone = loss([student], [teacher], torch.ones(1, 6))
    wide = [records(batch=3, length=11, seed=seed) for seed in (2, 3)]
    for layer, own in zip(wide, (records(batch=1, length=6, seed=seed) for seed in (0, 1)), strict=True):
        with torch.no_grad():
            layer.query[1, :, 5:], layer.key[1, :, 5:] = own.query[0], own.key[0]
    mask = torch.ones(3, 11)
    mask[1, :5] = 0
    torch.testing.assert_close(loss(wide[:1], wide[1:], mask)[1], alone[0])


@pytest.mark.parametrize("loss", LOSSES)
def test_models_may_differ_in_head_size_and_key_heads(loss):
    student, teacher = records(), records(seed=1, width=6, key_heads=4, scaling=0.2)
    mask = torch.ones(2, LENGTH)
    expected = of_maps(loss, student, teacher, mask)
    wanted = layer_gradients(expected, student)
    found = loss([student], [teacher], mask)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert_equal(layer_gradients(found, student), wanted)


@pytest.mark.parametrize("loss", LOSSES)
def test_layers_are_averaged_and_the_records_used_up(loss):
    mask = torch.ones(2, LENGTH)
    student, teacher = ([records(seed=seed) for seed in seeds] for seeds in ((0, 1), (2, 3)))
    each = [loss([mine], [theirs], mask) for mine, theirs in zip(student, teacher, strict=True)]
    torch.testing.assert_close(loss(student, teacher, mask), (each[0] + each[1]) / 2)
    assert student == teacher == []


# ---- Numbers ----


@pytest.mark.parametrize("loss", LOSSES)
def test_bfloat16_stays_within_its_rounding(loss):
    mask = batch("left")["attention_mask"]
    student, teacher = (records(batch=3, seed=seed, dtype=torch.bfloat16) for seed in (0, 1))
    expected = of_maps(loss, student, teacher, mask)
    wanted = layer_gradients(expected, student)
    found = loss([student], [teacher], mask, block_entries=100)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=0)
    assert_equal(layer_gradients(found, student), wanted, tolerance=2e-2)


def test_a_small_gradient_survives_float16():
    mask, length = torch.ones(1, 96), 96
    half = [records(batch=1, length=length, seed=seed, dtype=torch.float16) for seed in (0, 1)]
    single = [
        RecordedAttention(
            layer.query.detach().float().requires_grad_(),
            layer.key.detach().float().requires_grad_(),
            layer.scaling,
            True,
        )
        for layer in half
    ]
    scale = 2.0**12  # As of a gradient scaler.
    wanted = layer_gradients(attention_map_loss(single[:1], single[1:], mask), single[0], scale)
    found = layer_gradients(attention_map_loss(half[:1], half[1:], mask), half[0], scale)
    for name, grad in found.items():
        torch.testing.assert_close(grad.float(), wanted[name], rtol=0.05, atol=0.02 * wanted[name].abs().max().item())


@pytest.mark.parametrize("loss", LOSSES)
def test_equal_models_have_no_loss_and_samples_of_padding_neither(loss):
    mask = torch.ones(2, LENGTH)
    student = records()
    found = loss([student], [records()], mask)
    assert (found == 0).all()
    assert all((grad.abs() < 1e-6).all() for grad in layer_gradients(found, student).values())
    mask[0] = 0
    found = loss([student], [records(seed=1)], mask)
    assert found[0] == 0 and found[1] > 0
    for grad in layer_gradients(found, student).values():
        assert (grad[0] == 0).all() and grad[1].isfinite().all() and grad[1].any()


@pytest.mark.parametrize("loss", LOSSES)
def test_without_gradients_the_value_is_the_same(loss):
    student, teacher, mask = records(), records(seed=1), torch.ones(2, LENGTH)
    with_gradient = loss([student], [teacher], mask)
    with torch.no_grad():
        without = loss([student], [teacher], mask)
    assert with_gradient.requires_grad and not without.requires_grad
    assert torch.equal(with_gradient.detach(), without)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_used_up_by_one_backward_pass(loss):
    student, mask = records(), torch.ones(2, LENGTH)
    found = loss([student], [records(seed=1)], mask)
    wanted = layer_gradients(found, student)
    # Two graphs that share nothing: each gives what it gives alone.
    losses = [loss([student], [records(seed=1)], mask) for _ in range(2)]
    twice = layer_gradients(losses[0] + losses[1], student)
    for name, grad in twice.items():
        torch.testing.assert_close(grad, 2 * wanted[name])
    again = loss([student], [records(seed=1)], mask).sum()
    again.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        again.backward()


# ---- Blocks ----


class Sizes(TorchDispatchMode):
    """Entries of the largest tensor that is made."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = [
            each
            for each in (result if isinstance(result, (tuple, list)) else [result])
            if isinstance(each, torch.Tensor)
        ]
        self.largest = max([self.largest, *(each.numel() for each in made)])
        return result


@pytest.mark.parametrize("loss", LOSSES)
def test_maps_are_never_built(loss):
    length, entries = 256, 2**13
    student, teacher = (records(length=length, seed=seed) for seed in (0, 1))
    kept = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each.numel()) or each, lambda each: each),
        Sizes() as sizes,
    ):
        found = loss([student], [teacher], torch.ones(2, length), block_entries=entries)
        found.sum().backward()
    # Queries are 2 * 4 * 256 * 8 = 16,384 entries, maps 2 * 4 * 256 * 256 = 524,288.
    assert sizes.largest <= max(student.query.numel(), 2 * entries)
    assert sum(kept) <= student.query.numel() + student.key.numel() + 8


@pytest.mark.parametrize(("nad", "padding", "entries"), [(False, "none", 400), (True, "left", 2100)])
def test_what_is_computed_for_a_block_compiles(nad, padding, entries):
    mask = batch(padding)["attention_mask"]
    layers = [records(batch=3, seed=seed) for seed in (0, 1)]
    group = next(BlockPlan(mask, entries).groups(4, LENGTH, 0))
    compiled = torch.compile(_block_difference, backend="aot_eager", dynamic=True, fullgraph=True)
    with torch.no_grad():
        tensors = [each for layer in layers for each in _by_key_head(layer, (group.samples, slice(None), group.span))]
        norms = _map_norms(tensors, group) if nad else None
        block = group.blocks[-1]
        assert block.shut and (block.real is not None) == (padding == "left")
        arguments = (*_part(tensors, block), block.shut, block.real, norms, True)
        for found, expected in zip(compiled(*arguments), _block_difference(*arguments), strict=True):
            torch.testing.assert_close(found, expected)


# ---- Refusals ----


@pytest.mark.parametrize(
    ("teacher", "line"),
    [
        ([], "1 layers of the student and 0 of the teacher"),
        ([records(heads=2)], "same heads"),
        ([records(length=LENGTH - 1)], "same batch"),
        ([records(sliding_window=4)], r"reaching \(13, 0\) and \(3, 0\)"),
        ([records(causal=False)], "reaching"),
    ],
)
def test_records_that_do_not_fit_are_refused(teacher, line):
    with pytest.raises(ValueError, match=line):
        attention_map_loss([records()], teacher, torch.ones(2, LENGTH))


def test_a_mask_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="attention_mask has shape"):
        attention_map_loss([records()], [records()], torch.ones(2, LENGTH + 1))
