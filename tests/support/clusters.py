"""Cluster and model files as configuration objects."""

from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from megatron_vl.config.cluster import ClusterConfig
from megatron_vl.config.model import ModelConfig

CONFIGS = Path(__file__).parents[2] / "hydra_conf"
CLUSTERS = tuple(sorted(path.stem for path in (CONFIGS / "cluster").glob("*.yaml")))


def cluster_of(name: str) -> ClusterConfig:
    cluster: ClusterConfig = _load(ClusterConfig, f"cluster/{name}")
    return cluster


@cache
def model_of(name: str) -> ModelConfig:
    model: ModelConfig = _load(ModelConfig, f"model/{name}")
    return model


def _load(schema: Any, name: str) -> Any:
    return OmegaConf.to_object(
        OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.load(CONFIGS / f"{name}.yaml"))
    )
