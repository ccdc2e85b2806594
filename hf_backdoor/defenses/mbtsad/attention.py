"""Attention distillation that never builds the maps: losses from recorded queries and keys, in blocks of rows.

The loss of a sample depends on that sample's queries and keys only, so its gradient in the backward pass is the
gradient of this one sum times one number. It is therefore made in the forward pass, while a block's probabilities are
at hand (as fused linear cross-entropy kernels do). What is kept is as large as queries and keys: O(B * H * T * d),
where materialised maps take O(layers * B * H * T^2).

Maps are compared before attention dropout, which on the maps that eager attention returns can't be done.
"""

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from .blocks import Block, BlockPlan, Group
from .losses import NORM_EPSILON
from .recording import RecordedAttention


# Entries of a block's map, [samples, heads, rows, keys]: in a CPU's cache; and on a GPU, where a block costs some fifty
# kernel launches whatever its size, as many as take the memory that the queries and keys take, within bounds.
CPU_BLOCK_ENTRIES = 2**20
GPU_BLOCK_ENTRIES = (2**23, 2**26)
# Both models' probabilities, the slope and the scores.
BYTES_OF_AN_ENTRY = 16


def attention_map_loss(
    student: list[RecordedAttention],
    teacher: list[RecordedAttention],
    attention_mask: Tensor,
    *,
    block_entries: int | None = None,
    compiler: str | None = None,
) -> Tensor:
    """L_a as the mean squared difference of softmax maps, over layers and each sample's valid entries, in float32.

    It equals [`~losses.eager_attention_map_loss`] on the maps, averaged over layers. Valid are entries whose query and
    key are both real tokens, the key in the query's reach (causality, sliding window).

    Args:
        student, teacher (`list[RecordedAttention]`): The same layers of both models on the same batch, from
            [`~recording.record_attention`]. Both lists are used up, so that a layer's tensors are freed as soon as its
            loss is there.
        attention_mask (`Tensor`): [B, T], nonzero for real tokens.
        block_entries (`int`, *optional*): Entries of a block's map; by default what suits the device.
        compiler (`str`, *optional*): Backend of `torch.compile` for what is computed for a block, on a GPU; none by
            default.

    Returns:
        `Tensor`: [B], differentiable (once) with respect to the student's queries and keys.

    Raises:
        `ValueError`: if the records fit neither each other nor the mask.
    """
    return _mean_over_layers(student, teacher, attention_mask, False, block_entries, compiler)


def nad_map_loss(
    student: list[RecordedAttention],
    teacher: list[RecordedAttention],
    attention_mask: Tensor,
    *,
    block_entries: int | None = None,
    compiler: str | None = None,
) -> Tensor:
    """L_a as NAD has it: the mean squared difference of normalised sums over heads of the squared attention.

    It equals [`~losses.eager_nad_map_loss`] on the maps, averaged over layers. A map's norm runs over the whole sample,
    so the probabilities are computed twice. Arguments, result and errors are those of [`attention_map_loss`].
    """
    return _mean_over_layers(student, teacher, attention_mask, True, block_entries, compiler)


# ---- Layers ----


def _mean_over_layers(
    student: list[RecordedAttention],
    teacher: list[RecordedAttention],
    attention_mask: Tensor,
    nad: bool,
    block_entries: int | None,
    compiler: str | None,
) -> Tensor:
    count = len(student)
    if count == 0 or count != len(teacher):
        raise ValueError(f"{count} layers of the student and {len(teacher)} of the teacher: record the same of both")
    on_gpu = attention_mask.is_cuda
    if block_entries is None:
        kept = sum(tensor.nbytes for layer in student + teacher for tensor in (layer.query, layer.key))
        block_entries = gpu_block_entries(kept) if on_gpu else CPU_BLOCK_ENTRIES
    plan = BlockPlan(attention_mask, block_entries)
    block_difference = _compiled(compiler) if compiler and on_gpu else _block_difference
    total = torch.zeros(len(attention_mask), device=attention_mask.device)
    while student:
        mine, theirs = student.pop(0), teacher.pop(0)
        _check(mine, theirs, attention_mask)
        layer = partial(_layer_difference, mine, theirs, plan, nad, block_difference)
        if torch.is_grad_enabled() and (mine.query.requires_grad or mine.key.requires_grad):
            total = total + _LayerLoss.apply(mine.query, mine.key, layer)
        else:
            total = total + layer(gradient=False)[0]
    return total / count


