"""One plausible step, for tests of what becomes of it."""

from megatron_vl.train.metrics import StepMetrics

ROW = StepMetrics(
    stage="joint",
    step=1,
    global_step=1,
    modality="text",
    loss=0.1 + 0.2,
    loss_by_source={"text": 0.1 + 0.2},
    grad_norm=1e-300,
    learning_rate=3e-3,
    num_tokens=2048,
    num_tokens_by_source={"text": 2048},
    num_supervised_tokens=2000,
    num_samples=4,
    num_failed_samples=0,
    num_images=0,
    step_seconds=0.5,
    tokens_per_second=4096.0,
    tokens_per_second_by_modality={"text": 4096.0},
    images_per_second=0.0,
    mfu=0.375,
    mfu_with_vision=0.375,
    data_wait_seconds=0.01,
    bytes_fetched=1020,
    bytes_used=1000,
    host_memory_bytes=2**30,
    device_peak_bytes=None,
    device_reserved_bytes=None,
    text_ratio=0.7,
    text_share=1.0,
)
