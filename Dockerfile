# s2ft serve in a container. CPU: docker build -t s2ft .
# GPU, with compiled kernels (the base image must have nvcc):
#   docker build -t s2ft:cuda --build-arg BASE=nvidia/cuda:12.8.1-devel-ubuntu24.04 \
#     --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .
ARG BASE=debian:trixie-slim

FROM ${BASE}
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=serve

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# The packages have the versions of the base image. The compiler stays, since torch.compile needs one.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential ca-certificates python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/s2ft/bin:$PATH PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1
# The newest PyTorch of the index; all other packages have the releases that were tested (constraints.txt).
# hadolint ignore=DL3013
RUN python3 -m venv /opt/s2ft \
    && pip install --index-url "$TORCH_INDEX" --extra-index-url https://pypi.org/simple "torch>=2.11" \
    && pip install "setuptools>=77" ninja

WORKDIR /src
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE constraints.txt ./
COPY csrc csrc
COPY s2ft s2ft
# hadolint ignore=DL3013
RUN pip install --no-build-isolation -c constraints.txt ".[$EXTRAS]" && s2ft --version

# The server needs no rights. Mount models and adapters read-only; the cache of the hub is /home/s2ft/.cache.
RUN useradd --uid 10001 --create-home s2ft
USER 10001
WORKDIR /home/s2ft
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=300s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
# SIGTERM lets the running requests finish for 10 seconds, which is what docker stop waits too: give it more, -t 15.
STOPSIGNAL SIGTERM
ENTRYPOINT ["s2ft"]
CMD ["serve", "--help"]
