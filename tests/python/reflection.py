"""Uses a running compute-server through gRPC reflection alone: no generated code.

    pip install grpcio grpcio-reflection grpcio-health-checking
    compute-server serve --data-dir DIR --listen 127.0.0.1:50051 &
    python tests/python/reflection.py 127.0.0.1:50051
"""

import json
import sys

import grpc
from google.protobuf import descriptor_pool, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase


class Service:
    """Methods of one service as Python functions of keyword arguments."""

    def __init__(self, channel, pool, name):
        self.descriptor = pool.FindServiceByName(name)
        self.channel = channel

    def __getattr__(self, name):
        method = self.descriptor.methods_by_name[name]
        request = message_factory.GetMessageClass(method.input_type)
        response = message_factory.GetMessageClass(method.output_type)
        kind = f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
        call = getattr(self.channel, kind)(
            f"/{self.descriptor.full_name}/{name}",
            request_serializer=request.SerializeToString,
            response_deserializer=response.FromString,
        )
        if method.client_streaming:
            return lambda messages: call(iter([request(**fields) for fields in messages]))
        return lambda **fields: call(request(**fields))


def main(address):
    channel = grpc.insecure_channel(address)
    health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert health.status == health_pb2.HealthCheckResponse.SERVING, health
    database = ProtoReflectionDescriptorDatabase(channel)
    print("services:", *sorted(database.get_services()))
    pool = descriptor_pool.DescriptorPool(database)
    models, inference, training, telemetry = (
        Service(channel, pool, f"candle.compute.v1.{name}Service")
        for name in ("Models", "Inference", "Training", "Telemetry")
    )
    print("server:", str(telemetry.GetServerInfo()).replace("\n", " "))
    for model in models.ListModels(names=["reflection"]).models:
        models.UnloadModel(name=model.name)

    texts = ["one fish two fish red fish blue fish", "this one has a little star, this one has a little car"]
    models.TrainTokenizer([{"name": "reflection", "vocabulary_size": 290, "texts": texts}])
    config = {"architecture": "llama", "layers": 2, "width": 64, "heads": 4, "key_value_heads": 2}
    config |= {"context_length": 64, "tokenizer": "reflection"}
    model = models.LoadModel(name="reflection", config_json=json.dumps(config), seed=7).model
    print("model:", model.architecture, model.parameters, "parameters")

    sequences = [{"token_ids": [token.token_id for token in inference.Tokenize(model="reflection", input=text).tokens]} for text in texts]
    losses = []
    for _ in range(30):
        training.AccumulateBatches(model="reflection", sequences=sequences)
        losses.append(training.Step(model="reflection", options={"learning_rate": 0.01}).step.loss)
    print(f"loss: {losses[0]:.3f} to {losses[-1]:.3f}")
    assert losses[-1] < losses[0] / 4

    stream = inference.Generate(model="reflection", prompt="one fish", max_tokens=16, stream_tokens=True)
    messages = list(stream)
    text = "".join(message.token.text for message in messages)
    assert text == messages[-1].summary.completion, (text, messages[-1])
    print("one fish ->", repr(text), messages[-1].summary.finish_reason)

    try:
        inference.Score(model="none", input="x")
    except grpc.RpcError as error:
        metadata = dict(error.trailing_metadata())
        assert (error.code(), metadata["candle-sqlstate"]) == (grpc.StatusCode.NOT_FOUND, "42704"), error
    else:
        raise AssertionError("a model that does not exist was scored")
    models.UnloadModel(name="reflection")
    print("ok")


if __name__ == "__main__":
    main(sys.argv[1])
