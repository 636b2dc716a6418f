//! The executor: tensors in chunks, operations that queue behind each other, and what is refused.

use std::path::Path;

use candle_compute_proto::v1::*;
use tonic::Code;

use crate::executor_support::{Session, bytes, floats, spec};
use crate::support::{TestServer, assert_status, collect};

fn data_type(name: &str) -> DataType {
    match name {
        "F32" => DataType::F32,
        "F16" => DataType::F16,
        "BF16" => DataType::Bf16,
        "I32" => DataType::I32,
        other => panic!("{other}"),
    }
}

/// The tensors of a safetensors file: its header, and the data behind it.
fn golden() -> (serde_json::Value, Vec<u8>) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden");
    let file = std::fs::read(folder.join("executor.golden.safetensors")).unwrap();
    let (length, rest) = file.split_first_chunk::<8>().unwrap();
    let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
    (serde_json::from_slice(header).unwrap(), data.to_vec())
}

/// A tensor as a message, and its elements as numbers.
fn load(golden: &(serde_json::Value, Vec<u8>), name: &str) -> (TensorChunk, Vec<f64>) {
    let entry = &golden.0[name];
    let at = |index: usize| entry["data_offsets"][index].as_u64().unwrap() as usize;
    let data = golden.1[at(0)..at(1)].to_vec();
    let dtype = data_type(entry["dtype"].as_str().unwrap());
    let shape = entry["shape"]
        .as_array()
        .unwrap()
        .iter()
        .map(|size| size.as_u64().unwrap());
    let numbers = numbers(dtype, &data);
    let chunk = TensorChunk {
        name: name.into(),
        dtype: dtype.into(),
        shape: shape.collect(),
        data: data.into(),
        ..Default::default()
    };
    (chunk, numbers)
}

fn numbers(dtype: DataType, data: &[u8]) -> Vec<f64> {
    let pairs = data.as_chunks::<2>().0.iter();
    let fours = data.as_chunks::<4>().0.iter();
    match dtype {
        DataType::F16 => pairs.map(|bytes| half::f16::from_le_bytes(*bytes).into()).collect(),
        DataType::Bf16 => pairs.map(|bytes| half::bf16::from_le_bytes(*bytes).into()).collect(),
        DataType::I32 => fours.map(|bytes| i32::from_le_bytes(*bytes).into()).collect(),
        _ => fours.map(|bytes| f32::from_le_bytes(*bytes).into()).collect(),
    }
}

#[tokio::test]
async fn results_are_those_of_pytorch() {
    let server = TestServer::start(&[]);
    let session = Session::open(&server.connect().await, "s").await.unwrap();
    let golden = golden();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden");
    let cases = std::fs::read(folder.join("executor.golden.json")).unwrap();
    let cases: Vec<serde_json::Value> = serde_json::from_slice(&cases).unwrap();
    for case in &cases {
        let name = case["name"].as_str().unwrap();
        let inputs: Vec<String> = (0..case["inputs"].as_u64().unwrap())
            .map(|i| format!("{name}.{i}"))
            .collect();
        let messages = inputs.iter().map(|input| PutTensorsRequest {
            session_id: "s".into(),
            chunk: Some(load(&golden, input).0),
            has_shape: true,
            ..Default::default()
        });
        session.send(messages.collect()).await.unwrap();
        let operation = OperationSpec {
            operation: case["operation"].as_str().unwrap().into(),
            inputs,
            outputs: vec![name.into()],
            attributes_json: case["attributes"].to_string(),
            ..Default::default()
        };
        session.submit_in(None, vec![operation]).await.unwrap();
    }
    for case in &cases {
        let name = case["name"].as_str().unwrap();
        let chunks = session.chunks(&[name]).await.unwrap();
        let (expected, values) = load(&golden, &format!("{name}.out"));
        let found = chunks[0].chunk.as_ref().unwrap();
        assert_eq!((chunks.len(), &found.shape), (1, &expected.shape), "{name}");
        assert_eq!(found.dtype(), expected.dtype(), "{name}");
        let tolerance = match expected.dtype() {
            DataType::Bf16 => 8e-3,
            DataType::F16 => 1e-3,
            _ => 2e-6,
        };
        let found = numbers(found.dtype(), &found.data);
        assert_eq!(found.len(), values.len(), "{name}");
        for (found, expected) in found.iter().zip(&values) {
            let close = (found - expected).abs() <= tolerance * expected.abs().max(1.0);
            assert!(
                close || found == expected || found.is_nan() && expected.is_nan(),
                "{name}: {found}, not {expected}"
            );
        }
    }
}

