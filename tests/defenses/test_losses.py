import pytest
import torch

from hf_backdoor.defenses.losses import answer_cross_entropy, label_cross_entropy


def test_label_cross_entropy_equals_a_loop():
    logits, labels = torch.randn(5, 3), torch.tensor([0, 2, 1, 1, 0])
    expected = [-row.log_softmax(0)[label] for row, label in zip(logits, labels, strict=True)]
    torch.testing.assert_close(label_cross_entropy(logits, labels), torch.stack(expected))


def test_answer_cross_entropy_equals_a_loop():
    labels = torch.tensor([[-100, -100, 4, 1], [3, 3, 0, 2], [-100, -100, -100, 5]])
    logits = torch.randn(3, 5, 6, dtype=torch.float64)
    expected = []
    for row in range(3):
        # Column c of the labels is predicted one position earlier: by column c of the A + 1 logits.
        tokens = [-logits[row, c].log_softmax(0)[labels[row, c]] for c in range(4) if labels[row, c] != -100]
        expected.append(sum(tokens) / len(tokens))
    torch.testing.assert_close(answer_cross_entropy(logits, labels), torch.stack(expected).float())


def test_answer_cross_entropy_does_not_depend_on_the_other_answers_length():
    logits, labels = torch.randn(1, 3, 6), torch.tensor([[1, 2]])
    padded = torch.cat([torch.randn(1, 2, 6), logits], dim=1), torch.tensor([[-100, -100, 1, 2]])
    torch.testing.assert_close(answer_cross_entropy(*padded), answer_cross_entropy(logits, labels))


def test_answer_cross_entropy_gradient_equals_the_loop_s():
    labels = torch.tensor([[-100, 4], [3, 0]])
    first = torch.randn(2, 3, 6, requires_grad=True)
    second = first.detach().clone().requires_grad_()
    answer_cross_entropy(first, labels).sum().backward()
    tokens = -second.log_softmax(2)
    (tokens[0, 1, 4] + (tokens[1, 0, 3] + tokens[1, 1, 0]) / 2).backward()
    torch.testing.assert_close(first.grad, second.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_summed_in_float32(dtype):
    labels = torch.tensor([[1, 2], [0, 1]])
    logits = torch.randn(2, 3, 4).to(dtype)
    assert answer_cross_entropy(logits, labels).dtype == torch.float32
    torch.testing.assert_close(answer_cross_entropy(logits, labels), answer_cross_entropy(logits.float(), labels))
    assert label_cross_entropy(logits[:, 0], labels[:, 0]).dtype == torch.float32


def test_a_row_without_an_answer_gives_zero():
    labels = torch.tensor([[-100, -100], [1, 2]])
    assert answer_cross_entropy(torch.randn(2, 3, 4), labels)[0] == 0
