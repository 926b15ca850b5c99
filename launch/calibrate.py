"""One rank of a calibration: builds two layers of the model with all its other parts, and times each unit."""

from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress

from launch.rank import quiet_libraries
from megatron_vl.config.errors import UserError
from megatron_vl.config.plan import PlanConfig
from megatron_vl.config.root import PretrainConfig
from megatron_vl.config.train import PARTS
from megatron_vl.device.machine import Device, pick_device, require_gpu_extra
from megatron_vl.device.process_group import destroy_distributed, initialize_distributed
from megatron_vl.device.processes import RankEnvironment
from megatron_vl.measure.calibrate import measure_units, measure_update
from megatron_vl.measure.timed_modules import Bench
from megatron_vl.measure.timing import clock_of
from megatron_vl.parallel.groups import build_groups
from megatron_vl.planning.calibration import Calibration, CalibrationKey, add_calibration
from megatron_vl.train.settings import resolve_stages
from megatron_vl.train.stage import Model, Start, build_model

LAYERS = 2
IMAGE_TOKEN = 0


def calibrate(config: PlanConfig, environment: RankEnvironment) -> int:
    """Time the units at parallel.tensor_size ranks and add them to the file cluster.calibration. Returns the status."""
    quiet_libraries()
    device = pick_device(environment.local_rank)
    require_gpu_extra(device, config.parallel.transformer_engine)
    initialize_distributed(environment, device, config.run.timeout_seconds)
    bench, model = open_bench(config, device)
    clock, writes = clock_of(device), environment.rank == 0
    with Progress(console=Console(stderr=True), transient=True, disable=not writes) as progress:
        bar = progress.add_task("timing the units", total=config.rounds + 1)
        units = measure_units(bench.units(), clock, config.rounds, lambda _: progress.advance(bar))
    seconds = measure_update(lambda: update(model), clock, config.rounds)
    if writes:
        key = CalibrationKey.of(
            config.model, config.train.precision, bench.tensor_size, bench.sequence_parallel
        )
        calibration = Calibration(
            key=key,
            device=torch.cuda.get_device_name() if device.kind == "cuda" else "cpu",
            units=units,
            per_parameter=seconds / bench.num_parameters,
        )
        path = calibration_path(config)
        add_calibration(path, calibration)
        print(
            f"calibrated {len(units)} units at TP {key.tensor_size} in {key.precision}: cluster.calibration={path}"
        )
    destroy_distributed()
    return 0


def open_bench(config: PretrainConfig, device: Device) -> tuple[Bench, Model]:
    """Two layers of the model with all its other parts, all of which train, on one pipeline stage. Collective."""
    config = _two_layers(config, dist.get_world_size())
    (settings,) = resolve_stages(config, dist.get_world_size())
    groups = build_groups(settings.topology, config.run.seed, device.torch_device)
    model = build_model(config, settings, groups, device, IMAGE_TOKEN, Start())
    bench = Bench(
        module=model.chunks[0].module,
        model=config.model,
        num_layers=LAYERS,
        tensor_size=settings.topology.tensor_size,
        sequence_parallel=settings.parallel.sequence_parallel,
        sequence_length=settings.values.sequence_length,
        device=device.torch_device,
    )
    return bench, model


def calibration_path(config: PlanConfig) -> Path:
    """Raise UserError where none is given."""
    if config.cluster.calibration is None:
        raise UserError(
            "calibrate=true needs cluster.calibration=FILE, the file to add this machine's times to"
        )
    return Path(config.cluster.calibration)


def _two_layers(config: PretrainConfig, world_size: int) -> PretrainConfig:
    if len(config.stages) != 1:
        raise UserError(
            f"stages={config.stages}: name the one whose rows to calibrate with, such as 'stages=[joint]'"
        )
    (name,) = config.stages
    stage = replace(
        getattr(config.stage, name),
        train=list(PARTS),
        parallel={},
        global_batch_size=world_size,
        micro_batch_size=1,
    )
    return replace(
        config,
        model=replace(config.model, language=replace(config.model.language, num_layers=LAYERS)),
        parallel=replace(
            config.parallel,
            pipeline_size=1,
            virtual_size=1,
            layout=None,
            vision_placement="replicated",
            overlap_grad_reduce=False,
            overlap_param_gather=False,
        ),
        train=replace(config.train, global_batch_size=None, micro_batch_size=None),
        stage=replace(config.stage, **{name: stage}),
    )


def update(model: Model) -> None:
    """What a step does with gradients: clear them, find their norm, update the weights."""
    for chunk in model.chunks:
        chunk.zero_grad_buffer()
    model.optimizer.zero_gradients()
    model.optimizer.prepare()
    model.optimizer.step(1.0)
