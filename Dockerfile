# mfm_jax with what it needs for one kind of device. For the CPU, or with an extra of pyproject.toml for others:
#     docker build --tag mfm_jax .
#     docker build --tag mfm_jax:cuda13 --build-arg EXTRA=cuda13 .
#     docker build --tag mfm_jax:tpu --build-arg EXTRA=tpu .
# CUDA's libraries come with the wheels of JAX; the host has the driver (`docker run --gpus all`). Versions are the tested
# ones. The image has a compiler, for the native kernels.
FROM python:3.11-slim-bookworm

ARG EXTRA=""
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ libc6-dev \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 1000 mfm \
 && install --directory --owner=mfm /runs

WORKDIR /opt/mfm_jax
COPY pyproject.toml README.md LICENSE ./
COPY constraints constraints
COPY configs configs
COPY mfm_jax mfm_jax
RUN python -m pip install --no-cache-dir --constraint constraints/python3.11.txt ".${EXTRA:+[$EXTRA]}"

USER mfm
WORKDIR /runs
ENTRYPOINT ["mfm-jax"]
CMD ["--help"]
