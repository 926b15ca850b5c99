"""What one microbatch keeps for its backward pass in the language model, and what passes need besides for a moment.

Counted are storages, as autograd holds them for our modules: a view keeps the whole tensor that it looks at. H hidden
size, F MLP size, V vocabulary, A heads, D head size; T tokens of a microbatch, of which a rank normalises T/tp under
sequence parallelism. `fused` kernels are TransformerEngine's with flash attention; without them norms, rotary
embedding and SwiGLU are made of elementwise operators, which keep their operands too.
"""

from dataclasses import dataclass

from megatron_vl.config.model import LanguageConfig

FP32 = 4  # bytes


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Tensors of one microbatch on one rank, in bytes."""

    language: LanguageConfig
    num_tokens: int
    tensor_size: int
    sequence_parallel: bool
    element_bytes: int
    fused: bool
    trained: bool  # the decoder's weights
    recompute: str  # of planning.setting.RECOMPUTE

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
        return FP32 * values * (2 if self.trained else 1) + statistics  # operators compute in fp32

    @property
    def attention(self) -> int:
        """From the norm's output to the projection's input. Values are a view of the fused projection's output."""
        inputs = (
            (self.hidden if self.trained else 0) + 3 * self.heads + 2 * self.heads
        )  # rotated queries and keys
        rotation = 0 if self.fused else 4 * self._rotation
        output = self.heads if self.trained else 0
        if self.recompute == "selective":
            return inputs + rotation + output
        # Segments' outputs are joined by a copy where there is no kernel for packed rows.
        kernel = self.heads if not (self.fused and self.trained) else 0
        return inputs + rotation + output + kernel + self.statistics

    @property
    def _rotation(self) -> int:
        """Cosines or sines of every token's angles."""
        head_size = self.language.hidden_size // self.language.num_heads
        return self.num_tokens * head_size * self.element_bytes

    @property
    def mlp(self) -> int:
        """Gate and linear half in one tensor; then, without a fused kernel, silu(gate) and the linear half again (an
        offset is added to it); the product, where the weights that it meets train."""
        return (self.hidden if self.trained else 0) + (
            (2 if self.fused else 4) + (1 if self.trained else 0)
        ) * self.ffn

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
        """The most that a layer's backward pass needs for a moment beside what was kept: gradients of the MLP's halves
        and of the stream, or all of the layer again where it is recomputed."""
        again = self.whole_layer if self.recompute == "full" else 0
        return again + 3 * self.ffn + 2 * self.hidden

    @property
    def logits(self) -> int:
        return self.num_tokens * self.language.vocab_size * self.element_bytes // self.tensor_size

    @property
    def vocabulary_weight(self) -> int:
        """The weights of the embedding or the head; a gradient of them before it is added to its fp32 buffer."""
        return self.language.vocab_size * self.language.hidden_size * self.element_bytes // self.tensor_size
