"""What one microbatch keeps for its backward pass in the language model, and what passes need besides for a moment.

Counted are storages, as autograd holds them for our modules: a view keeps the whole tensor that it looks at. H hidden
size, F MLP size, V vocabulary, A heads, D head size; T tokens of a microbatch, of which a rank normalises T/tp under
sequence parallelism. `fused` kernels are TransformerEngine's with flash attention.
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
    recompute: str  # of config.parallel.RECOMPUTE
    joins_segments: bool  # rows have several, whose attention is joined where no kernel takes packed rows

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
        """A norm's input and its statistics."""
        return self.hidden + FP32 * self.num_local_tokens

    @property
    def attention(self) -> int:
        """From the norm's output to the projection's input. Values are a view of the fused projection's output; queries
        and keys are kept rotated, with the rotation where no kernel computes it again."""
        kept = (self.hidden if self.decoder_trains else 0) + 3 * self.heads + 2 * self.heads
        kept += 0 if self.fused else 4 * self._rotation
        if self.recompute == "selective":
            return kept + (self.heads if self.decoder_trains else 0)
        joined = self.heads if self.joins_segments and self.decoder_trains and not self.fused else 0
        return kept + self.heads + joined + self.statistics

    @property
    def _rotation(self) -> int:
        """Cosines or sines of every token's angles, of which a head has half as many as channels."""
        num_angles = self.language.hidden_size // self.language.num_heads // 2
        return self.num_tokens * num_angles * self.element_bytes

    @property
    def mlp(self) -> int:
        """The norm's output and SwiGLU's product, where the weights that they meet train; both halves in one tensor."""
        return (self.hidden + self.ffn if self.decoder_trains else 0) + 2 * self.ffn

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
        """What a layer's backward pass takes beside what is kept: the stream's gradient and, in SwiGLU's backward,
        gradients of the product and of both halves, and without a fused kernel a half more, the product itself being
        gone; before that all of a recomputed layer, whose input is kept."""
        num_halves = (2 if self.decoder_trains else 3) + (0 if self.fused else 1)
        gradients = self.hidden + num_halves * self.ffn
        return gradients + (self.whole_layer if self.recompute == "full" else 0)

    @property
    def embedded(self) -> int:
        """Stage zero's output, of which sequence parallelism's part is a view: kept whole, beside what the first norm
        holds of it."""
        return self._whole - self.hidden

    @property
    def gathered(self) -> int:
        """The buffer that sequence parallelism gathers inputs in, for good."""
        return self._whole if self.sequence_parallel else 0

    @property
    def _whole(self) -> int:
        """The stream without sequence parallelism."""
        return self.num_tokens * self.language.hidden_size * self.element_bytes

    @property
    def received(self) -> int:
        """A chunk's input, which the schedule holds for the backward pass where autograd does not."""
        return 0 if self.fused or self.element_bytes == FP32 else self.hidden

    @property
    def sent(self) -> int:
        """A chunk's output, which the schedule holds too; on CUDA it is freed once it is sent."""
        return 0 if self.fused else self.hidden

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