def gpu_block_entries(kept: float) -> int:
    """Entries of a block's map on a GPU that holds so many bytes of queries and keys."""
    least, most = GPU_BLOCK_ENTRIES
    return min(max(int(kept) // BYTES_OF_AN_ENTRY, least), most)


def _check(student: RecordedAttention, teacher: RecordedAttention, attention_mask: Tensor) -> None:
    shape = student.query.shape[:3]
    if teacher.query.shape[:3] != shape or teacher.reach != student.reach:
        raise ValueError(
            f"queries are {tuple(shape)} in the student and {tuple(teacher.query.shape[:3])} in the teacher (batch, heads, "
            f"tokens), reaching {student.reach} and {teacher.reach} keys: distil between models with the same heads, on "
            "the same batch"
        )
    if attention_mask.shape != (shape[0], shape[2]):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, and attention ran on {(shape[0], shape[2])}: pass "
            "one value for each token"
        )


class _LayerLoss(torch.autograd.Function):
    """One layer's loss for each sample, [B]; the gradients are there before the backward pass begins."""

    @staticmethod
    def forward(ctx: FunctionCtx, query: Tensor, key: Tensor, layer: Callable) -> Tensor:
        loss, *saved = layer(gradient=True)
        ctx.save_for_backward(*saved)
        ctx.used_up = False
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        if ctx.used_up:
            raise RuntimeError(
                "the attention loss is differentiated a second time (retain_graph=True), and its gradients are used up: "
                "compute the loss again, or add up what is to be differentiated"
            )
        ctx.used_up = True
        d_query, d_key, factor = ctx.saved_tensors
        # Kept as the gradient of a sum and divided here: as that of a mean over T^2 entries it would be 0 in float16.
        factor = (grad * factor)[:, None, None, None]
        # In place: they are as large as queries and keys, and nothing else needs them.
        return d_query.mul_(factor), d_key.mul_(factor), None


@torch.no_grad()
def _layer_difference(
    student: RecordedAttention,
    teacher: RecordedAttention,
    plan: BlockPlan,
    nad: bool,
    block_difference: Callable,
    gradient: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """The loss, [B]; two tensors like query and key; and the factor, [B], that makes gradients of them."""
    heads = student.query.shape[1]
    sums = torch.zeros(len(plan.real), device=plan.real.device)
    d_query, d_key = (torch.zeros_like(x) if gradient else None for x in (student.query, student.key))
    # Autocast would round the probabilities.
    with torch.autocast(plan.real.device.type, enabled=False):
        for group in plan.groups(heads, *student.reach):
            where = (group.samples, slice(None), group.span)
            tensors = (*_by_key_head(student, where), *_by_key_head(teacher, where))
            norms = _map_norms(tensors, group) if nad else None
            if gradient:
                rows = d_query[where]
                # A key's gradient comes from many blocks: it is added up in float32.
                columns = torch.zeros_like(tensors[1].mT, dtype=torch.float32)
            for block in group.blocks:
                found, d_rows, d_columns = block_difference(
                    *_part(tensors, block), block.shut, block.real, norms, gradient
                )
                sums[group.samples] += found
                if gradient:
                    rows[:, :, block.queries] = d_rows
                    columns[..., block.keys] += d_columns
            if gradient:
                d_key[where] = columns.mT
        if gradient:
            d_query *= student.scaling
    count = (plan.valid_entries(*student.reach) * (1 if nad else heads)).clamp(min=1)
    return sums / count, d_query, d_key, 2 / count


def _by_key_head(layer: RecordedAttention, where: tuple[slice, ...]) -> tuple[Tensor, Tensor]:
    """A group's scaled queries, [samples, H / G, G, S, d], and keys, [samples, H / G, S, d]; a key head has G queries."""
    query, key = layer.query[where], layer.key[where]
    dtype = torch.promote_types(query.dtype, key.dtype)
    key_heads = key.shape[1]
    query = (query.to(dtype) * layer.scaling).contiguous().unflatten(1, (key_heads, query.shape[1] // key_heads))
    return query, key.to(dtype).contiguous()


def _part(tensors: tuple[Tensor, ...], block: Block) -> tuple[Tensor, ...]:
    query, key, teacher_query, teacher_key = tensors
    return (
        query[..., block.queries, :],
        key[..., block.keys, :],
        teacher_query[..., block.queries, :],
        teacher_key[..., block.keys, :],
    )


def _map_norms(tensors: tuple[Tensor, ...], group: Group) -> Tensor:
    """For NAD's maps M of each sample, [samples, 3]: |M_S| + e, |M_T| + e and the part of the slope that lies along M_S.

    The slope of |N_S - N_T|^2 / 2 with N = M / (|M| + e) is (N_S - N_T - along * M_S) / (|M_S| + e).
    """
    products = torch.zeros(group.size, 3, dtype=torch.float64, device=tensors[0].device)
    for block in group.blocks:
        query, key, teacher_query, teacher_key = _part(tensors, block)
        mine = _nad_map(_probabilities(query, key, block.shut), block.real)
        theirs = _nad_map(_probabilities(teacher_query, teacher_key, block.shut), block.real)
        pairs = ((mine, mine), (theirs, theirs), (mine, theirs))
        products += torch.stack([(one * two).sum(dim=2).double().sum(dim=1) for one, two in pairs], dim=1)
    norm, teacher_norm = products[:, 0].sqrt(), products[:, 1].sqrt()
    mine, theirs = norm + NORM_EPSILON, teacher_norm + NORM_EPSILON
    # A sample of padding alone has no map.
    along = (products[:, 0] / mine - products[:, 2] / theirs) / (norm.clamp(min=NORM_EPSILON) * mine)
    return torch.stack([mine, theirs, along], dim=1).float()


# ---- A block ----


def _block_difference(
    query: Tensor,
    key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    shut: list[tuple[int, Tensor]],
    real: Tensor | None,
    norms: Tensor | None,
    gradient: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Squared differences of a block, summed for each sample, and half their gradients.

    Args:
        query, teacher_query (`Tensor`): [samples, H / G, G, R, d], scaled.
        key, teacher_key (`Tensor`): [samples, H / G, C, d].
        shut, real: As in [`~blocks.Block`].
        norms (`Tensor`, *optional*): From [`_map_norms`], to compare NAD's maps in place of the probabilities.

    Returns:
        [samples], [samples, H, R, d] (with respect to the scaled query) and [samples, H / G, d, C].
    """
    probabilities = _probabilities(query, key, shut)
    other = _probabilities(teacher_query, teacher_key, shut)
    if norms is None:
        difference = slope = torch.sub(probabilities, other, out=other)
        # Along rows first, for a long sum in float32 would lose digits.
        sums = torch.linalg.vector_norm(difference, dim=-1).square().sum(dim=(1, 2))
    else:
        mine, theirs, along = norms[:, :, None, None].unbind(dim=1)
        maps = _nad_map(probabilities, real)
        difference = maps / mine - _nad_map(other, real) / theirs
        sums = torch.linalg.vector_norm(difference, dim=-1).square().sum(dim=1)
        slope = torch.mul(probabilities, (2 * (difference - along * maps) / mine)[:, None], out=other)
    if not gradient:
        return sums, None, None
    # The softmax's backward pass, probabilities * (slope - sum(slope * probabilities)), in the slope's memory.
    slope.mul_(probabilities)
    slope.addcmul_(probabilities, slope.sum(dim=-1, keepdim=True), value=-1)
    scores = slope.to(query.dtype).unflatten(1, query.shape[1:3]).flatten(2, 3)
    d_query = (scores @ key).unflatten(2, query.shape[2:4]).flatten(1, 2)
    # Keys' gradient comes transposed, which is the faster product.
    return sums, d_query, query.flatten(2, 3).mT @ scores


@cache
def _compiled(backend: str) -> Callable:
    # Blocks differ in their number of keys.
    return torch.compile(_block_difference, dynamic=True, backend=backend)


def _probabilities(query: Tensor, key: Tensor, shut: list[tuple[int, Tensor]]) -> Tensor:
    """[samples, H, R, C], in float32."""
    scores = query.flatten(2, 3) @ key.mT
    scores = scores.unflatten(2, query.shape[2:4]).flatten(1, 2)
    for start, entries in shut:
        # Not -inf: a padded query's row is shut altogether, and comes out the same in both models.
        scores[..., start : start + entries.shape[-1]].masked_fill_(entries, torch.finfo(scores.dtype).min)
    return torch.softmax(scores, dim=-1, dtype=torch.float32)


def _nad_map(probabilities: Tensor, real: Tensor | None) -> Tensor:
    """[samples, R, C]: the sum over heads of the squared attention, and 0 in padded queries' rows."""
    maps = probabilities.square().sum(dim=1)
    return maps if real is None else maps * real[:, :, None]
