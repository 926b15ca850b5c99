"""Megatron-VL: 3D-parallel pretraining of DeepSeek-VL-style vision-language models on megatron-core."""

from megatron_vl.device import import_hook

# Before any module of this package can import megatron-core. Neither torch nor megatron-core is imported here.
import_hook.install()
