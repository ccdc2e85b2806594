"""The memory that a training stage needs, from shapes alone: bytes on each device.

Nothing is loaded and nothing is run. Memory is that of tensors, as `torch.cuda.max_memory_allocated` counts it; a
process needs about 1 GiB more (CUDA context, libraries, the allocator's gaps). Activations are what autograd saves,
counted tensor by tensor for the two blocks that language models are built of:

- BERT's, with layer norms and a plain MLP: 16 h a token at I = 4 h, which in 16 bits and with the two dropout masks is
  the 34 h bytes of Korthikanti et al. (https://huggingface.co/papers/2205.05198, section 4), less the attention maps
  that fused attention never keeps (https://huggingface.co/papers/2205.14135);
- Llama's, with RMS norms (which transformers computes in float32) and a gated MLP.

`tests/test_estimate.py` holds both to what torch saves and allocates.
"""

from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedModel

from .data import find_blocks
from .defenses.mbtsad.attention import BYTES_OF_AN_ENTRY, gpu_block_entries


# What linear layers of a quantized base take a weight. nf4 with double quantization has 4 bits, and 0.127 more for the
# scales of its blocks of 64 (https://huggingface.co/papers/2305.14314, section 3).
QUANTIZED_BYTES = {"nf4": 4.127 / 8, "int8": 1.0}
# Elements of each of ZeRO-2's two communication buckets, as DeepSpeed has them by default.
ZERO2_BUCKET = 500_000_000


@dataclass(frozen=True)
class ModelShape:
    """What memory and time of a model depend on.

    Args:
        parameters (`int`): All of them.
        blocks (`int`): Those of its blocks; the rest are embeddings, last norm and head.
        matrices (`int`): Weights of the blocks that tokens are multiplied by.
        head (`int`): Weights of the head (of a causal LM also where it is tied to the embeddings).
        layers, hidden, intermediate (`int`): Number of blocks; width of the stream and of the MLP.
        query, key (`int`): Width of all query heads, and of all key heads, which are fewer where they are shared.
        outputs (`int`): Logits at one position.
        gated, rms_norm (`bool`): Llama's MLP and norm; BERT's otherwise.
        dropout (`bool`): Whether hidden states are dropped, so that masks are kept.
    """

    parameters: int
    blocks: int
    matrices: int
    head: int
    layers: int
    hidden: int
    intermediate: int
    query: int
    key: int
    heads: int
    outputs: int
    gated: bool
    rms_norm: bool
    dropout: bool = False

    @classmethod
    def of(cls, model: PreTrainedModel) -> "ModelShape":
        """The shape of a model, which may lie on the meta device."""
        config = model.config.get_text_config()
        blocks = [model.get_submodule(name) for name in find_blocks(model)]
        inside = [parameter for block in blocks for parameter in block.parameters()]
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        key = width * (getattr(config, "num_key_value_heads", None) or heads)
        matrices = sum(p.numel() for p in inside if p.dim() == 2)
        intermediate = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        attention = 2 * config.hidden_size * (heads * width + key)
        mlp = matrices / len(blocks) - attention
        causal = model.can_generate()
        head = model.get_output_embeddings().weight.numel() if causal else 0
        drops = ("hidden_dropout_prob", "resid_pdrop", "hidden_dropout")
        return cls(
            parameters=sum(p.numel() for p in model.parameters()),
            blocks=sum(p.numel() for p in inside),
            matrices=matrices,
            head=head,
            layers=len(blocks),
            hidden=config.hidden_size,
            intermediate=intermediate,
            query=heads * width,
            key=key,
            heads=heads,
            outputs=config.vocab_size if causal else config.num_labels,
            gated=mlp > 2.5 * config.hidden_size * intermediate,
            rms_norm=any("RMSNorm" in type(m).__name__ for m in blocks[0].modules()),
            dropout=any(getattr(config, name, 0) for name in drops),
        )


@dataclass(frozen=True)
class Engine:
    """What runs the processes, and how many there are, one a device.

    Args:
        kind (`str`): `"single"`, `"ddp"`, `"fsdp2"`, `"zero2"` or `"zero3"`.
        processes (`int`): On all machines together.
        offload (`bool`): Whether what is sharded lies in the host's memory (ZeRO).
    """

    kind: Literal["single", "ddp", "fsdp2", "zero2", "zero3"] = "single"
    processes: int = 1
    offload: bool = False

    @property
    def deepspeed(self) -> bool:
        return self.kind.startswith("zero")

    @property
    def shards_weights(self) -> bool:
        return self.kind in ("fsdp2", "zero3")


