# docker build --target cpu --build-arg TORCH_INDEX_URL=... -t venturi .
# docker build --target cuda -t venturi:cuda .
# docker run --read-only --tmpfs /tmp -v venturi:/home/venturi/.cache -p 50051:50051 venturi

FROM python:3.11-slim-bookworm AS build
WORKDIR /src
# Compiles the native kernels; the images that run have no compiler.
RUN apt-get update && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/venturi
ENV PATH=/opt/venturi/bin:$PATH
# Dependencies first: they change less often than the code.
COPY constraints.txt pyproject.toml hatch_build.py README.md ./
COPY clients/python clients/python
# PyTorch's index of CPU wheels makes the image some gigabytes smaller.
ARG TORCH_INDEX_URL=""
RUN pip install --no-cache-dir ${TORCH_INDEX_URL:+--index-url $TORCH_INDEX_URL} \
    -c constraints.txt torch
COPY server server
COPY engine engine
COPY compress compress
RUN pip install --no-cache-dir -c constraints.txt ./clients/python .

FROM build AS build-cuda
RUN pip uninstall -y torch && pip install --no-cache-dir -c constraints.txt torch

FROM python:3.11-slim-bookworm AS base
# The cache exists and is ours, so that a fresh volume mounted over it is writable.
RUN useradd --create-home --uid 10001 venturi \
    && install -d -o venturi -g venturi /home/venturi/.cache
LABEL org.opencontainers.image.title="venturi" \
      org.opencontainers.image.description="gRPC inference with compression built in" \
      org.opencontainers.image.licenses="Apache-2.0"
ENV PATH=/opt/venturi/bin:$PATH VENTURI_HOST=0.0.0.0 PYTHONUNBUFFERED=1
USER venturi
WORKDIR /home/venturi
EXPOSE 50051
# Compressing a large model takes its time; liveness is another health name.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m \
    CMD ["venturi", "health", "--target", "127.0.0.1:50051"]
# Exec form: SIGTERM reaches the server, which drains.
ENTRYPOINT ["venturi"]
CMD ["serve"]

FROM base AS cuda
COPY --from=build-cuda /opt/venturi /opt/venturi

FROM base AS cpu
COPY --from=build /opt/venturi /opt/venturi
