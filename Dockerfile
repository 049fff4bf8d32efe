# The worker and one snapshot, in one image. It builds with BuildKit and with buildah (so there are no heredocs).
# docker-bake.hcl has the builds by name; without any argument this is the demo on vLLM's GPU image.
#
#   BASE_IMAGE      vLLM's own image, or a plain Debian or Ubuntu for vLLM's CPU build
#   SNAPSHOT        the snapshot's name, its folder in snapshots/; empty: the demo's, which settings may replace
#   MODEL           a hub repository to bake it from in this build; empty: it lies in snapshots/ already
#   REVISION        the repository's commit or branch
#   SCHEME          the quantisation
#   SNAPSHOT_DIGEST the digest that the snapshot must have; the build fails if it has another
#   RUN_AS          root where the worker must write to a volume that belongs to root
#
# Secrets, which no layer keeps: HF_TOKEN for gated models; pip.conf for a package index of your own; roots for a
# proxy that re-signs TLS: --secret id=roots,src=/etc/ssl/certs/ca-certificates.crt
ARG VLLM_VERSION=0.33.0
ARG BASE_IMAGE=vllm/vllm-openai:v${VLLM_VERSION}

# ── what the worker stands on: Python, and on a GPU base vLLM, compiled: its image comes without bytecode ─────────
FROM ${BASE_IMAGE} AS base
WORKDIR /app
RUN if ! command -v python3 >/dev/null; then \
        apt-get update -q && \
        DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends \
            ca-certificates libnuma1 python3 && \
        rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/log/apt /var/log/dpkg.log; \
    fi
# A file that does not compile is a template or a test of somebody's package; what the worker needs is imported below.
RUN if python3 -c 'import importlib.metadata as m; m.version("vllm")' 2>/dev/null; then \
        python3 -m compileall -q -j 0 "$(python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" || true; \
    fi

# ── the environment, from the locks ───────────────────────────────────────────────────────────────────────────────
FROM base AS environment
RUN if ! command -v uv >/dev/null && ! python3 -c 'import ensurepip' 2>/dev/null; then \
        apt-get update -q && \
        DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends python3-venv; \
    fi
COPY requirements requirements
COPY scripts scripts
RUN --mount=type=cache,target=/root/.cache/uv \
    --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    --mount=type=secret,id=roots,target=/etc/ssl/certs/ca-certificates.crt \
    UV_CACHE_DIR=/root/.cache/uv UV_LINK_MODE=copy scripts/image_env.sh

# ── the snapshot, from snapshots/ or baked here ───────────────────────────────────────────────────────────────────
FROM environment AS snapshot
ARG MODEL=
RUN --mount=type=cache,target=/root/.cache/uv \
    --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    --mount=type=secret,id=roots,target=/etc/ssl/certs/ca-certificates.crt \
    if [ -n "$MODEL" ]; then UV_CACHE_DIR=/root/.cache/uv UV_LINK_MODE=copy scripts/setup.sh bake; fi
COPY src src
COPY builder builder
COPY pyproject.toml ./
ARG SNAPSHOT=
ARG REVISION=main
ARG SCHEME=fp8-dynamic
RUN --mount=type=bind,source=snapshots,target=/given \
    --mount=type=secret,id=HF_TOKEN \
    --mount=type=secret,id=roots,target=/etc/ssl/certs/ca-certificates.crt \
    HF_TOKEN=$(cat /run/secrets/HF_TOKEN 2>/dev/null || true) \
    scripts/image_snapshot.sh "${SNAPSHOT:-demo}" "$MODEL" "$REVISION" "$SCHEME"

# ── its manifest and digest alone: a label's value must be known before the image is built ────────────────────────
FROM scratch AS manifest
ARG SNAPSHOT=
COPY --from=snapshot /app/snapshots/${SNAPSHOT:-demo}/coldsnap.json /coldsnap.json
COPY --from=snapshot /app/snapshots/${SNAPSHOT:-demo}.digest /digest

# ── the image: what changes least comes first, so that a new release of the code is a few hundred kilobytes ───────
FROM base AS runtime
RUN useradd --create-home --shell /usr/sbin/nologin coldsnap && install -d -o coldsnap -g coldsnap .cache .coldsnap
COPY --from=environment /app/.venv .venv
ARG SNAPSHOT=
COPY --from=snapshot /app/snapshots/${SNAPSHOT:-demo} snapshots/${SNAPSHOT:-demo}
COPY requirements requirements
COPY scripts scripts
COPY builder builder
COPY src src
COPY handler.py test_input.json pyproject.toml README.md LICENSE ./
RUN .venv/bin/python -m compileall -q --invalidation-mode unchecked-hash src

# The caches keep their paths and vLLM its environment, because both are part of the compile cache's key.
# An empty PYTHONDONTWRITEBYTECODE is an unset one, whatever the base says.
ENV VIRTUAL_ENV=/app/.venv \
    PATH=/app/.venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE= \
    PYTHONUNBUFFERED=1 \
    SNAPSHOT_DIR=${SNAPSHOT:+/app/snapshots/$SNAPSHOT} \
    VLLM_CACHE_ROOT=/app/.cache/vllm \
    VLLM_NO_USAGE_STATS=1 \
    TORCHINDUCTOR_CACHE_DIR=/app/.cache/inductor \
    TRITON_CACHE_DIR=/app/.cache/triton \
    FLASHINFER_WORKSPACE_BASE=/app \
    HF_HOME=/app/.cache/huggingface
ARG RUN_AS=coldsnap
USER ${RUN_AS}
ARG VLLM_VERSION
ARG COLDSNAP_VERSION=0.1.0
ARG SNAPSHOT_DIGEST=
RUN python builder/finish_image.py snapshots/${SNAPSHOT:-demo} \
        --digest "$SNAPSHOT_DIGEST" --vllm "$VLLM_VERSION" --coldsnap "$COLDSNAP_VERSION"

ARG BASE_IMAGE
ARG COMMIT=
LABEL org.opencontainers.image.title="coldsnap" \
      org.opencontainers.image.description="A Runpod Serverless worker that cold-starts vLLM from a baked snapshot" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="${COLDSNAP_VERSION}" \
      org.opencontainers.image.revision="${COMMIT}" \
      org.opencontainers.image.base.name="${BASE_IMAGE}" \
      coldsnap.vllm.version="${VLLM_VERSION}" \
      coldsnap.snapshot.name="${SNAPSHOT:-demo}" \
      coldsnap.snapshot.digest="${SNAPSHOT_DIGEST}"
ENTRYPOINT ["/app/.venv/bin/python", "/app/handler.py"]
CMD []
