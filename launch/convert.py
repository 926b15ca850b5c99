"""Weights in and out: `python -m launch.convert direction=import|export|reshard output=DIR …`.

direction=import   source=DIR                 a DeepSeek-VL of transformers or the official layout -> checkpoint
                   parts.language=DIR parts.siglip=DIR [parts.sam=DIR]   separate sources, fresh adaptor
direction=export   checkpoint=DIR             a checkpoint -> a folder that transformers loads
direction=reshard  checkpoint=DIR parallel.…  a training checkpoint for other parallel sizes
"""

from pathlib import Path
from typing import Any

from launch.command import run_command
from megatron_vl.config.convert import DIRECTIONS, ConvertConfig, PartsConfig, register_convert_schema
from megatron_vl.config.errors import UserError

# What each direction reads, besides `direction` and `output`
READ = {
    "import from source": ("source", "parts", "vocab_size"),
    "import from parts": ("source", "parts", "vocab_size", "adaptor", "seed"),
    "export": ("checkpoint",),
    "reshard": ("checkpoint", "parallel"),
}


def convert(config: ConvertConfig) -> int:
    """Do what `config.direction` says. Returns the exit status."""
    if config.direction not in DIRECTIONS:
        raise UserError(f"direction={config.direction or 'null'}: must be one of {', '.join(DIRECTIONS)}")
    if not config.output:
        raise UserError("output is not given: name the folder to write, which must not exist")
    _refuse_unread(config)
    output = Path(config.output)
    {"import": _import, "export": _export, "reshard": _reshard}[config.direction](config, output)
    return 0


def _refuse_unread(config: ConvertConfig) -> None:
    """An option that would do nothing is one that the user expects something of."""
    start = " from source" if config.parts == PartsConfig() else " from parts"  # both: `_import` refuses
    direction = config.direction + (start if config.direction == "import" else "")
    unread = [
        name
        for name, default in vars(ConvertConfig()).items()
        if name not in ("direction", "output", *READ[direction]) and getattr(config, name) != default
    ]
    if unread:
        raise UserError(f"{', '.join(unread)}: not read by {direction}; leave it out")


def _import(config: ConvertConfig, output: Path) -> None:
    from megatron_vl.checkpoint.convert.importing import import_model, import_parts
    from megatron_vl.checkpoint.convert.source_config import read_parts

    parts = {name: Path(folder) for name, folder in vars(config.parts).items() if folder is not None}
    if (config.source is None) == (not parts):
        raise UserError("direction=import takes either source=DIR or parts.language=DIR and towers, not both")
    if config.source is not None:
        imported = import_model(Path(config.source), output, config.vocab_size)
    else:
        if "language" not in parts or len(parts) < 2:
            raise UserError(
                "direction=import from parts needs parts.language, and parts.siglip, parts.sam or both"
            )
        model = read_parts(parts, config.adaptor)
        imported = import_parts(parts, model, config.seed, output, config.vocab_size)
    _tell(imported.notices)
    print(f"imported {imported.num_parameters:,} parameters ({_megabytes(imported.num_bytes)}): {output}")
    print(f"train from it:  python -m launch.pretrain checkpoint.initial={output} model=… data=…")


def _export(config: ConvertConfig, output: Path) -> None:
    from megatron_vl.checkpoint.convert.exporting import export_model

    exported = export_model(_checkpoint(config), output)
    _tell(exported.notices)
    print(f"exported {exported.num_tensors} tensors ({_megabytes(exported.num_bytes)}): {output}")
    print(f'load it:  transformers.AutoModelForImageTextToText.from_pretrained("{output}")')


def _reshard(config: ConvertConfig, output: Path) -> None:
    from megatron_vl.checkpoint.convert.resharding import reshard

    resharded = reshard(_checkpoint(config), output, config.parallel)
    sizes = config.parallel
    print(
        f"resharded {resharded.num_tensors} tensors ({_megabytes(resharded.num_bytes)}) for TP {sizes.tensor_size}, "
        f"PP {sizes.pipeline_size}, layout {resharded.layout}: {output}"
    )
    print("it is resumed from the folder `checkpoints` of a run directory, under its present name")


def _checkpoint(config: ConvertConfig) -> Path:
    if config.checkpoint is None:
        raise UserError(f"direction={config.direction} takes checkpoint=DIR, which is not given")
    return Path(config.checkpoint)


def _tell(notices: list[Any]) -> None:
    for notice in notices:
        print(notice)


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"


if __name__ == "__main__":
    register_convert_schema()
    run_command(convert, "convert")
