"""What one microbatch keeps for its backward pass in the language model, and what passes need besides for a moment.

Counted are storages, as autograd holds them for our modules: a view keeps the whole tensor that it looks at. H hidden
size, F MLP size, V vocabulary, A heads, D head size; T tokens of a microbatch, of which a rank normalises T/tp under
sequence parallelism. `fused` kernels are TransformerEngine's with flash attention; without them norms, rotary
embedding and SwiGLU are made of elementwise operators, which keep their operands too.
"""

from dataclasses import dataclass

from megatron_vl.config.model import LanguageConfig

FP32 = 4  # bytes
LOSS_BLOCK = 2**20  # logits that the loss takes in fp32 at once (model.vocabulary_loss)


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Tensors of one microbatch on one rank, in bytes."""

    language: LanguageConfig
    num_tokens: int
    tensor_size: int
    sequence_parallel: bool
    element_bytes: int
    fused: bool
    trained: frozenset[str]  # of config.train.PARTS
    recompute: str  # of planning.setting.RECOMPUTE

    @property
    def decoder_trains(self) -> bool:
        return "decoder" in self.trained

    @property
    def num_local_tokens(self) -> int:
        return self.num_tokens // (self.tensor_size if self.sequence_parallel else 1)

    @property
    def hidden(self) -> int:
        """The residual stream between two layers: what pipeline stages exchange."""
        return self.num_local_tokens * self.language.hidden_size * self.element_bytes

    @property
    def heads(self) -> int:
        """Queries, keys or values of one layer."""
        return self.num_tokens * self.language.hidden_size * self.element_bytes // self.tensor_size

    @property
    def ffn(self) -> int:
        """One half of what SwiGLU takes."""
        return self.num_tokens * self.language.ffn_hidden_size * self.element_bytes // self.tensor_size

    @property
    def statistics(self) -> int:
        """An fp32 number for each head and token: attention's log-sum-exp."""
        return FP32 * self.num_tokens * self.language.num_heads // self.tensor_size

    @property
    def norm(self) -> int:
        """A norm's input and its statistics; where weights train, also what they multiply."""
        values = self.num_local_tokens * self.language.hidden_size
        statistics = FP32 * self.num_local_tokens
        if self.fused:
            return self.hidden + statistics
        return FP32 * values * (2 if self.decoder_trains else 1) + statistics  # operators compute in fp32

    @property
    def attention(self) -> int:
        """From the norm's output to the projection's input. Values are a view of the fused projection's output."""
        inputs = (
            (self.hidden if self.decoder_trains else 0) + 3 * self.heads + 2 * self.heads
        )  # rotated queries and keys
        rotation = 0 if self.fused else 4 * self._rotation
        output = self.heads if self.decoder_trains else 0
        if self.recompute == "selective":
            return inputs + rotation + output
        # Segments' outputs are joined by a copy where there is no kernel for packed rows.
        kernel = self.heads if not (self.fused and self.decoder_trains) else 0
        return inputs + rotation + output + kernel + self.statistics

    @property
    def _rotation(self) -> int:
        """Cosines or sines of every token's angles."""
        head_size = self.language.hidden_size // self.language.num_heads
        return self.num_tokens * head_size * self.element_bytes

    @property
    def mlp(self) -> int:
        """The norm's output and the product, where the weights that they meet train; between them gate and linear half
        in one tensor and, without a fused kernel, silu(gate) and the linear half again (an offset is added to it)."""
        trained = self.hidden + self.ffn if self.decoder_trains else 0
        return trained + (2 if self.fused else 4) * self.ffn

    @property
    def whole_layer(self) -> int:
        """A layer that recomputes nothing, or selectively."""
        return 2 * self.norm + self.attention + self.mlp

    @property
    def layer(self) -> int:
        """What a layer keeps from its forward to its backward pass."""
        return self.hidden if self.recompute == "full" else self.whole_layer

    @property
    def layer_backward(self) -> int:
        """What a layer's backward pass takes beside what is kept: the stream's gradient and, where SwiGLU's backward
        begins, gradients of the product and of both halves, the product itself being gone; before that all of a
        recomputed layer, whose input is kept."""
        gradients = self.hidden + (2 if self.decoder_trains else 3) * self.ffn
        return gradients + (self.whole_layer if self.recompute == "full" else 0)

    @property
    def embedded(self) -> int:
        """Stage zero's output, of which sequence parallelism's part is a view: kept whole, beside what the first norm
        holds of it."""
        held = self.hidden if self.fused or self.element_bytes == FP32 else 0
        return self._whole - held

    @property
    def gathered(self) -> int:
        """The buffer that sequence parallelism gathers inputs in, for good."""
        return self._whole if self.sequence_parallel else 0

    @property
    def _whole(self) -> int:
        """The stream without sequence parallelism."""
        return self.num_tokens * self.language.hidden_size * self.element_bytes

    @property
    def exchanged(self) -> int:
        """A chunk's input and output, which the schedule holds for the backward pass where autograd does not."""
        input_bytes = 0 if self.fused or self.element_bytes == FP32 else self.hidden
        return input_bytes + (0 if self.fused else self.hidden)  # on CUDA a sent output is freed

    @property
    def head(self) -> int:
        """The final norm, its output where the head trains, the logits."""
        return self.norm + self.logits + (self.hidden if "head" in self.trained else 0)

    @property
    def logits(self) -> int:
        return self.num_logits * self.element_bytes

    @property
    def num_logits(self) -> int:
        return self.num_tokens * self.language.vocab_size // self.tensor_size

    @property
    def head_backward(self) -> int:
        """Beside what the head keeps, either two blocks of the loss in fp32 or, the logits' gradient having taken their
        place, the gradients of input and weights."""
        blocks = 0 if self.element_bytes == FP32 else min(2 * LOSS_BLOCK, self.num_logits) * FP32
        weight = self._vocabulary_weight if "head" in self.trained else 0
        return max(blocks, self._whole + weight)

    @property
    def embedding_backward(self) -> int:
        return self._vocabulary_weight if "embedding" in self.trained else 0

    @property
    def _vocabulary_weight(self) -> int:
        """A gradient of the weights of embedding or head, before it is added to its fp32 buffer."""
        return self.language.vocab_size * self.language.hidden_size * self.element_bytes // self.tensor_size