#[tokio::test]
async fn chunks_come_in_any_order_and_all_have_to() {
    let server = TestServer::start(&[]);
    let session = Session::open(&server.connect().await, "s").await.unwrap();
    let values: Vec<f32> = (0..600_000).map(|index| index as f32).collect();
    let part = |number: usize| &values[number << 18..values.len().min((number + 1) << 18)];
    let shape: &[u64] = &[2, 300_000];
    let made = session
        .send(vec![session.chunk("a", Some(shape), 2, part(2))])
        .await
        .unwrap();
    assert_eq!((made[0].chunks, made[0].status()), (3, TensorStatus::Incomplete));
    session.send(vec![session.chunk("a", None, 0, part(0))]).await.unwrap();
    // At use the missing chunk is named.
    for error in [
        session.submit("gelu", &["a"], "b").await.unwrap_err(),
        session.read("a").await.unwrap_err(),
    ] {
        assert_eq!(error.code(), Code::FailedPrecondition);
        assert!(
            error.message().contains("\"a\" is incomplete: chunk 1 of 3 is missing"),
            "{error}"
        );
    }
    assert_eq!(session.list().await.unwrap()[0].received, [0, 2]);
    for (message, expected) in [
        (
            session.chunk("a", None, 0, part(0)),
            "chunk \"0 of tensor a\" exists already",
        ),
        (session.chunk("a", None, 3, part(0)), "has 3 chunks"),
        (session.chunk("a", None, 1, &part(1)[1..]), "are 1048576"),
        (session.chunk("a", Some(&[600_000]), 1, part(1)), "[2, 300000]"),
    ] {
        let error = session.send(vec![message]).await.unwrap_err();
        assert!(error.message().contains(expected), "{error}");
    }
    session
        .send(vec![session.chunk("a", Some(shape), 1, part(1))])
        .await
        .unwrap();
    assert_eq!(session.read("a").await.unwrap(), values);
    // Chosen chunks, and shapes alone.
    let request = |chunks: Vec<u32>, without_data: bool| ReadTensorsRequest {
        session_id: "s".into(),
        transaction: None,
        selection: Some(TensorSelection {
            names: vec!["a".into(), "none".into()],
            chunks,
            without_data,
        }),
    };
    let read =
        |request| async { collect(session.client.clone().read_tensors(request).await.unwrap().into_inner()).await };
    let last = read(request(vec![2], false)).await.unwrap();
    let chunk = last[0].chunk.as_ref().unwrap();
    assert_eq!((last.len(), chunk.chunk, chunk.offset), (1, 2, 2 << 18));
    assert_eq!(floats(&chunk.data), part(2));
    let shapes = read(request(vec![], true)).await.unwrap();
    assert_eq!(shapes.len(), 3);
    assert!(
        shapes
            .iter()
            .all(|message| message.chunk.as_ref().unwrap().data.is_empty())
    );
    let error = session
        .send(vec![session.chunk("a", None, 0, part(0))])
        .await
        .unwrap_err();
    assert_eq!(error.code(), Code::AlreadyExists);
}

