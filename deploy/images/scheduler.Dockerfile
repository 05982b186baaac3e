# The scheduler service.
#
#   docker build -f deploy/images/scheduler.Dockerfile -t scalellm/scheduler .
#
# The images of the tokenizer and the scheduler have all steps up to the last few in common, and so their layers.
# With its digest, builds begin with the very same bytes; compose.yaml names the same image.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b
FROM ${PYTHON_IMAGE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_CONSTRAINT=/build/constraints.txt
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /build
# Packages first: they change less often than the sources.
COPY constraints.txt pyproject.toml ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
        >requirements.txt \
    && pip install -r requirements.txt
COPY README.md LICENSE NOTICE ./
COPY scalellm scalellm
COPY kernels kernels
COPY services services
COPY clients clients
RUN pip install --no-deps --target /opt/scalellm .

FROM ${PYTHON_IMAGE}
# Volumes take over the owner of the folders that they are mounted on.
RUN useradd --system --uid 10001 --home-dir /var/lib/scalellm --shell /usr/sbin/nologin scalellm \
    && install -d -o scalellm -g scalellm /var/lib/scalellm /var/lib/scalellm/models
# Apart: a new release is a layer of a few megabytes.
COPY --from=build /opt/venv /opt/venv
COPY --from=build /opt/scalellm /opt/scalellm
# The working directory is no place to import from.
ENV PATH=/opt/scalellm/bin:/opt/venv/bin:$PATH PYTHONPATH=/opt/scalellm PYTHONSAFEPATH=1
WORKDIR /var/lib/scalellm
USER scalellm
STOPSIGNAL SIGTERM
ENV SCALELLM_SCHEDULER_HOST=0.0.0.0 SCALELLM_SCHEDULER_PORT=50052 \
    SCALELLM_SCHEDULER_METRICS_HOST=0.0.0.0 SCALELLM_SCHEDULER_METRICS_PORT=9152
EXPOSE 50052 9152
HEALTHCHECK --interval=5s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python", "-IS", "/opt/scalellm/scalellm/services/common/health_check.py", "127.0.0.1:50052"]
CMD ["python", "-m", "scalellm.services.scheduler"]
