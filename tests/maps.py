"""Batches, and equal gradients: what the tests of the losses on attention maps share."""

import torch

from hf_backdoor.defenses.mbtsad.attention import attention_map_loss, nad_map_loss
from hf_backdoor.defenses.mbtsad.losses import eager_attention_map_loss, eager_nad_map_loss


LENGTH = 13
LOSSES = {
    attention_map_loss: eager_attention_map_loss,
    nad_map_loss: eager_nad_map_loss,
}


def batch(padding, length=LENGTH):
    torch.manual_seed(7)
    ids, mask = torch.randint(1, 40, (3, length)), torch.ones(3, length, dtype=torch.long)
    if padding == "left":
        mask[0, :5] = mask[1, :2] = 0
    elif padding == "right":
        mask[0, -5:] = mask[1, -2:] = 0
    elif padding == "holes":
        mask[0, 4:6] = mask[2, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


def assert_equal(found, expected, tolerance=1e-5):
    """Same parameters have gradients, each within `tolerance` of the largest of the whole model's."""
    assert found.keys() >= expected.keys()
    largest = max(grad.abs().max() for grad in expected.values())
    assert largest > 0
    for name, grad in found.items():
        wanted = expected.get(name, torch.zeros_like(grad))
        scale = max(wanted.abs().max().item(), 1e-3 * largest.item())
        assert (grad - wanted).abs().max() <= tolerance * scale, name
