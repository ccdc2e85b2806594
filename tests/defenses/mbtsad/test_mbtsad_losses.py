import pytest
import torch

from hf_backdoor.defenses.mbtsad.losses import (
    eager_attention_map_loss,
    eager_nad_map_loss,
    hidden_state_loss,
    valid_entries,
)


BATCH, HEADS, LENGTH, WIDTH = 3, 2, 7, 5


def mask():
    made = torch.ones(BATCH, LENGTH, dtype=torch.long)
    made[0, :3] = made[1, -2:] = made[2, 3] = 0
    return made


def maps(seed):
    """Attention maps with noise in every entry, the ones that don't count too."""
    torch.manual_seed(seed)
    return torch.randn(BATCH, HEADS, LENGTH, LENGTH).softmax(dim=-1)


def sees(query, key, causal, window):
    distance = query - key
    return (distance >= 0 or not causal) and (window is None or abs(distance) < window)


@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (True, 3), (False, 2), (True, 1)])
def test_valid_entries_are_pairs_of_real_tokens_in_reach(causal, window):
    found = valid_entries(mask(), causal, window)
    for sample in range(BATCH):
        real = mask()[sample].tolist()
        for query in range(LENGTH):
            for key in range(LENGTH):
                wanted = bool(real[query] and real[key] and sees(query, key, causal, window))
                assert found[sample, query, key] == wanted


@pytest.mark.parametrize("causal", [False, True])
def test_attention_map_loss_is_the_mean_over_heads_and_valid_entries(causal):
    student, teacher, valid = maps(0), maps(1), valid_entries(mask(), causal)
    found = eager_attention_map_loss(student, teacher, valid)
    for sample in range(BATCH):
        squares = [
            (student[sample, head, query, key].item() - teacher[sample, head, query, key].item()) ** 2
            for head in range(HEADS)
            for query, key in valid[sample].nonzero().tolist()
        ]
        assert found[sample].item() == pytest.approx(sum(squares) / len(squares), rel=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_nad_loss_compares_sums_of_squares_over_heads_divided_by_their_norms(causal):
    student, teacher, valid = maps(0), maps(1), valid_entries(mask(), causal)
    found = eager_nad_map_loss(student, teacher, valid)
    for sample in range(BATCH):
        entries = valid[sample].nonzero().tolist()
        normed = []
        for attention in (student, teacher):
            values = [
                sum(attention[sample, head, query, key].item() ** 2 for head in range(HEADS)) for query, key in entries
            ]
            norm = sum(value**2 for value in values) ** 0.5 + 1e-6
            normed.append([value / norm for value in values])
        expected = sum((one - two) ** 2 for one, two in zip(*normed, strict=True)) / len(entries)
        assert found[sample].item() == pytest.approx(expected, rel=1e-4)


def test_hidden_state_loss_is_the_mean_over_real_tokens_and_width():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, BATCH, LENGTH, WIDTH)
    found = hidden_state_loss(student, teacher, mask())
    for sample in range(BATCH):
        squares = [
            (student[sample, token, column].item() - teacher[sample, token, column].item()) ** 2
            for token in range(LENGTH)
            if mask()[sample, token]
            for column in range(WIDTH)
        ]
        assert found[sample].item() == pytest.approx(sum(squares) / len(squares), rel=1e-5)


def test_losses_are_float32_and_padding_has_no_gradient():
    valid = valid_entries(mask(), causal=True)
    student = maps(0).bfloat16().requires_grad_()
    for loss in (eager_attention_map_loss, eager_nad_map_loss):
        student.grad = None
        found = loss(student, maps(1).bfloat16(), valid)
        assert found.dtype == torch.float32 and found.shape == (BATCH,)
        found.sum().backward()
        assert (student.grad[(~valid)[:, None].expand_as(student)] == 0).all() and student.grad.any()
    states = torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    found = hidden_state_loss(states, torch.zeros_like(states), mask())
    assert found.dtype == torch.float32
    found.sum().backward()
    assert (states.grad[mask() == 0] == 0).all() and (states.grad[mask() == 1] != 0).any()


def test_a_sample_of_padding_alone_gives_zero():
    nothing = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    valid = valid_entries(nothing, causal=True)
    for loss in (eager_attention_map_loss, eager_nad_map_loss):
        assert (loss(maps(0), maps(1), valid) == 0).all()
    states = torch.randn(BATCH, LENGTH, WIDTH)
    assert (hidden_state_loss(states, states + 1, nothing) == 0).all()
