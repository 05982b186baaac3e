"""externalscaler.ExternalScaler on gRPC: reports to KEDA how many executors there should be."""

from __future__ import annotations

import asyncio

import grpc

from scalellm.keda import externalscaler_pb2 as pb
from scalellm.services.common.errors import StatusError
from scalellm.services.scheduler.scaling import ALL, PoolState, Scaling

SERVICE = pb.DESCRIPTOR.services_by_name["ExternalScaler"]

_METRIC = "wanted-executors"

_POOL_KEY = "executors"
"""Key of a trigger's metadata for the host:port name of a pool's executors. A trigger without it means all
executors."""


class ExternalScaler:
    """Answers the RPCs. The metric is the wanted number of executors, with a target of 1 per executor.

    Every method ends with NOT_FOUND for a name of executors that is not listed.

    Args:
        scaling: Source of the wanted numbers.
    """

    def __init__(self, scaling: Scaling) -> None:
        self._scaling = scaling
        spec = pb.MetricSpec(metricName=_METRIC, targetSize=1, targetSizeFloat=1.0)
        self._specs = pb.GetMetricSpecResponse(metricSpecs=[spec])

    async def IsActive(self, request: pb.ScaledObjectRef, context: grpc.aio.ServicerContext) -> pb.IsActiveResponse:
        """True if any executor is needed."""
        return pb.IsActiveResponse(result=self._state(request).is_active)

    async def StreamIsActive(self, request: pb.ScaledObjectRef, context: grpc.aio.ServicerContext) -> None:
        """Stream IsActive: the current value at once, then each change, until the caller ends the stream."""
        told: bool | None = None
        while True:
            if (is_active := self._state(request).is_active) is not told:
                told = is_active
                await context.write(pb.IsActiveResponse(result=is_active))
            await self._scaling.next_look()

    async def GetMetricSpec(
        self, request: pb.ScaledObjectRef, context: grpc.aio.ServicerContext
    ) -> pb.GetMetricSpecResponse:
        """Return the one metric and its target of 1 per executor."""
        self._state(request)
        return self._specs

    async def GetMetrics(
        self, request: pb.GetMetricsRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetMetricsResponse:
        """Return the value of the metric."""
        wanted = self._state(request.scaledObjectRef).wanted
        return pb.GetMetricsResponse(
            metricValues=[pb.MetricValue(metricName=_METRIC, metricValue=wanted, metricValueFloat=wanted)]
        )

    async def StreamMetricSpec(self, request: pb.ScaledObjectRef, context: grpc.aio.ServicerContext) -> None:
        """Send the metric once, since it never changes, and keep the stream open until the caller ends it."""
        self._state(request)
        await context.write(self._specs)
        await asyncio.Event().wait()

    def _state(self, scaled: pb.ScaledObjectRef) -> PoolState:
        name = next((entry.value for entry in scaled.scalerMetadata if entry.key == _POOL_KEY), ALL)
        if (state := self._scaling.states.get(name)) is None:
            message = f"{_POOL_KEY}: {name!r} is no name of executors that this scheduler was told of"
            raise StatusError(grpc.StatusCode.NOT_FOUND, message)
        return state
