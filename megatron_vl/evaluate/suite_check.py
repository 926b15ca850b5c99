"""What can be said of a configuration's benchmarks before ranks start: no torch, and no file is read."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_vl.config.errors import UserError
from megatron_vl.config.evaluate import METHODS, NORMALIZATIONS, BenchmarkConfig, EvaluationConfig
from megatron_vl.evaluate.benchmarks.catalog import BENCHMARKS


def check_suite(evaluation: EvaluationConfig) -> dict[str, BenchmarkConfig]:
    """The configured benchmarks by name.

    Raises:
        UserError: naming the field that cannot be what is meant.
    """
    for limit, least in (("every", 0), ("sequence_length", 1), ("max_cached_positions", 1)):
        value = getattr(evaluation, limit)
        if value < least:
            raise UserError(f"evaluation.{limit}={value}: must be at least {least}")
    return {
        name: _check(f"evaluation.benchmarks.{name}", name, evaluation.benchmarks[name])
        for name in evaluation.benchmarks
    }


def _check(field: str, name: str, values: Any) -> BenchmarkConfig:
    fields = [entry.name for entry in dataclasses.fields(BenchmarkConfig)]
    if not isinstance(values, Mapping):
        raise UserError(f"{field}={values}: must be fields, of {', '.join(fields)}")
    for unknown in [name for name in values if name not in fields]:
        raise UserError(f"{field}.{unknown}: there is no such field; valid: {', '.join(fields)}")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(BenchmarkConfig), values)
        config: Any = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, ValueError) as error:
        raise UserError(f"{field}={values}: {str(error).splitlines()[0]}") from error
    config.format = config.format or name
    if config.format not in BENCHMARKS:
        raise UserError(f"{field}.format={config.format}: must be one of {', '.join(BENCHMARKS)}")
    if not config.path or not Path(config.path).exists():
        raise UserError(f"{field}.path={config.path or 'null'} does not exist")
    if config.images is not None and not Path(config.images).is_dir():
        raise UserError(f"{field}.images={config.images} is not a folder")
    of_text = BENCHMARKS[config.format].method == "bits_per_byte"
    if config.method is not None and (of_text or config.method not in METHODS):
        valid = "null, since texts are weighed" if of_text else " or ".join(METHODS)
        raise UserError(f"{field}.method={config.method}: must be {valid}")
    if config.normalization not in NORMALIZATIONS:
        raise UserError(
            f"{field}.normalization={config.normalization}: must be one of {', '.join(NORMALIZATIONS)}"
        )
    for limit in ("max_items", "max_new_tokens"):
        value = getattr(config, limit)
        if value is not None and value < 1:
            raise UserError(f"{field}.{limit}={value}: must be at least 1")
    checked: BenchmarkConfig = config
    return checked
