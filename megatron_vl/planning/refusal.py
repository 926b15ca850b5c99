"""Why nothing fits, and what near by would."""

from dataclasses import fields, replace
from math import gcd

from megatron_vl.config.errors import UserError
from megatron_vl.config.plan import SearchConfig
from megatron_vl.planning.candidate import Candidate, Problem
from megatron_vl.planning.grids import Grids
from megatron_vl.planning.topology import Topology

GIB = 2**30
NAMED = 6  # grids that a message names


def refusal(problem: Problem, kept: SearchConfig, candidates: list[Candidate]) -> UserError:
    """`candidates` are all that is permitted, with the recompute that saves most; none of them fits."""
    grids = _grids(problem, kept)
    topologies = list(grids.topologies())
    if candidates:
        reason, near = _memory(problem, candidates), ""
    elif topologies:
        reason, near = _batch(problem, kept, topologies)
    else:
        reason, near = _sizes(problem), ""
    works = _workable(problem, kept)
    instead = f"this cluster can do it at tensor_size x pipeline_size = {works}" if works else ""
    advice = "; ".join(part for part in (instead, near) if part) or "take more devices or a smaller model"
    return UserError(
        f"stage {problem.workload.stage} on {problem.cluster.num_devices} devices{_named(kept)}: {reason}; {advice}"
    )


def _grids(problem: Problem, kept: SearchConfig) -> Grids:
    return Grids(model=problem.model, workload=problem.workload, cluster=problem.cluster, kept=kept)


def _named(kept: SearchConfig) -> str:
    values = [(each.name, getattr(kept, each.name)) for each in fields(kept)]
    named = ", ".join(f"{name}={value}" for name, value in values if value is not None)
    return f" with {named}" if named else ""


def _memory(problem: Problem, candidates: list[Candidate]) -> str:
    splits = ((candidate, candidate.even_split(candidate.unlimited)) for candidate in candidates)
    peaks = [(candidate.peak_bytes(split), candidate) for candidate, split in splits if split is not None]
    least, leanest = min(peaks, key=lambda pair: pair[0])
    setting, topology = leanest.setting, leanest.setting.topology
    return (
        f"too little memory: the fullest rank needs {least / GIB:.1f} GiB or more, and may use "
        f"{problem.memory_bytes / GIB:.1f} (least at tensor_size={topology.tensor_size}, pipeline_size="
        f"{topology.pipeline_size}, micro_batch_size={setting.micro_batch_size}, recompute={setting.recompute})"
    )


def _batch(problem: Problem, kept: SearchConfig, topologies: list[Topology]) -> tuple[str, str]:
    """The batch does not divide; what batches and how many devices would."""
    batch = problem.workload.global_batch_size
    topology = min(topologies, key=lambda one: one.data_size * one.virtual_size)
    micro = kept.micro_batch_size or 1
    unit = micro * topology.data_size
    where = f"tensor_size={topology.tensor_size}, pipeline_size={topology.pipeline_size}"
    if batch % unit == 0:
        reason = f"{batch // unit} microbatches are too few to interleave at {where}"
        return reason, f"there, global_batch_size={unit * topology.pipeline_size} would do"
    reason = (
        f"global_batch_size={batch} is not a multiple of {micro} row x {topology.data_size} data-parallel ranks = "
        f"{unit}, at {where}"
    )
    batches = sorted({size for size in (batch // unit * unit, -(-batch // unit) * unit) if size})
    devices = _devices_near(problem, topology, batch // micro)
    near = f"there, global_batch_size={' or '.join(map(str, batches))} would do"
    return reason, near + (f", or {' or '.join(map(str, devices))} devices" if devices else "")


def _devices_near(problem: Problem, topology: Topology, num_rows: int) -> list[int]:
    """The next smaller and larger clusters of whole nodes whose data-parallel ranks divide `num_rows`."""
    now, per_node = problem.cluster.num_devices, problem.cluster.devices_per_node
    whole = [
        data_size * topology.model_size
        for data_size in range(1, num_rows + 1)
        if gcd(data_size, num_rows) == data_size and data_size * topology.model_size % per_node == 0
    ]
    below, above = [size for size in whole if size < now], [size for size in whole if size > now]
    return below[-1:] + above[:1]


def _sizes(problem: Problem) -> str:
    language, per_node = problem.model.language, problem.cluster.devices_per_node
    return (
        f"no such grid: tensor_size must divide devices_per_node={per_node}, num_heads={language.num_heads}, "
        f"ffn_hidden_size={language.ffn_hidden_size} and vocab_size={language.vocab_size}; tensor_size x pipeline_size "
        f"the devices; and the chunks are at most num_layers + 2 = {language.num_layers + 2}"
    )


def _workable(problem: Problem, kept: SearchConfig) -> str:
    """Grids near the kept one that do divide and fit; as text."""
    free = replace(
        kept,
        tensor_size=None,
        pipeline_size=None,
        virtual_size=1,
        layout=None,
        recompute=kept.recompute or "full",
        vision_placement="replicated",
    )
    tried: dict[tuple[int, int], bool] = {}
    for group in _grids(problem, free).settings():  # the smallest microbatches first
        topology = group[-1].topology
        place = topology.tensor_size, topology.pipeline_size
        if place not in tried:
            candidate = Candidate(problem, group[-1])
            tried[place] = candidate.fits(candidate.even_split(candidate.most_layers))
    aim = (kept.tensor_size or 1) * (kept.pipeline_size or 1)
    found = [place for place, works in tried.items() if works]
    nearest = sorted(found, key=lambda place: (abs(place[0] * place[1] - aim), place))[:NAMED]
    return ", ".join(f"{tensor} x {pipeline}" for tensor, pipeline in sorted(nearest))
