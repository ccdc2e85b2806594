"""Floating-point operations of a training step, from shapes alone."""

from .estimate import Load, ModelShape


def flops(load: Load, mean_tokens: float | None = None) -> float:
    """Floating-point operations of one micro-batch: two a weight and token for each matrix product.

    A token costs 2 N forward and 4 N backward (gradients of inputs and of weights; 2 N where weights are frozen), with N
    the weights that it is multiplied by (https://huggingface.co/papers/2001.08361, section 2.1). Attention adds 4 L Q T a
    token forward and 8 L Q T backward, causal or not, as in PaLM's count of model FLOPs
    (https://huggingface.co/papers/2204.02311, appendix B). The head counts for the positions that it reads only.

    Args:
        mean_tokens (`float`, *optional*): Tokens of a row, the longest's by default.
    """
    length = load.tokens if mean_tokens is None else mean_tokens
    tokens, positions = load.rows * length, load.rows * load.answer

    def forward(shape: ModelShape) -> float:
        matrices = 2 * shape.matrices * tokens + 2 * shape.head * positions
        return matrices + 4 * shape.layers * shape.query * length * tokens

    shape, once = load.model, forward(load.model)
    attention = 4 * shape.layers * shape.query * length * tokens
    backward = (once - attention) * (2 if load.trains == "weights" else 1) + 2 * attention
    adapters = 6 * load.adapter * tokens if load.trains == "adapter" else 0
    again = 0.0
    if load.checkpointing:
        # Without the head, and without a Llama block's last layer: its output is saved nowhere, so torch stops before it.
        last = shape.layers * shape.hidden * shape.intermediate if shape.rms_norm else 0
        again = 2 * (shape.matrices - last) * tokens + attention
    total = load.networks * (once + (backward + again) * load.depth + adapters) + 6 * load.beside * tokens
    # Scores of student and teacher again, and the gradients of queries and keys.
    compared = 8 * load.compared_attention * shape.query * length * tokens
    return total + compared + sum(forward(teacher) for teacher in load.teachers)
