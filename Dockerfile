# Everything that nodes need, from the frozen requirements, for a user without rights.
#
#   docker build --target cuda -t REGISTRY/carn:0.1.0-cuda .
#   docker build --target cpu -t REGISTRY/carn:0.1.0-cpu --build-arg TORCH_INDEX_URL=URL .
#
# The package index's own torch is built for CUDA and brings CUDA's libraries with it; the node
# supplies the driver. It runs on CPUs as well. URL is an index that has torch's CPU builds
# (PyTorch's installation page says which), some GB smaller.

# The requirements were frozen with this Python.
FROM python:3.11-slim-bookworm AS base

# wget: KubeRay's probes. rsync, ssh: Ray's cluster launcher. procps: what people look with.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        openssh-client procps rsync tzdata wget \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 1000 carn \
    && useradd --uid 1000 --gid carn --create-home --shell /bin/bash carn \
    && mkdir -p /opt/venv /opt/carn /tmp/ray \
    && chown carn:carn /opt/venv /opt/carn /tmp/ray

# By number, as Kubernetes cannot tell from a name that it is not root.
USER 1000:1000
# Ray's cluster launcher asks the image where its user is at home.
ENV HOME=/home/carn \
    PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/opt/carn \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    RAY_USAGE_STATS_ENABLED=0
WORKDIR /opt/carn
RUN python -m venv /opt/venv
COPY --chown=carn:carn requirements.txt requirements.lock ./


FROM base AS cpu-packages
ARG TORCH_INDEX_URL=""
# torch first, from its own index: `==2.13.0` holds for `2.13.0+cpu` too, so the rest leaves it alone.
RUN test -n "$TORCH_INDEX_URL" \
        || { echo "say with --build-arg TORCH_INDEX_URL=URL where torch's CPU builds are" >&2; exit 1; } \
    && pip install --no-cache-dir --no-deps --index-url "$TORCH_INDEX_URL" \
        "$(grep '^torch==' requirements.lock)" \
    && pip install --no-cache-dir --requirement requirements.txt --constraint requirements.lock \
    && pip check \
    && python -c 'import torch; assert torch.version.cuda is None, "that torch is built for CUDA"'


FROM base AS cuda-packages
# What is not in the lock is CUDA's, at the versions that torch asks for.
RUN pip install --no-cache-dir --requirement requirements.txt --constraint requirements.lock \
    && pip check \
    && python -c 'import torch; assert torch.version.cuda, "that torch is not built for CUDA"'


# The code last: a change of it leaves the packages' layer as it is.
FROM cpu-packages AS cpu
COPY --chown=carn:carn . .
CMD ["bash"]


FROM cuda-packages AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --chown=carn:carn . .
CMD ["bash"]
