"""One rank of a training run: join the others, open what the run needs, train."""

import time
import warnings
from dataclasses import asdict
from functools import partial
from pathlib import Path

from launch.measure import MeasureBenchmarks, MeasureHeldout
from megatron_vl.checkpoint.store import CheckpointStore
from megatron_vl.config.root import PretrainConfig
from megatron_vl.device.garbage import Collector
from megatron_vl.device.machine import pick_device, require_gpu_extra
from megatron_vl.device.process_group import destroy_distributed, initialize_distributed
from megatron_vl.device.processes import RankEnvironment
from megatron_vl.evaluate.suite import check_items, load_suite
from megatron_vl.evaluate.suite_check import check_suite
from megatron_vl.train.environment import current_commit, environment_versions
from megatron_vl.train.evaluation import Evaluation
from megatron_vl.train.heartbeat import Heartbeat
from megatron_vl.train.loop import Run
from megatron_vl.train.metrics import JsonLines
from megatron_vl.train.profiling import ProfilerWindow
from megatron_vl.train.recorder import Recorder
from megatron_vl.train.resume import describe, fingerprint
from megatron_vl.train.run_dir import RunDirectory
from megatron_vl.train.session import pretrain
from megatron_vl.train.settings import StageSettings
from megatron_vl.train.signals import StopRequest
from megatron_vl.train.sources import Sources, open_sources
from megatron_vl.train.start import agree_on_start
from megatron_vl.train.startup import Startup


def run_rank(
    config: PretrainConfig, environment: RankEnvironment, stages: list[StageSettings], directory: RunDirectory
) -> int:
    """Train as this rank of the world. Returns the exit status: 0 also after an interrupt's checkpoint."""
    startup = Startup.of_process()
    startup.ended("imports")
    quiet_libraries()
    device = pick_device(environment.local_rank)
    require_gpu_extra(device, config.parallel.transformer_engine)
    sources = open_sources(config.data, config.model, stages, check_shards=environment.rank == 0)
    startup.ended("data indexes")
    initialize_distributed(environment, device, config.run.start_timeout_seconds)
    startup.ended("process group")
    found, notices = agree_on_start(config, directory)
    startup.ended("checkpoint search")
    writes = environment.rank == 0
    if writes:
        directory.write_config(asdict(config), current_commit(), environment_versions())
    names = [(stage.name, stage.values.steps) for stage in stages]
    with (
        StopRequest() as stop,
        Collector(config.train.faults.collect_garbage_every) as collector,
        Recorder(directory, names, config.tracking, asdict(config), enabled=writes) as recorder,
        Heartbeat(environment, config.run.hang_seconds, partial(_log_hang, directory)),
        ProfilerWindow(
            config.tracking.profile, directory.profile, environment.rank, device, recorder.say
        ) as profiler,
    ):
        run = Run(
            config=config,
            fingerprint=fingerprint(config),
            device=device,
            store=CheckpointStore(
                directory.checkpoints,
                config.checkpoint,
                describe(config, sources.content.text.image_id),
                Path(config.data.tokenizer),
                recorder.saved,
            ),
            recorder=recorder,
            stop=stop,
            collector=collector,
            startup=startup,
            profiler=profiler,
            evaluations=_evaluations(config, sources, directory if writes else None),
        )
        for notice in notices:
            recorder.say(notice)
        outcome = pretrain(stages, sources, run, found)
        recorder.say(f"{outcome}: {directory.report}")
    destroy_distributed()
    return 0


def _log_hang(directory: RunDirectory, verdict: str) -> None:
    """The process ends after it."""
    log = JsonLines(directory.faults)
    log.append({"time": time.time(), "kind": "hang", "verdict": verdict})
    log.sync()


def _evaluations(
    config: PretrainConfig, sources: Sources, directory: RunDirectory | None
) -> list[Evaluation]:
    heldout = MeasureHeldout(sources=sources, max_samples=config.heldout.max_samples, directory=directory)
    evaluations = [Evaluation(measure=heldout, every=config.heldout.every, at_start=True)]
    evaluation = config.evaluation
    if evaluation.benchmarks:
        benchmarks = MeasureBenchmarks(
            tasks=load_suite(check_suite(evaluation), evaluation.execute_code),
            content=sources.content,
            sequence_length=min(evaluation.sequence_length, config.model.language.max_positions),
            max_cached_positions=evaluation.max_cached_positions,
        )
        check_items(benchmarks.tasks, benchmarks.content, benchmarks.sequence_length)
        evaluations.append(Evaluation(measure=benchmarks, every=evaluation.every, at_start=False))
    return evaluations


def quiet_libraries() -> None:
    """What megatron-core does in ways that torch will drop, or would do better on a GPU, is no user's business."""
    for message in (
        ".?torch.distributed.(all_gather_into|reduce_scatter)_tensor. is deprecated",
        "The .grad attribute of a Tensor that is not a leaf",
        "When using async grad allreduce it is recommended",
        ".load_state_dict. is deprecated",
    ):
        warnings.filterwarnings("ignore", message=message)
