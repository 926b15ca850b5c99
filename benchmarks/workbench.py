"""Training steps of the product on gloo ranks, for benchmarks: composed configurations, rows drawn at random.

The model has the proportions of DeepSeek-VL 7B at a size that two cores step in a second: by FLOPs a head of 1.9
decoder layers, and vision towers of 0.8 layer an image, where a row has ROW_TOKENS tokens.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch.distributed as dist
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from launch.rank import quiet_libraries
from megatron_vl.config.model_check import image_size, tokens_per_image
from megatron_vl.config.root import PretrainConfig, register_schemas
from megatron_vl.data.batch import RowRule, UnitTokens, assemble, lay_out
from megatron_vl.data.microbatch import Microbatch
from megatron_vl.data.sharing import ImageSharing
from megatron_vl.data.types import Pack, Unit
from megatron_vl.device.machine import Device
from megatron_vl.measure.timing import working_clock
from megatron_vl.parallel.groups import Groups, build_groups, destroy_groups
from megatron_vl.parallel.shares import image_sharing
from megatron_vl.train.settings import StageSettings, resolve_stages
from megatron_vl.train.stage import Model, Start, build_model
from megatron_vl.train.step import Vote, train_step

ROW_TOKENS = 512
IMAGE_TOKEN = 5
PROPORTIONS = (
    "model.language.hidden_size=256",
    "model.language.num_layers=10",
    "model.language.ffn_hidden_size=688",
    "model.language.vocab_size=6832",
    "model.vision.siglip.width=192",
    "model.vision.siglip.num_layers=8",
    "model.vision.siglip.ffn_hidden_size=768",
    "model.vision.sam.width=128",
    "model.vision.sam.num_layers=4",
    "model.vision.sam.ffn_hidden_size=512",
)


def composed(*overrides: str) -> PretrainConfig:
    """A run's joint stage with the paper's freezing, in fp32; the command line's `overrides` on top."""
    fixed = ("train.precision=fp32", f"stage.joint.sequence_length={ROW_TOKENS}")
    return compose_run(*fixed, *PROPORTIONS, *overrides)


def compose_run(*overrides: str) -> PretrainConfig:
    """What launch.pretrain would make of these overrides, for the joint stage."""
    register_schemas()
    with initialize_config_module("hydra_conf", version_base="1.3"):
        tree = compose("pretrain", overrides=["stages=[joint]", *overrides])
    config: PretrainConfig = OmegaConf.to_object(tree)  # type: ignore[assignment]
    return config


@dataclass(frozen=True)
class Seconds:
    """Of one step on one rank. `cpu` leaves out what threads take that wait (measure.timing.working_clock)."""

    cpu: float
    wall: float


@dataclass(frozen=True, kw_only=True)
class Side:
    """One setting of a comparison, built on this rank. Sides of one grid of ranks share its process groups."""

    config: PretrainConfig
    settings: StageSettings
    model: Model
    clock: Callable[[], float]

    def microbatches(self, images: Sequence[int], seed: int = 0) -> list[Microbatch]:
        """A full row for each entry, with so many images, as the loader hands them to this rank."""
        draws = np.random.default_rng(seed)
        sharing = image_sharing(self.settings.parallel.vision_placement, self.model.groups)
        rows = zip(images, sharing.shares(images), strict=True)
        return [self._row(number, share, sharing, draws) for number, share in rows]

    def _row(
        self, num_images: int, share: range, sharing: ImageSharing, draws: np.random.Generator
    ) -> Microbatch:
        length = self.settings.values.sequence_length
        rule = RowRule(sequence_length=length, packing=True, micro_batch_size=1)
        unit = Unit(source="random", sample=0, piece=0, num_tokens=length, num_images=num_images)
        tokens = draws.integers(IMAGE_TOKEN + 1, self.config.model.language.vocab_size, length + 1)
        is_image = np.arange(length) < num_images * tokens_per_image(self.config.model)
        content = UnitTokens(
            inputs=np.where(is_image, IMAGE_TOKEN, tokens[:-1]), labels=tokens[1:], loss_mask=~is_image
        )
        side = image_size(self.config.model)
        pixels_NCHW = draws.integers(0, 256, (num_images, 3, side, side), dtype=np.uint8)
        row = assemble(
            lay_out([Pack((unit,))], rule, length),
            [content],
            pixels_NCHW[share.start : share.stop],
            with_inputs=True,
            with_labels=True,
            filler_id=0,
        )
        return replace(row, shares_images=sharing.size > 1)

    def step(self, microbatches: list[Microbatch]) -> Seconds:
        """Train on them. Returns what this rank took; ranks begin together."""
        model = self.model
        dist.barrier()
        cpu, wall = self.clock(), time.perf_counter()
        train_step(model.chunks, model.optimizer, microbatches, model.groups, 1.0, Vote(), model.spread)
        return Seconds(cpu=self.clock() - cpu, wall=time.perf_counter() - wall)


def build_side(config: PretrainConfig, groups: Groups | None = None) -> Side:
    """Collective. `groups` are those of another side with the same grid of ranks; None makes them."""
    quiet_libraries()
    (settings,) = resolve_stages(config, dist.get_world_size())
    device = Device("cpu")
    if groups is None:
        groups = build_groups(settings.topology, config.run.seed, device.torch_device)
    model = build_model(config, settings, groups, device, IMAGE_TOKEN, Start())
    return Side(config=config, settings=settings, model=model, clock=working_clock())


def in_turns(
    configs: Mapping[str, PretrainConfig], steps: Mapping[str, Sequence[int]], rounds: int
) -> dict[str, dict[str, list[Seconds]]]:
    """On one rank: what each side took for a step of each kind (the images of its microbatches), round by round.

    Sides have one grid of ranks. A first round warms up. The order turns round every round.
    """
    groups: Groups | None = None
    sides: dict[str, Side] = {}
    for name, config in configs.items():
        sides[name] = build_side(config, groups)
        groups = sides[name].model.groups
    rows = {
        (name, kind): side.microbatches(images)
        for name, side in sides.items()
        for kind, images in steps.items()
    }
    taken: dict[str, dict[str, list[Seconds]]] = {name: {kind: [] for kind in steps} for name in sides}
    for number in range(rounds + 1):
        for name, kind in list(rows) if number % 2 == 0 else reversed(rows):
            seconds = sides[name].step(rows[name, kind])
            if number > 0:
                taken[name][kind].append(seconds)
    dist.barrier()
    destroy_groups()
    return taken