#[tokio::test]
async fn a_put_that_fails_leaves_nothing() {
    let server = TestServer::start(&[]);
    let session = Session::open(&server.connect().await, "s").await.unwrap();
    session
        .send(vec![session.chunk("kept", Some(&[300_000]), 0, &[1.0; 1 << 18])])
        .await
        .unwrap();
    let rest = vec![2.0; 300_000 - (1 << 18)];
    let messages = vec![
        session.chunk("new", Some(&[1]), 0, &[1.0]),
        session.chunk("kept", None, 1, &rest),
        session.chunk("new", None, 0, &[1.0]),
    ];
    assert_status(session.send(messages).await, Code::AlreadyExists, "42710");
    assert_eq!(session.names().await, ["kept"]);
    assert_eq!(session.list().await.unwrap()[0].status(), TensorStatus::Incomplete);
    for (message, code) in [
        (session.chunk("x", None, 0, &[1.0]), Code::InvalidArgument),
        (session.chunk("", Some(&[1]), 0, &[1.0]), Code::InvalidArgument),
        (session.chunk("x", Some(&[2]), 0, &[1.0]), Code::InvalidArgument),
        (session.chunk("x", Some(&[1; 9]), 0, &[1.0]), Code::InvalidArgument),
        (
            session.chunk("x", Some(&[u64::MAX, u64::MAX]), 0, &[1.0]),
            Code::InvalidArgument,
        ),
        (session.chunk("x", Some(&[1 << 40]), 0, &[1.0]), Code::ResourceExhausted),
    ] {
        assert_eq!(session.send(vec![message]).await.unwrap_err().code(), code);
    }
    let nowhere = PutTensorsRequest {
        device: "cuda:99".into(),
        ..session.chunk("x", Some(&[1]), 0, &[1.0])
    };
    assert_status(session.send(vec![nowhere]).await, Code::Unimplemented, "0A000");
    assert_eq!(session.names().await, ["kept"]);
}

#[tokio::test]
async fn dependent_operations_queue_and_a_read_waits() {
    let server = TestServer::start(&[]);
    let session = Session::open(&server.connect().await, "s").await.unwrap();
    session.put("x", &[2, 2], &[1.0, 2.0, 3.0, 4.0]).await;
    let chain: Vec<OperationSpec> = (0..50)
        .map(|n| spec("add", &[&format!("x{n}"), "x"], &format!("x{}", n + 1)))
        .collect();
    session.submit("copy", &["x"], "x0").await.unwrap();
    let submitted = session.submit_in(None, chain).await.unwrap();
    assert_eq!(submitted.last().unwrap().id, 51);
    // An input may go once it has been submitted.
    session.delete_in(None, "x25").await.unwrap();
    assert_eq!(session.read("x50").await.unwrap(), [51.0, 102.0, 153.0, 204.0]);
    let request = WaitOperationsRequest {
        session_id: "s".into(),
        ..Default::default()
    };
    let mut ended = collect(
        session
            .client
            .clone()
            .wait_operations(request)
            .await
            .unwrap()
            .into_inner(),
    )
    .await
    .unwrap();
    ended.sort_by_key(|message| message.operation.as_ref().unwrap().id);
    assert_eq!(ended.len(), 51);
    for message in ended {
        let operation = message.operation.unwrap();
        assert_eq!(operation.status(), OperationStatus::Done);
        let (started, finished) = (operation.started_at.unwrap(), operation.finished_at.unwrap());
        assert!((started.seconds, started.nanos) <= (finished.seconds, finished.nanos));
    }
}

