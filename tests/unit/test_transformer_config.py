"""The decoder's configuration: what the device and the settings decide."""

import pytest

from megatron_vl.config.errors import UserError
from megatron_vl.config.model import LanguageConfig
from megatron_vl.config.parallel import RecomputeConfig
from megatron_vl.model.transformer_config import Division, transformer_config
from megatron_vl.planning.topology import Topology

LANGUAGE = LanguageConfig(hidden_size=64, num_layers=2, num_heads=2, ffn_hidden_size=96, vocab_size=128)
DIVISION = Division(topology=Topology(world_size=1), layout="EttL")


def test_fp8_without_transformer_engine_is_refused() -> None:
    with pytest.raises(UserError, match=r"parallel\.fp8=true: needs CUDA"):
        transformer_config(LANGUAGE, DIVISION, RecomputeConfig(), "bf16", fp8=True)


@pytest.mark.parametrize("fp8", [False, True])
def test_fp8_with_transformer_engine(fp8: bool) -> None:
    config = transformer_config(
        LANGUAGE, DIVISION, RecomputeConfig(), "bf16", on_cuda=True, use_transformer_engine=True, fp8=fp8
    )
    assert config.fp8 == ("hybrid" if fp8 else None)
