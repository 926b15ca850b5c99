"""The units of planning.cost as real modules of this rank, with the loads that their times are taken for.

What planning keeps apart and modules do not is timed once: the final norm with the decoder's layers, the loss with the
head, the adaptor's layers as one.

Shapes: S tokens of a row, H hidden size, N images, T tokens of an image, C channels, A attention heads, D head size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron_vl.config.model import ModelConfig
from megatron_vl.measure.timing import TimedUnit
from megatron_vl.model.decoder import pack_parameters
from megatron_vl.model.encoders import VisionTowers
from megatron_vl.planning.workload import Load

ROW, TOKENS, IMAGES = (
    ("num_tokens", "num_pairs"),
    ("num_tokens",),
    ("num_images",),
)  # what a unit's time follows
NUM_IMAGES = (1, 3)  # of the loads that tell an image's time from a fixed one


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One rank's whole model of `num_layers` layers, and rows of `sequence_length` tokens for it."""

    module: Any  # VisionLanguageModel
    model: ModelConfig
    num_layers: int
    tensor_size: int
    sequence_parallel: bool
    sequence_length: int
    device: torch.device

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.module.parameters())

    def units(self) -> dict[str, TimedUnit]:
        """By the names of planning.cost."""
        towers = self.module.stage_zero.towers
        return {
            **self._decoder(),
            **self._stage_zero(),
            **(self._siglip(towers) if "siglip" in towers else {}),
            **(self._sam(towers) if "sam" in towers else {}),
        }

    def _decoder(self) -> dict[str, TimedUnit]:
        whole, half = self.sequence_length, self.sequence_length // 2
        rows = (_row([whole]), _row([half]), _row([whole // 4] * 4))
        language = self.module.language
        attention = language.block.layers[0].self_attention.core_attention

        def layers(load: Load) -> Callable[[], Tensor]:
            hidden_SBH, packed = self._hidden(load), self._packed(load)
            return lambda: language(hidden_SBH, packed)

        def core_attention(load: Load) -> Callable[[], Tensor]:
            num_heads = self.model.language.num_heads // self.tensor_size
            head_size = self.model.language.hidden_size // self.model.language.num_heads
            shape = (int(load.num_tokens), num_heads, head_size)
            q_TAD, k_TAD, v_TAD = (self._random(shape) for _ in range(3))
            packed = self._packed(load)
            return lambda: attention(q_TAD, k_TAD, v_TAD, None, packed_seq_params=packed)

        def head(load: Load) -> Callable[[], Tensor]:
            hidden_SBH, tokens_BS = self._hidden(load), self._tokens(load)
            return lambda: language.token_losses(hidden_SBH, tokens_BS)

        return {
            "decoder_layer": TimedUnit(
                module=language.block,
                loads=rows,
                prepare=layers,
                drivers=ROW,
                num_modules=self.num_layers,
            ),
            "core_attention": TimedUnit(module=nn.Module(), loads=rows, prepare=core_attention, drivers=ROW),
            "head": TimedUnit(module=language.head, loads=rows[:2], prepare=head, drivers=TOKENS),
        }

    def _stage_zero(self) -> dict[str, TimedUnit]:
        stage_zero = self.module.stage_zero
        rows = (_row([self.sequence_length]), _row([self.sequence_length // 2]))

        def embedding(load: Load) -> Callable[[], Tensor]:
            tokens_BS = self._tokens(load)
            return lambda: stage_zero.embedding(tokens_BS).transpose(0, 1).contiguous()

        def adaptor(load: Load) -> Callable[[], Tensor]:
            features_NTC = [
                self._random((int(load.num_images), encoder.num_tokens, encoder.output_width))
                for encoder in stage_zero.towers.encoders
            ]
            return lambda: stage_zero.adaptor(features_NTC)

        return {
            "embedding": TimedUnit(
                module=stage_zero.embedding, loads=rows, prepare=embedding, drivers=TOKENS
            ),
            "adaptor_output": TimedUnit(
                module=stage_zero.adaptor, loads=_images(), prepare=adaptor, drivers=IMAGES
            ),
        }

    def _siglip(self, towers: VisionTowers) -> dict[str, TimedUnit]:
        tower: Any = towers["siglip"]
        shape = (tower.num_tokens, tower.output_width)
        return {
            "siglip_patch": self._pixels(tower),
            "siglip_block": self._images(tower.blocks[0], [tower.blocks[0]], shape),
        }

    def _sam(self, towers: VisionTowers) -> dict[str, TimedUnit]:
        tower: Any = towers["sam"]
        config = self.model.vision.sam
        if config is None:
            raise ValueError("a SAM tower without its configuration")
        side = config.image_size // config.patch_size
        is_global = [index in config.global_layers for index in range(config.num_layers)]
        features = (config.neck_width, side, side)
        necks: list[Any] = [tower.neck] if config.hd_layer is None else [tower.neck, tower.neck_hd]
        units = {
            "sam_patch": self._pixels(tower),
            "sam_neck_input": self._images(
                nn.ModuleList(neck[:2] for neck in necks),
                [neck[:2] for neck in necks],
                (config.width, side, side),
            ),
            "sam_neck_output": self._images(
                nn.ModuleList(neck[2:] for neck in necks), [neck[2:] for neck in necks], features
            ),
            "sam_downsample": self._images(tower.downsamples, [tower.downsample], features),
        }
        for name, wanted in (("sam_window_block", False), ("sam_global_block", True)):
            if wanted in is_global:
                block = tower.blocks[is_global.index(wanted)]
                units[name] = self._images(block, [block], (side, side, config.width))
        return units

    def _pixels(self, tower: Any) -> TimedUnit:
        """Normalisation and patch embedding, from pixels that need no gradient."""

        def prepare(load: Load) -> Callable[[], Tensor]:
            side = max(encoder.image_size for encoder in self.module.stage_zero.towers.encoders)
            unit_NCHW = torch.rand(int(load.num_images), 3, side, side, device=self.device)
            return lambda: tower.patch_embed(tower.normalize(unit_NCHW))

        return TimedUnit(module=tower.patch_embed, loads=_images(), prepare=prepare, drivers=IMAGES)

    def _images(
        self, module: nn.Module, parts: Sequence[Callable[[Tensor], Tensor]], shape: tuple[int, ...]
    ) -> TimedUnit:
        """`parts` all take the same features, `shape` for an image; their outputs add up."""

        def prepare(load: Load) -> Callable[[], Tensor]:
            x = self._random((int(load.num_images), *shape))
            return lambda: torch.stack([part(x) for part in parts]).sum(0) if len(parts) > 1 else parts[0](x)

        return TimedUnit(module=module, loads=_images(), prepare=prepare, drivers=IMAGES)

    def _hidden(self, load: Load) -> Tensor:
        share = self.tensor_size if self.sequence_parallel else 1
        return self._random((int(load.num_tokens) // share, 1, self.model.language.hidden_size))

    def _random(self, shape: tuple[int, ...]) -> Tensor:
        dtype = next(self.module.parameters()).dtype
        return torch.randn(shape, dtype=dtype, device=self.device, requires_grad=True)

    def _tokens(self, load: Load) -> Tensor:
        return torch.randint(self.model.language.vocab_size, (1, int(load.num_tokens)), device=self.device)

    def _packed(self, load: Load) -> Any:
        num_tokens = int(load.num_tokens)
        length = round(2 * load.num_pairs / load.num_tokens)
        bounds = torch.arange(0, num_tokens + 1, length, dtype=torch.int32, device=self.device)
        return pack_parameters(bounds, length)


def _row(segments: Sequence[int]) -> Load:
    return Load(num_tokens=sum(segments), num_images=0, num_pairs=sum(length**2 / 2 for length in segments))


def _images() -> tuple[Load, ...]:
    return tuple(Load(num_tokens=0, num_images=number, num_pairs=0) for number in NUM_IMAGES)