#[tokio::test]
async fn a_failure_is_told_by_what_depends_on_it() {
    let server = TestServer::start(&[]);
    let session = Session::open(&server.connect().await, "s").await.unwrap();
    session.put("x", &[2], &[1.0, f32::NAN]).await;
    session.put("table", &[3, 2], &[0.0; 6]).await;
    let cast = OperationSpec {
        attributes_json: r#"{"dtype": "i32"}"#.into(),
        ..spec("cast", &["x"], "ids")
    };
    let operations = vec![
        cast,
        spec("embedding", &["ids", "table"], "rows"),
        spec("gelu", &["rows"], "end"),
        spec("silu", &["x"], "other"),
    ];
    session.submit_in(None, operations).await.unwrap();
    let first = "operation 1 (cast of \"x\" into \"ids\") failed: element 1 is NaN";
    for name in ["ids", "rows", "end"] {
        let error = session.read(name).await.unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument);
        assert!(
            error.message().contains(first) && error.message().contains(name),
            "{error}"
        );
    }
    assert!(session.read("other").await.unwrap()[1].is_nan());
    let tensors = session.list().await.unwrap();
    let end = tensors.iter().find(|tensor| tensor.name == "end").unwrap();
    assert_eq!(end.status(), TensorStatus::Failed);
    assert!(
        end.error.contains("operation 3 (gelu") && end.error.contains(first),
        "{}",
        end.error
    );
    let statuses: Vec<OperationStatus> = session.operations().await.iter().map(Operation::status).collect();
    use OperationStatus::{Done, Failed};
    assert_eq!(statuses, [Failed, Failed, Failed, Done]);
}

#[tokio::test]
async fn what_cannot_be_computed_is_refused_at_once() {
    let server = TestServer::start(&[]);
    let session = Session::open(&server.connect().await, "s").await.unwrap();
    session.put("a", &[2, 3], &[0.0; 6]).await;
    session.put("b", &[2, 3], &[0.0; 6]).await;
    let with = |attributes: &str| OperationSpec {
        attributes_json: attributes.into(),
        ..spec("softmax", &["a"], "c")
    };
    let on = OperationSpec {
        device: "cuda:99".into(),
        ..spec("gelu", &["a"], "c")
    };
    let two = OperationSpec {
        outputs: vec!["c".into(), "d".into()],
        ..spec("gelu", &["a"], "c")
    };
    for (operation, code, expected) in [
        (
            spec("matmul", &["a", "b"], "c"),
            Code::InvalidArgument,
            "\"a\" f32 [2, 3], \"b\" f32 [2, 3]",
        ),
        (spec("matmul", &["a", "nothing"], "c"), Code::NotFound, "\"nothing\""),
        (spec("convolve", &["a"], "c"), Code::NotFound, "matmul"),
        (spec("add", &["a", "b"], "b"), Code::AlreadyExists, "\"b\""),
        (spec("gelu", &["a"], ""), Code::InvalidArgument, "empty"),
        (with("[1]"), Code::InvalidArgument, "JSON object"),
        (with(r#"{"axis": 2}"#), Code::InvalidArgument, "axis is 2"),
        (on, Code::Unimplemented, "cuda:99"),
        (two, Code::InvalidArgument, "1 output, not 2"),
    ] {
        let error = session
            .submit_in(None, vec![spec("silu", &["a"], "first"), operation])
            .await
            .unwrap_err();
        assert_eq!(error.code(), code, "{error}");
        assert!(error.message().contains(expected), "{error}");
    }
    // All or nothing.
    assert_eq!(session.names().await, ["a", "b"]);
    assert!(session.operations().await.is_empty());
    assert_status(session.delete_in(None, "nothing").await, Code::NotFound, "42704");
    assert_status(session.cancel(9).await, Code::NotFound, "42704");
}

#[tokio::test]
async fn an_executor_describes_itself() {
    let server = TestServer::start(&["--max-queue", "7"]);
    let client = server.connect().await;
    let described = client
        .tensors
        .clone()
        .describe_executor(DescribeExecutorRequest {})
        .await;
    let described = described.unwrap().into_inner();
    assert_eq!(
        (described.protocol.as_str(), described.max_waiting_operations),
        ("candle.compute.v1", 7)
    );
    assert_eq!(described.devices[0].name, "cpu");
    let matmul = described
        .operations
        .iter()
        .find(|operation| operation.name == "matmul")
        .unwrap();
    assert_eq!((matmul.least_inputs, matmul.most_inputs), (2, 2));
    assert_eq!(matmul.attributes, ["transpose_a", "transpose_b"]);
    assert!(bytes(&[1.0]) == [0, 0, 128, 63]);
}
