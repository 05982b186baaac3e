# The executor service, on a CPU or an NVIDIA GPU.
#
#   docker build -f deploy/images/executor.Dockerfile -t scalellm/executor .
#   docker build -f deploy/images/executor.Dockerfile -t scalellm/executor-gpu --build-arg TORCH_INDEX= .
#
# The image has a compiler: the kernels for the CPU are compiled at the first start, in seconds, for the very CPU that
# they run on, and those for a GPU by Triton, which needs one. An image for many machines is better built with them, for
# each set of vector instructions that they have code for, so that new containers answer at once (minutes more to build):
#
#   docker build -f deploy/images/executor.Dockerfile -t scalellm/executor --build-arg CPU_KERNELS=all .
# With its digest, builds begin with the very same bytes; compose.yaml names the same image.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b
FROM ${PYTHON_IMAGE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_CONSTRAINT=/build/constraints.txt
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /build
# Packages first: they change less often than the sources; torch before all others, as it is most of the image.
COPY constraints.txt ./
# Where CPU builds of torch come from: the default registry's are made for CUDA and several times as large. One that
# cannot be reached is passed over. Empty: the default registry alone.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-deps --retries 1 ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "$(grep '^torch==' constraints.txt)"
COPY pyproject.toml ./
RUN python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
print(*p['dependencies'], *p['optional-dependencies']['executor'], sep='\n')" >requirements.txt \
    && pip install -r requirements.txt
COPY README.md LICENSE NOTICE ./
COPY scalellm scalellm
COPY kernels kernels
COPY services services
COPY clients clients
RUN pip install --no-deps --target /opt/scalellm .

FROM ${PYTHON_IMAGE}
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends g++ \
    && apt-get clean && rm -rf /var/lib/apt/lists/*
# Volumes take over the owner of the folders that they are mounted on.
RUN useradd --system --uid 10001 --home-dir /var/lib/scalellm --shell /usr/sbin/nologin scalellm \
    && install -d -o scalellm -g scalellm /var/lib/scalellm /var/lib/scalellm/models /var/lib/scalellm/kernels
# Apart: a new release is a layer of a few megabytes.
COPY --from=build /opt/venv /opt/venv
COPY --from=build /opt/scalellm /opt/scalellm
# all, or names of levels in kernels/cpu/building.py, with spaces. Empty: none.
ARG CPU_KERNELS=
RUN [ -z "$CPU_KERNELS" ] || PYTHONPATH=/opt/scalellm PYTHONDONTWRITEBYTECODE=1 /opt/venv/bin/python \
    -m scalellm.kernels.cpu $(echo "$CPU_KERNELS" | sed 's/^all$//')
# The working directory is no place to import from. Compiled kernels are kept, those of Triton and the driver as well.
ENV PATH=/opt/scalellm/bin:/opt/venv/bin:$PATH PYTHONPATH=/opt/scalellm PYTHONSAFEPATH=1 \
    TRITON_CACHE_DIR=/var/lib/scalellm/kernels/triton CUDA_CACHE_PATH=/var/lib/scalellm/kernels/cuda
WORKDIR /var/lib/scalellm
USER scalellm
STOPSIGNAL SIGTERM
ENV SCALELLM_EXECUTOR_HOME=/var/lib/scalellm \
    HF_HOME=/var/lib/scalellm/models/huggingface \
    SCALELLM_EXECUTOR_HOST=0.0.0.0 SCALELLM_EXECUTOR_PORT=50061 \
    SCALELLM_EXECUTOR_METRICS_HOST=0.0.0.0 SCALELLM_EXECUTOR_METRICS_PORT=9161
EXPOSE 50061 9161
HEALTHCHECK --interval=5s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python", "-IS", "/opt/scalellm/scalellm/services/common/health_check.py", "127.0.0.1:50061"]
CMD ["python", "-m", "scalellm.services.executor"]
