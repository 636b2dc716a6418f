//! Which call needs which role: one table for gRPC and HTTP.

use super::Role::{self, Admin, Generate, Read, Train};

/// What a call asks of its caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Need {
    /// Nothing: probes come without a token.
    Open,
    /// A token, whatever its roles, and no quota: what ends or frees something must always be possible.
    Token,
    /// A token, whatever its roles, within its tenant's quotas.
    Known,
    /// A token that has the role, within its tenant's quotas.
    Role(Role),
}

/// Paths and what they need. A path that ends in `/` stands for all below it.
const METHODS: &[(&str, Need)] = &[
    ("/grpc.health.v1.Health/", Need::Open),
    ("/healthz", Need::Open),
    ("/readyz", Need::Open),
    ("/grpc.reflection.v1.ServerReflection/", Need::Token),
    ("/grpc.reflection.v1alpha.ServerReflection/", Need::Token),
    ("/candle.compute.v1.TransactionsService/Publish", Need::Token),
    ("/candle.compute.v1.TransactionsService/Rollback", Need::Token),
    ("/candle.compute.v1.TransactionsService/Release", Need::Token),
    ("/candle.compute.v1.TelemetryService/GetServerInfo", Need::Token),
    ("/candle.compute.v1.TelemetryService/CancelRequest", Need::Token),
    ("/candle.compute.v1.TelemetryService/ListDevices", Need::Role(Read)),
    ("/candle.compute.v1.TelemetryService/ListRequests", Need::Role(Read)),
    ("/candle.compute.v1.TelemetryService/ListMetrics", Need::Role(Read)),
    ("/candle.compute.v1.TelemetryService/TrackRequest", Need::Role(Read)),
    (
        "/candle.compute.v1.TelemetryService/RunKernelBenchmarks",
        Need::Role(Admin),
    ),
    ("/candle.compute.v1.ModelsService/ListModels", Need::Role(Read)),
    ("/candle.compute.v1.ModelsService/DigestModel", Need::Role(Read)),
    ("/candle.compute.v1.ModelsService/ReadParameters", Need::Role(Read)),
    ("/candle.compute.v1.ModelsService/ListAttentionBlocks", Need::Role(Read)),
    (
        "/candle.compute.v1.ModelsService/ChangeAttentionBlocks",
        Need::Role(Train),
    ),
    ("/candle.compute.v1.ModelsService/UpdateModel", Need::Role(Train)),
    ("/candle.compute.v1.ModelsService/LoadModel", Need::Role(Admin)),
    ("/candle.compute.v1.ModelsService/UnloadModel", Need::Role(Admin)),
    ("/candle.compute.v1.ModelsService/TrainTokenizer", Need::Role(Admin)),
    ("/candle.compute.v1.InferenceService/Generate", Need::Role(Generate)),
    ("/candle.compute.v1.InferenceService/Tokenize", Need::Role(Read)),
    ("/candle.compute.v1.InferenceService/Detokenize", Need::Role(Read)),
    ("/candle.compute.v1.InferenceService/TokenizeTexts", Need::Role(Read)),
    ("/candle.compute.v1.InferenceService/DetokenizeTexts", Need::Role(Read)),
    ("/candle.compute.v1.InferenceService/Score", Need::Role(Read)),
    ("/candle.compute.v1.InferenceService/Embed", Need::Role(Read)),
    ("/candle.compute.v1.InferenceService/Forward", Need::Role(Read)),
    ("/candle.compute.v1.InferenceService/RouteExperts", Need::Role(Read)),
    ("/candle.compute.v1.TrainingService/ListBatches", Need::Role(Read)),
    ("/candle.compute.v1.TrainingService/ListSteps", Need::Role(Read)),
    ("/candle.compute.v1.TrainingService/ListTape", Need::Role(Read)),
    ("/candle.compute.v1.TrainingService/ReadGradients", Need::Role(Read)),
    ("/candle.compute.v1.TrainingService/ComputeLosses", Need::Role(Read)),
    (
        "/candle.compute.v1.TrainingService/AccumulateBatches",
        Need::Role(Train),
    ),
    ("/candle.compute.v1.TrainingService/Backward", Need::Role(Train)),
    ("/candle.compute.v1.TrainingService/MergeGradients", Need::Role(Train)),
    ("/candle.compute.v1.TrainingService/WriteParameters", Need::Role(Train)),
    ("/candle.compute.v1.TrainingService/ZeroGradients", Need::Role(Train)),
    ("/candle.compute.v1.TrainingService/Step", Need::Role(Train)),
    ("/candle.compute.v1.AdaptersService/ListAdapters", Need::Role(Read)),
    ("/candle.compute.v1.AdaptersService/CreateAdapter", Need::Role(Train)),
    ("/candle.compute.v1.AdaptersService/MergeAdapter", Need::Role(Train)),
    ("/candle.compute.v1.AdaptersService/DropAdapter", Need::Role(Train)),
    (
        "/candle.compute.v1.CheckpointsService/ListCheckpoints",
        Need::Role(Read),
    ),
    (
        "/candle.compute.v1.CheckpointsService/CreateCheckpoint",
        Need::Role(Train),
    ),
    (
        "/candle.compute.v1.CheckpointsService/DeleteCheckpoint",
        Need::Role(Train),
    ),
    ("/candle.compute.v1.TensorsService/DescribeExecutor", Need::Token),
    ("/candle.compute.v1.TensorsService/PublishTensors", Need::Token),
    ("/candle.compute.v1.TensorsService/RollbackTensors", Need::Token),
    ("/candle.compute.v1.TensorsService/ReleaseTensors", Need::Token),
    ("/candle.compute.v1.TensorsService/CancelOperations", Need::Token),
    ("/candle.compute.v1.TensorsService/HoldSession", Need::Role(Read)),
    ("/candle.compute.v1.TensorsService/ListTensors", Need::Role(Read)),
    ("/candle.compute.v1.TensorsService/ReadTensors", Need::Role(Read)),
    ("/candle.compute.v1.TensorsService/ListOperations", Need::Role(Read)),
    ("/candle.compute.v1.TensorsService/WaitOperations", Need::Role(Read)),
    ("/candle.compute.v1.TensorsService/PutTensors", Need::Role(Train)),
    ("/candle.compute.v1.TensorsService/DeleteTensors", Need::Role(Train)),
    ("/candle.compute.v1.TensorsService/SubmitOperations", Need::Role(Train)),
    ("/candle.compute.v1.ExpertsService/ListExperts", Need::Role(Read)),
    ("/candle.compute.v1.ExpertsService/ListRoutes", Need::Role(Read)),
    ("/candle.compute.v1.ExpertsService/ListRouters", Need::Role(Read)),
    ("/candle.compute.v1.ExpertsService/UpdateRouter", Need::Role(Train)),
    ("/candle.compute.v1.ExpertsService/ForwardExperts", Need::Role(Generate)),
    ("/candle.compute.v1.ExpertsService/BackwardExpert", Need::Role(Train)),
    ("/candle.compute.v1.ExpertsService/LendExpert", Need::Role(Train)),
    (
        "/candle.compute.v1.EvaluationsService/ListEvaluations",
        Need::Role(Read),
    ),
    ("/candle.compute.v1.EvaluationsService/Evaluate", Need::Role(Generate)),
    (
        "/candle.compute.v1.EvaluationsService/DeleteEvaluation",
        Need::Role(Generate),
    ),
    ("/v1/models", Need::Role(Read)),
    ("/v1/models/", Need::Role(Read)),
    ("/v1/embeddings", Need::Role(Read)),
    ("/v1/completions", Need::Role(Generate)),
    ("/v1/chat/completions", Need::Role(Generate)),
    ("/metrics", Need::Role(Read)),
];

