"""Uses the compute server with nothing but its address: message types come from gRPC reflection.

    client.py HOST:PORT

Needs grpcio, grpcio-reflection and grpcio-health-checking. Exits with 0 when everything answered as it should.
"""

import struct
import sys

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

PACKAGE = "candle.compute.v1"
CONFIG = '{"architecture": "llama", "layers": 1, "width": 8, "heads": 2, "context_length": 8, "vocabulary": 10}'


class Services:
    """Calls unary and server-streaming methods by name."""

    def __init__(self, channel):
        self.channel = channel
        self.pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))

    def call(self, service, method, **fields):
        descriptor = self.pool.FindServiceByName(f"{PACKAGE}.{service}").methods_by_name[method]
        request = GetMessageClass(descriptor.input_type)(**fields)
        kind = self.channel.unary_stream if descriptor.server_streaming else self.channel.unary_unary
        return kind(
            f"/{PACKAGE}.{service}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=GetMessageClass(descriptor.output_type).FromString,
        )(request, timeout=30)


def main():
    channel = grpc.insecure_channel(sys.argv[1])
    health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=30)
    assert health.status == health_pb2.HealthCheckResponse.SERVING

    names = set(ProtoReflectionDescriptorDatabase(channel).get_services())
    for service in ("Models", "Inference", "Training", "Checkpoints", "Transactions", "Telemetry"):
        assert f"{PACKAGE}.{service}Service" in names, names

    services = Services(channel)
    assert services.call("TelemetryService", "GetServerInfo").protocol == PACKAGE
    model = services.call("ModelsService", "LoadModel", name="m", config_json=CONFIG).model
    assert (model.architecture, model.vocabulary) == ("llama", 10)

    logits = b"".join(r.chunk.data for r in services.call("InferenceService", "Forward", model="m", token_ids=[1, 2, 3]))
    assert len(struct.unpack("<30f", logits)) == 30

    sequence = {"token_ids": [1, 2, 3]}
    first, *chunks = services.call("TrainingService", "Backward", model="m", sequences=[sequence])
    assert first.losses[0].token_count == 2 and 1 < first.losses[0].loss < 4
    assert sum(r.chunk.elements for r in chunks) == model.parameters

    services.call("ModelsService", "UnloadModel", name="m")
    try:
        services.call("ModelsService", "UnloadModel", name="m")
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.NOT_FOUND
    else:
        raise AssertionError("a model can be unloaded once")


main()
