# syntax=docker/dockerfile:1
# GPU (the default target), on NVIDIA's PyTorch image, whose torch, TransformerEngine, flash-attn and apex stay:
#   docker build -t megatron-vl .
# CPU, which runs the tests:
#   docker build -t megatron-vl:cpu --target cpu \
#       --build-arg TORCH_INDEX_URL="the CPU index that pytorch.org's Get started page shows" . && docker run megatron-vl:cpu
# docs/install.md says how clusters start them.
ARG BASE=nvcr.io/nvidia/pytorch:25.12-py3

FROM python:3.11-slim AS cpu
ARG TORCH_INDEX_URL=
# hadolint ignore=DL3008
RUN apt-get update && \
    apt-get install --no-install-recommends --yes g++ git make && \
    rm -rf /var/lib/apt/lists/* && \
    useradd --uid 1000 --create-home trainer && \
    mkdir --parents /workspace/megatron-vl && \
    chown trainer /workspace/megatron-vl
USER 1000:1000
WORKDIR /workspace/megatron-vl
COPY --chown=1000:1000 . .
RUN make environment TORCH_INDEX_URL="${TORCH_INDEX_URL}"
CMD ["make", "test"]

FROM ${BASE} AS gpu
# For a CUDA base without them: what megatron-core 0.16.1 works with. apex has no wheel.
ARG TRANSFORMER_ENGINE=2.11.0
ARG FLASH_ATTENTION=2.8.3
ARG APEX=25.09
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_BREAK_SYSTEM_PACKAGES=1

WORKDIR /workspace/megatron-vl
COPY . .
# What the base has is held at its version, and of ours megatron-core alone is: constraints.txt is for another torch.
# Packages that are built here say of no tool which version they need.
# hadolint ignore=DL3013
RUN pip list --format=freeze | grep --invert-match '^megatron' > /tmp/base.txt && \
    grep '^megatron-core==' constraints.txt > /tmp/ours.txt && \
    pip install --constraint /tmp/base.txt packaging wheel ninja psutil cmake 'pybind11[global]' && \
    if ! pip show --quiet flash-attn; then \
        pip install --no-build-isolation --constraint /tmp/base.txt "flash-attn==${FLASH_ATTENTION}"; \
    fi && \
    if ! pip show --quiet transformer-engine; then \
        pip install --no-build-isolation --constraint /tmp/base.txt "transformer-engine[pytorch]==${TRANSFORMER_ENGINE}"; \
    fi && \
    if ! pip show --quiet apex; then \
        APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation --no-deps \
            "apex @ git+https://github.com/NVIDIA/apex@${APEX}"; \
    fi && \
    pip uninstall --yes megatron-core && \
    pip install --constraint /tmp/base.txt --constraint /tmp/ours.txt --editable '.[sweep,s3,tensorboard]' && \
    python tools/check_image.py --base /tmp/base.txt --versions versions.txt && \
    mkdir --parents data runs && \
    chown --recursive 1000:1000 data runs

USER 1000:1000
# HOME and caches must be writable for a user that the image does not know.
ENV HOME=/tmp \
    MPLCONFIGDIR=/tmp/matplotlib
CMD ["python", "-m", "launch.pretrain", "--help"]