/// The paths that are listed.
pub(crate) fn methods() -> impl Iterator<Item = &'static str> {
    METHODS.iter().map(|(path, _)| *path)
}

/// What a call of `path` needs. What is not listed needs every role there is to be told that it does not exist.
pub(crate) fn need(path: &str) -> Need {
    let covers = |listed: &str| path == listed || (listed.ends_with('/') && path.starts_with(listed));
    METHODS
        .iter()
        .find(|(listed, _)| covers(listed))
        .map_or(Need::Role(Admin), |(_, need)| *need)
}

#[cfg(test)]
mod tests {
    use candle_compute_proto::v1::FILE_DESCRIPTOR_SET;
    use prost::Message as _;

    use super::*;

    #[test]
    fn every_call_of_the_protocol_is_listed() {
        let files = prost_types::FileDescriptorSet::decode(FILE_DESCRIPTOR_SET)
            .unwrap()
            .file;
        let mut count = 0;
        for file in files.iter().filter(|file| file.package() == "candle.compute.v1") {
            for service in &file.service {
                for method in &service.method {
                    let path = format!("/{}.{}/{}", file.package(), service.name(), method.name());
                    assert!(
                        METHODS.iter().any(|(listed, _)| *listed == path),
                        "{path} is not in METHODS"
                    );
                    count += 1;
                }
            }
        }
        assert!(count > 40, "{count}");
    }

    #[test]
    fn what_is_below_a_path_needs_what_it_needs() {
        assert_eq!(need("/grpc.health.v1.Health/Check"), Need::Open);
        assert_eq!(need("/v1/models/smollm2"), Need::Role(Read));
        assert_eq!(need("/healthz/x"), Need::Role(Admin));
        assert_eq!(need("/anything"), Need::Role(Admin));
    }
}
