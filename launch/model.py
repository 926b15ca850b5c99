"""A checkpoint's model on this rank, ready to be asked: what benchmarks and chat begin with."""

from pathlib import Path

from launch.rank import quiet_libraries
from megatron_vl.checkpoint.description import Description
from megatron_vl.checkpoint.opening import open_model
from megatron_vl.config.evaluate import EvaluateConfig
from megatron_vl.device.machine import pick_device, require_gpu_extra
from megatron_vl.device.process_group import initialize_distributed, set_timeout
from megatron_vl.device.processes import RankEnvironment
from megatron_vl.evaluate.evaluator import Evaluator
from megatron_vl.evaluate.items import Progress, no_progress
from megatron_vl.train.sources import content_rule, text_rule


def open_evaluator(
    config: EvaluateConfig,
    description: Description,
    environment: RankEnvironment,
    progress: Progress = no_progress,
) -> Evaluator:
    """Join the other ranks and load this one's part of the model. Collective over the world.

    Raises:
        UserError: tokenizer and model do not fit, or the model cannot be divided so.
    """
    quiet_libraries()
    device = pick_device(environment.local_rank)
    require_gpu_extra(device, config.parallel.transformer_engine)
    content = content_rule(text_rule(config.data, description.model), description.model, config.data)
    initialize_distributed(environment, device, config.run.start_timeout_seconds)
    opened = open_model(Path(config.checkpoint), config.parallel, config.precision, device)
    set_timeout(config.run.timeout_seconds)
    return Evaluator(
        chunks=opened.chunks,
        groups=opened.groups,
        content=content,
        sequence_length=min(config.evaluation.sequence_length, description.model.language.max_positions),
        max_cached_positions=config.evaluation.max_cached_positions,
        progress=progress,
    )
