"""What a stage's plan is made by, and whether one can be made. No torch: the launcher asks, too."""

from megatron_vl.config.root import PretrainConfig
from megatron_vl.data.balance import RowCost
from megatron_vl.data.plan import Planner
from megatron_vl.data.plan_settings import PlanSettings, choose_lanes
from megatron_vl.planning.dealing import slowest_stage
from megatron_vl.planning.workload import Load
from megatron_vl.train.settings import StageSettings
from megatron_vl.train.sources import Sources


def check_plan(config: PretrainConfig, stage: StageSettings, sources: Sources) -> None:
    """Raises UserError where the stage's values, sources and sizes allow no plan."""
    Planner(sources.tables(), plan_settings(config, stage, sources), dp_size=stage.topology.data_size)


def plan_settings(config: PretrainConfig, stage: StageSettings, sources: Sources) -> PlanSettings:
    """What the stage's plan is made by. Raises UserError where the values make none."""
    data, values = config.data, stage.values
    return PlanSettings(
        stage=stage.name,
        seed=config.run.seed,
        num_steps=values.steps,
        text_ratio=values.text_ratio,
        text_warmup_fraction=values.text_warmup_fraction,
        grouping=values.grouping,
        sources=values.sources,
        max_epochs=values.max_epochs,
        global_batch_size=values.global_batch_size,
        micro_batch_size=values.micro_batch_size,
        sequence_length=values.sequence_length,
        packing=values.packing,
        lanes=choose_lanes(data.lanes, values.global_batch_size),
        shuffle_window=data.shuffle_window,
        packing_window=data.packing_window,
        max_carry_steps=data.max_carry_steps,
        flush_steps=data.flush_steps,
        max_images_per_pack=data.max_images_per_pack,
        balance_lanes=data.balance_lanes,
        cost=_row_cost(config, stage, sources),
    )


def _row_cost(config: PretrainConfig, stage: StageSettings, sources: Sources) -> RowCost:
    """What rows cost the stage's slowest pipeline rank, by the sources' mean sample."""
    length = stage.values.sequence_length
    indexes = [sources.training[name] for name, weight in stage.values.sources.items() if weight > 0]
    num_samples = sum(index.num_samples for index in indexes)
    num_images = sum(index.num_images for index in indexes)
    per_image = sources.content.image_tokens.tokens_per_image
    num_tokens = sum(index.num_text_tokens for index in indexes) + num_images * per_image
    row = Load(
        num_tokens=length,
        num_images=length * num_images / max(num_tokens, 1),
        num_pairs=length * min(num_tokens / max(num_samples, 1), length) / 2,
    )
    flops = slowest_stage(config.model, stage.layout, stage.topology, stage.values.train, row)
    return RowCost(
        per_token=flops.per_token // 1000, per_image=flops.per_image // 1000, per_pair=flops.per_pair * 1000
    )
