"""How the optimizer's state is stored: by parameter, at the price of gathering it, or as ranks hold it. No torch."""

from megatron_vl.config.errors import UserError

FULLY_RESHARDABLE, DP_RESHARDABLE = "fully_reshardable", "dp_reshardable"
# megatron-core gathers the fp32 state of a rank's part of the model over its data-parallel ranks, into the memory of
# each of their hosts, while training waits. Up to this many bytes a rank that is a matter of a second.
MAX_GATHERED_BYTES = 1 << 30
STATE_BYTES = 12  # of a parameter that trains: AdamW's two moments and the parameter itself, in fp32


def choose_sharding(wanted: str, num_trained: int, bare_ranks: list[int]) -> str:
    """The sharding of a stage's checkpoints.

    Args:
        wanted: checkpoint.optimizer_sharding.
        num_trained: trainable parameters of the rank that holds most of them, before data parallelism divides them.
        bare_ranks: ranks whose share of some bucket is padding alone, which megatron-core cannot store as it is.

    Raises:
        UserError: dp_reshardable is wanted and there are bare ranks.
    """
    if wanted == DP_RESHARDABLE and bare_ranks:
        raise UserError(
            f"checkpoint.optimizer_sharding={DP_RESHARDABLE}: ranks {bare_ranks} have no parameter in some bucket, as "
            f"the stage trains too little for so many data-parallel ranks; use {FULLY_RESHARDABLE} or auto"
        )
    if wanted != "auto":
        return wanted
    is_large = num_trained * STATE_BYTES > MAX_GATHERED_BYTES
    return DP_RESHARDABLE if is_large and not bare_ranks else FULLY_RESHARDABLE