SINGLE = Engine()


@dataclass(frozen=True)
class Load:
    """What one device works on in a stage.

    Args:
        model (`ModelShape`): What is trained.
        rows, tokens, answer (`int`): Of a micro-batch: rows, tokens of the longest, and positions that the head reads.
        trains (`str`): `"weights"`; an `"adapter"` in frozen ones; or a `"mask"`, and no weights.
        adapter (`int`): Parameters of an adapter. beside (`int`): of what is trained along with a network (connectors).
        networks (`int`): How many networks of this shape are trained at once.
        teachers (`tuple[ModelShape, ...]`): Frozen models beside them.
        dtype (`int`): Bytes of a weight as it is loaded, 4 or 2. quantization (`str`, *optional*): `"nf4"` or `"int8"`, of
            frozen weights.
        bf16 (`bool`): Mixed precision (`bf16: true`).
        checkpointing (`bool`): Whether blocks are run again in the backward pass.
        accumulation (`int`): Micro-batches of an optimizer step.
        optimizer (`str`): As in `TrainingArguments.optim`.
        attention (`str`): As in `from_pretrained`. liger (`bool`): Whether Liger's kernels run Llama's norms and MLP.
        compared_attention, compared_hidden (`int`): Layers whose queries and keys, or outputs, are kept of student and
            teacher (MBTSAD).
        depth (`float`): Share of the blocks that the gradient comes down to.
    """

    model: ModelShape
    rows: int
    tokens: int
    answer: int = 1
    trains: Literal["weights", "adapter", "mask"] = "weights"
    adapter: int = 0
    beside: int = 0
    networks: int = 1
    teachers: tuple[ModelShape, ...] = ()
    dtype: int = 4
    quantization: str | None = None
    bf16: bool = False
    checkpointing: bool = False
    accumulation: int = 1
    optimizer: str = "adamw_torch"
    attention: str = "sdpa"
    liger: bool = False
    compared_attention: int = 0
    compared_hidden: int = 0
    depth: float = 1.0

    @property
    def trained(self) -> int:
        """Parameters that the optimizer holds."""
        own = {"weights": self.model.parameters, "adapter": self.adapter, "mask": 0}[self.trains]
        return self.networks * (own + self.beside)


@dataclass(frozen=True)
class Widths:
    """Bytes of a number, by where it is.

    Args:
        frozen, trained, gradient, states (`float`): Of a parameter at rest; `states` is all that the optimizer keeps of one.
        stream (`int`): In the residual stream. matmul (`int`): As the operand of a matrix product.
        copied (`int`): Of the copy that every linear layer makes of its input, 0 where layers share it as it is.
    """

    frozen: float
    trained: int
    gradient: int
    states: float
    stream: int
    matmul: int
    copied: int


def widths(load: Load, engine: Engine) -> Widths:
    """How wide numbers are under an engine."""
    adapter = load.trains == "adapter"
    half = load.bf16 and engine.kind in ("fsdp2", "zero2", "zero3")
    frozen = QUANTIZED_BYTES[load.quantization] if load.quantization else load.dtype
    # peft makes adapters in float32 on a base in 16 bits (autocast_adapter_dtype).
    trained = 4 if adapter or (load.bf16 and engine.kind == "fsdp2") else load.dtype
    gradient, states = trained, _states(load.optimizer, trained)
    if half and engine.deepspeed:
        # DeepSpeed turns the model into bf16 and keeps a float32 copy, sharded, with the optimizer's states
        # (https://huggingface.co/papers/1910.02054, section 3.1: 2 + 2 + 12).
        frozen, trained, gradient, states = min(frozen, 2), 2, 2, 4 + _states(load.optimizer, 4)
    # FSDP2's mixed precision computes with weights cast to bf16, and so does DeepSpeed; autocast leaves the stream alone.
    stream = 2 if half else load.dtype
    matmul = 2 if load.bf16 or load.dtype == 2 else 4
    if adapter and not load.bf16:
        # peft casts the input to its adapter's float32, which `defenses/autocast.py` does without.
        copied = 0 if stream == 4 else 4
    else:
        copied = matmul if stream != matmul else 0
    return Widths(frozen, trained, gradient, states, stream, matmul, copied)


