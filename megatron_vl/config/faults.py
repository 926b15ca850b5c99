"""What a run does about steps that go wrong, and how often it looks for what is wrong in silence."""

from dataclasses import dataclass

from megatron_vl.config.errors import UserError


@dataclass(kw_only=True)
class FaultsConfig:
    """Steps whose loss or gradients are not finite, or whose loss is a spike, are skipped: weights stay as they are.

    A loss is a spike where it is above every one of the last `spike_window` losses of its modality, and more than
    `spike_deviations` robust standard deviations above their median; nothing is one before a quarter of them is seen.
    `skipped_in_a_row` such steps take the run back to the newest checkpoint before them; the data of these steps are
    passed over from then on. `max_rollbacks` times to the same checkpoint, then the run gives up.
    """

    spike_deviations: float | None = 10.0  # null: no finite loss is a spike
    spike_window: int = 128
    skipped_in_a_row: int = 5
    max_rollbacks: int = 3
    compare_replicas_every: int = 10  # steps; at checkpoints too. 0: never
    collect_garbage_every: int = 50  # steps, on all ranks at the same one


def check_faults(faults: FaultsConfig) -> None:
    """Raise UserError naming the field, its value and what would be right."""
    for name in ("spike_window", "skipped_in_a_row", "collect_garbage_every"):
        if getattr(faults, name) < 1:
            raise UserError(f"train.faults.{name}={getattr(faults, name)}: must be at least 1")
    for name in ("max_rollbacks", "compare_replicas_every"):
        if getattr(faults, name) < 0:
            raise UserError(f"train.faults.{name}={getattr(faults, name)}: must be at least 0")
    deviations = faults.spike_deviations
    if deviations is not None and not deviations > 0:
        raise UserError(
            f"train.faults.spike_deviations={deviations}: must be above 0, or null for no spike at all"
        )
