# syntax=docker/dockerfile:1
# GPU (default): NVIDIA's PyTorch image, which brings torch, TransformerEngine, flash-attn and apex of its own.
#   docker build -t megatron-vl .
# CPU:
#   docker build -t megatron-vl:cpu --build-arg BASE=python:3.11-slim \
#       --build-arg TORCH_INDEX_URL="the CPU index that pytorch.org's Get started page shows" .
#
# On a CUDA base without them: pip install -c constraints.txt '.[gpu]' for TransformerEngine and flash-attn; apex
# only from source, with the CUDA toolkit of torch's own version:
#   git clone https://github.com/NVIDIA/apex && cd apex
#   APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation .
ARG BASE=nvcr.io/nvidia/pytorch:25.10-py3
FROM ${BASE}
ARG TORCH_INDEX_URL=

ENV PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_BREAK_SYSTEM_PACKAGES=1

WORKDIR /workspace/megatron-vl
COPY . .

# A base that has torch keeps its own versions; elsewhere CI's exact ones are installed.
RUN constraints=constraints.txt && \
    if python -c 'import torch'; then \
        constraints=/dev/null; \
    elif [ -n "${TORCH_INDEX_URL}" ]; then \
        pip install -c constraints.txt --no-deps --index-url "${TORCH_INDEX_URL}" torch; \
    fi && \
    pip install -c "${constraints}" --editable . && \
    mkdir -p data runs && \
    chown -R 1000:1000 data runs

USER 1000:1000
# HOME and caches must be writable for a user that the image does not know.
ENV HOME=/tmp \
    MPLCONFIGDIR=/tmp/matplotlib
CMD ["python", "-m", "launch.pretrain", "--help"]