def _states(optimizer: str, width: int) -> float:
    """Bytes of optimizer state for a parameter: Adam's two moments, in its own type or in eight bits."""
    if "8bit" in optimizer:
        return 2.0
    return 0.0 if optimizer in ("sgd", "adafactor") else 2.0 * width


# ---- Memory ----


@dataclass(frozen=True)
class Memory:
    """Bytes on each device.

    Args:
        weights, gradients, optimizer (`float`): Of what is trained, and of frozen weights under an adapter.
        teacher (`float`): Weights of frozen models beside it.
        activations (`float`): What autograd saves; at_work: what the backward pass adds to that where it is.
        distillation (`float`): Queries, keys and hidden states that are kept to be compared.
        logits (`float`): At the positions that the head reads, with their gradients.
        engine (`float`): Buffers and gathered weights.
        peak (`float`): Most at one time: less than the sum, for gradients come as activations go.
        host (`float`): On the host, for each device.
    """

    weights: float
    gradients: float
    optimizer: float
    teacher: float
    activations: float
    at_work: float
    distillation: float
    logits: float
    engine: float
    peak: float
    host: float = 0.0


def block_activations(load: Load, engine: Engine) -> float:
    """What autograd saves in one block for one token, in bytes."""
    shape, width = load.model, widths(load, engine)
    full, adapter = load.trains == "weights", load.trains == "adapter"
    h, i, q, k = shape.hidden, shape.intermediate, shape.query, shape.key
    # transformers' RMS norm keeps its input in float32 and, to train its weight, the normed value; autocast runs torch's
    # layer norm in float32.
    # Liger's keeps its input as it is.
    norm = (4 + full * width.stream) if shape.rms_norm else (4 if load.bf16 else width.stream)
    norm = width.stream if load.liger and shape.rms_norm else norm
    norms = 2 * h * (norm + shape.dropout)
    # Queries, keys and values read the stream, and the MLP's one or two layers: shared, or a copy for each.
    readers = 3 + (2 if shape.gated else 1)
    inputs = h * (readers * width.copied or 2 * width.matmul) if full or adapter else 0
    # transformers repeats shared keys and values where there is a mask, and attention keeps that for itself; and the
    # output, and a float32 a head for the softmax.
    masked = load.rows > 1 and "flash" not in load.attention
    attention = width.matmul * ((3 * q + load.tokens) if masked else (q + 2 * k)) + 4 * shape.heads
    if load.attention == "eager":
        # The softmax in float32, and the copy that it is turned into for the product.
        attention += shape.heads * load.tokens * (4 if width.matmul == 4 else 6)
    attention += q * width.matmul + (q * width.copied if adapter else 0)
    last = (width.copied if adapter and width.copied else width.matmul) if full or adapter else 0
    # A gated one keeps gate, activated gate and up; Liger's activates the gate again.
    mlp = i * ((3 - load.liger if shape.gated else 1) * width.matmul + last)
    return norms + inputs + attention + mlp


