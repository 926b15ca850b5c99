"""What a run trains on in a step, before it does: `python -m launch.preview stages=[joint] step=120 [overrides]`.

The overrides are the run's. Nothing is trained and no bytes of samples are read. On its way a preview leaves bookmarks
in run.dir, so that the next one begins at most data.flush_steps before its step.
"""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from launch.command import run_command
from megatron_vl.config.errors import UserError
from megatron_vl.config.preview import PreviewConfig, register_preview_schema
from megatron_vl.train.replay import Preview, replay
from megatron_vl.train.settings import StageSettings, required_processes, resolve_stages
from megatron_vl.train.sources import Sources, open_sources


def preview(config: PreviewConfig) -> int:
    """Print the step's plan for each data-parallel rank. Returns the exit status."""
    if len(config.stages) != 1:
        raise UserError(f"stages={config.stages}: name the one to look at, such as 'stages=[joint]'")
    (stage,) = resolve_stages(config, config.run.num_processes or required_processes(config))
    if not 1 <= config.step <= stage.values.steps:
        raise UserError(f"step={config.step}: stage {stage.name} has the steps 1 to {stage.values.steps}")
    sources = open_sources(config.data, config.model, [stage])
    console = Console()
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("planning the steps before", total=None)

        def advance(done: int, total: int) -> None:
            progress.update(bar, completed=done, total=total)

        found = replay(config, stage, sources, config.step, advance)
    console.print(headline(found, stage), soft_wrap=True, highlight=False)
    console.print(ranks_table(found, stage, sources, config.keys))
    return 0


def headline(found: Preview, stage: StageSettings) -> str:
    """The step in a line."""
    plan, packs = found.ranks[0], [pack for plan in found.ranks for pack in plan.packs]
    num_tokens = sum(pack.num_tokens for pack in packs)
    full = len(packs) * stage.values.sequence_length
    return (
        f"stage {stage.name}, step {plan.step}: {plan.modality}, text ratio {plan.text_ratio:.3f}; {len(packs)} rows, "
        f"{num_tokens:,} tokens ({num_tokens / full:.1%} of {full:,}), {sum(pack.num_images for pack in packs)} images"
    )


def ranks_table(found: Preview, stage: StageSettings, sources: Sources, num_keys: int) -> Table:
    """A line for each data-parallel rank. Costs are in parts of the ranks' mean."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("rank", "rows", "samples", "images", "full", "cost"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("samples by source")
    table.add_column("first keys", overflow="fold")
    costs = [sum(found.cost.of(pack) for pack in plan.packs) for plan in found.ranks]
    mean = max(1.0, sum(costs) / len(costs))
    for rank, (plan, own) in enumerate(zip(found.ranks, costs, strict=True)):
        units = [unit for pack in plan.packs for unit in pack.units]
        names = [unit.source for unit in units]
        num_tokens = sum(unit.num_tokens for unit in units)
        keys = [
            f"{unit.source}/{sources.training[unit.source].key(unit.sample)}" for unit in units[:num_keys]
        ]
        table.add_row(
            str(rank),
            str(len(plan.packs)),
            str(len(units)),
            str(sum(unit.num_images for unit in units)),
            f"{num_tokens / (len(plan.packs) * stage.values.sequence_length):.1%}",
            f"{own / mean:.3f}",
            ", ".join(f"{name} {names.count(name)}" for name in sorted(set(names))),
            ", ".join(keys),
        )
    return table


if __name__ == "__main__":
    register_preview_schema()
    run_command(preview, "preview")
