# Redis with its configuration, run by a user of its own from the start: no process in it is ever root. The chart runs it
# as another user, who may read this file as well.
ARG REDIS_IMAGE=redis:7-bookworm@sha256:595cc6f2bb3af6e03347b90deb6123c6aa2c81dea05ce08128de8a174b6ac67b
FROM ${REDIS_IMAGE}
COPY deploy/images/redis.conf /etc/scalellm/redis.conf
RUN install -d -o redis -g redis /data
USER redis
WORKDIR /data
HEALTHCHECK --interval=10s --timeout=3s --retries=3 CMD ["redis-cli", "ping"]
ENTRYPOINT []
CMD ["redis-server", "/etc/scalellm/redis.conf"]