def memory(load: Load, engine: Engine = SINGLE) -> Memory:
    """Peak memory of one device, and what it is made of."""
    shape, width, full = load.model, widths(load, engine), load.trains == "weights"
    n, tokens = engine.processes, load.rows * load.tokens
    outside = shape.parameters - shape.blocks
    weights = load.trained * width.trained + (
        0 if full else load.networks * _at_rest(shape, load, width, width.frozen)
    )
    gradients, optimizer = load.trained * width.gradient, load.trained * width.states
    # Where nothing is sharded, a teacher's linear layers lie in memory as autocast multiplies them.
    kept = min(width.frozen, width.matmul) if engine.kind in ("single", "ddp") else width.frozen
    teacher = sum(_at_rest(each, load, width, kept) for each in load.teachers)

    block = block_activations(load, engine) * tokens
    layers = load.networks * shape.layers * load.depth
    # Outside the blocks: the last norm's, or the input and output of the embeddings' norm and the last block's output.
    around = 4 + full * width.stream if shape.rms_norm else width.stream + width.matmul
    activations = load.networks * tokens * shape.hidden * around
    # What the backward pass works with: the gradients of a block's widest values; measured, a third of what it saves, and
    # half with adapters, which have copies of their own.
    at_work = block / (2 if load.trains == "adapter" else 3)
    if load.checkpointing:
        # A block's input in the place of what it saves, and one block as it is run again.
        activations += layers * tokens * shape.hidden * width.stream
        at_work += block
    else:
        activations += layers * block
        if load.bf16 and width.stream == 4:
            # Autocast's copies of the weights are saved as well.
            activations += 2 * load.networks * shape.matrices * load.depth
    before, after = kept_for_distillation(load, engine)
    # Logits in float32, their log-softmax (which is saved), and the gradients of both.
    logits = 16 * load.networks * load.rows * load.answer * shape.outputs

    share_weights = n if engine.shards_weights else 1
    share_state = n if engine.kind in ("fsdp2", "zero2", "zero3") else 1
    extra = 0.0
    if engine.kind == "ddp":
        extra = gradients  # the buckets that are averaged
    elif engine.kind == "zero2":
        extra = 2 * width.gradient * min(ZERO2_BUCKET, load.trained)
    elif engine.shards_weights:
        # What is gathered: the block at work and the next one, and what lies outside the blocks.
        gathered = 2 * shape.blocks / shape.layers + outside
        extra = gathered * width.matmul + (gathered * width.gradient if full else 0)
    weights, teacher = weights / share_weights, teacher / share_weights
    gradients, optimizer = gradients / share_state, optimizer / share_state
    host = 0.0
    if engine.offload:
        host = optimizer + gradients + (weights + teacher if engine.kind == "zero3" else 0)
        optimizer = gradients = 0.0
        if engine.kind == "zero3":
            weights = teacher = 0.0
    stored = activations + after
    # Gradients are set to None after a step, and come in as the backward pass gives up what was stored.
    if load.accumulation == 1 and engine.kind in ("single", "fsdp2", "zero3"):
        passing = max(activations + before, stored + logits, max(stored, gradients) + at_work)
    else:
        passing = gradients + max(activations + before, stored + max(logits, at_work))
    peak = weights + optimizer + teacher + extra + passing
    return Memory(
        weights, gradients, optimizer, teacher, activations, at_work, max(before, after), logits, extra, peak, host
    )


def _at_rest(shape: ModelShape, load: Load, width: Widths, matrix: float) -> float:
    """Bytes of a frozen model, of `matrix` bytes for each weight of the blocks' matrices (quantized, for example); embeddings, norms
    and head stay as they are loaded."""
    plain = min(load.dtype, 2) if width.trained == 2 else load.dtype
    return shape.matrices * matrix + (shape.parameters - shape.matrices) * plain


def kept_for_distillation(load: Load, engine: Engine) -> tuple[float, float]:
    """Bytes that MBTSAD's distillation keeps beside what autograd does anyway: as its losses begin, and afterwards."""
    shape, width, tokens = load.model, widths(load, engine), load.rows * load.tokens
    # Rotary embeddings are in the stream's type: under autocast queries and keys come out in float32.
    recorded = width.stream if shape.rms_norm else width.matmul
    both = (shape.query + shape.key) * recorded
    at_work = 0.0
    if load.attention == "eager":
        before = after = load.compared_attention * shape.heads * load.tokens * (2 * 4 + width.matmul)
    else:
        # The teacher's queries and keys; and the student's own where attention has saved others in their place. As layers
        # are compared, the gradients of the student's take the place of both.
        own = both if load.checkpointing or recorded != width.matmul else 0
        repeated = shape.key * recorded if not own and load.rows > 1 and shape.key < shape.query else 0
        before = load.compared_attention * (both + own + repeated)
        after = load.compared_attention * (both + repeated)
        if load.compared_attention:
            kept = 2 * load.compared_attention * both * tokens
            block = min(load.rows * shape.heads * load.tokens**2, gpu_block_entries(kept))
            at_work = BYTES_OF_AN_ENTRY * block
    # Both models' states, which differences in float32 take the place of. Under autocast accelerate hands out float32 copies of
    # what the student gives, and of what its own teacher's adapter does; else the student's are the stream, which is kept anyway.
    copied = 4 if load.bf16 and engine.kind in ("single", "ddp") and width.stream == 2 else 0
    theirs = width.stream if load.teachers else max(width.stream, copied)
    before += load.compared_hidden * shape.hidden * (theirs + copied)
    after += load.compared_hidden * shape.hidden * 4
    return before * tokens + at_work, after * tokens
