"""One rank of a training run: join the others, open what the run needs, train."""

import warnings
from dataclasses import asdict
from functools import partial
from pathlib import Path

from launch.heldout import evaluate_heldout
from megatron_vl.checkpoint.store import CheckpointStore
from megatron_vl.config.root import PretrainConfig
from megatron_vl.device.machine import pick_device, require_gpu_extra
from megatron_vl.device.process_group import destroy_distributed, initialize_distributed
from megatron_vl.device.processes import RankEnvironment
from megatron_vl.train.environment import current_commit, environment_versions
from megatron_vl.train.loop import Run
from megatron_vl.train.recorder import Recorder
from megatron_vl.train.resume import describe, find_start, fingerprint
from megatron_vl.train.run_dir import RunDirectory
from megatron_vl.train.session import pretrain
from megatron_vl.train.settings import StageSettings
from megatron_vl.train.signals import StopRequest
from megatron_vl.train.sources import open_sources


def run_rank(
    config: PretrainConfig, environment: RankEnvironment, stages: list[StageSettings], directory: RunDirectory
) -> int:
    """Train as this rank of the world. Returns the exit status: 0 also after an interrupt's checkpoint."""
    _quiet_libraries()
    device = pick_device(environment.local_rank)
    require_gpu_extra(device, config.parallel.transformer_engine)
    sources = open_sources(config.data, config.model, stages)
    initialize_distributed(environment, device, config.run.timeout_seconds)
    found = find_start(config, directory)
    writes = environment.rank == 0
    if writes:
        directory.write_config(asdict(config), current_commit(), environment_versions())
    names = [(stage.name, stage.values.steps) for stage in stages]
    with (
        StopRequest() as stop,
        Recorder(directory, names, config.tracking, asdict(config), enabled=writes) as recorder,
    ):
        run = Run(
            config=config,
            fingerprint=fingerprint(config),
            device=device,
            store=CheckpointStore(
                directory.checkpoints,
                config.checkpoint.keep,
                describe(config, sources.content.text.image_id),
                Path(config.data.tokenizer),
            ),
            recorder=recorder,
            stop=stop,
            evaluate=partial(
                evaluate_heldout, sources, config.heldout.max_samples, directory if writes else None
            ),
        )
        outcome = pretrain(stages, sources, run, found)
        recorder.say(f"{outcome}: {directory.report}")
    destroy_distributed()
    return 0


def _quiet_libraries() -> None:
    """What megatron-core does in ways that torch will drop, or would do better on a GPU, is no user's business."""
    for message in (
        "torch.distributed.(all_gather_into|reduce_scatter)_tensor. is deprecated",
        "The .grad attribute of a Tensor that is not a leaf",
        "When using async grad allreduce it is recommended",
    ):
        warnings.filterwarnings("ignore", message=message)
