"""KEDA's calls to an external scaler."""

from __future__ import annotations

import grpc

from scalellm.keda import externalscaler_pb2 as pb
from scalellm.keda import externalscaler_pb2_grpc


class Keda:
    """The calls that KEDA makes for one trigger of a ScaledObject.

    Args:
        metadata: Metadata of the trigger.
    """

    def __init__(self, channel: grpc.aio.Channel, **metadata: str) -> None:
        self._stub = externalscaler_pb2_grpc.ExternalScalerStub(channel)
        given = {"scalerAddress": "scheduler:50052", **metadata}
        entries = [pb.Metadata(key=key, value=value) for key, value in given.items()]
        self._scaled = pb.ScaledObjectRef(name="pool", namespace="line", scalerMetadata=entries)

    async def wanted(self) -> float:
        (spec,) = (await self._stub.GetMetricSpec(self._scaled)).metricSpecs
        stream = self._stub.StreamMetricSpec(self._scaled)
        assert list((await stream.read()).metricSpecs) == [spec]
        stream.cancel()
        assert (spec.targetSize, spec.targetSizeFloat) == (1, 1.0)
        request = pb.GetMetricsRequest(scaledObjectRef=self._scaled, metricName=spec.metricName)
        (value,) = (await self._stub.GetMetrics(request)).metricValues
        assert (value.metricName, value.metricValue) == (spec.metricName, value.metricValueFloat)
        return value.metricValueFloat

    async def is_active(self) -> bool:
        return (await self._stub.IsActive(self._scaled)).result

    def watch(self) -> grpc.aio.UnaryStreamCall:
        return self._stub.StreamIsActive(self._scaled)
