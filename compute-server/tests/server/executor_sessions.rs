//! Sessions of the executor: transactions, persistent tensors, tenants, limits, cancelling, and the end.

use candle_compute_proto::v1::*;
use tonic::Code;

use crate::executor_support::{Session, spec, within};
use crate::support::{Client, TestServer, assert_status};

/// A persistent tensor of one element, in a transaction if there is one.
async fn keep(
    session: &Session,
    transaction: Option<TransactionContext>,
    name: &str,
    value: f32,
) -> Result<(), tonic::Status> {
    let message = PutTensorsRequest {
        persistent: Some(true),
        transaction,
        ..session.chunk(name, Some(&[]), 0, &[value])
    };
    session.send(vec![message]).await.map(drop)
}

/// Waits until the server lists no work.
async fn idle(client: &Client) {
    loop {
        let listed = client.telemetry.clone().list_requests(ListRequestsRequest {}).await;
        if listed.unwrap().into_inner().requests.is_empty() {
            return;
        }
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_rollback_undoes_tensors_operations_and_deletions() {
    let server = TestServer::start(&[]);
    let session = Session::open(&server.connect().await, "s").await.unwrap();
    session.put("old", &[1], &[1.0]).await;
    session.put_in(within("t", 1), "a", &[1], &[2.0]).await.unwrap();
    session.delete_in(within("t", 1), "old").await.unwrap();
    session.put_in(within("t", 1), "old", &[2], &[3.0, 4.0]).await.unwrap();
    session
        .submit_in(within("t", 1), vec![spec("add", &["a", "old"], "sum")])
        .await
        .unwrap();
    // The session sees what its transaction did, results included.
    assert_eq!(session.read("sum").await.unwrap(), [5.0, 6.0]);
    assert_eq!(session.roll_back("t", 0).await, 7);
    assert_eq!(session.names().await, ["old"]);
    assert_eq!(session.read("old").await.unwrap(), [1.0]);
    assert!(session.operations().await.is_empty());
    assert_eq!(session.roll_back("t", 0).await, 0);
    assert_status(session.publish("t").await, Code::Aborted, "40001");
}

#[tokio::test]
async fn savepoints_undo_what_came_after_them() {
    let server = TestServer::start(&[]);
    let session = Session::open(&server.connect().await, "s").await.unwrap();
    let values = vec![1.0; 300_000];
    let chunk = |number: usize, level: u32| PutTensorsRequest {
        transaction: within("t", level),
        ..session.chunk(
            "a",
            Some(&[300_000]),
            number as u32,
            &values[number << 18..values.len().min((number + 1) << 18)],
        )
    };
    session.send(vec![chunk(0, 1)]).await.unwrap();
    session.send(vec![chunk(1, 2)]).await.unwrap();
    // Use makes a tensor of the chunks, which the rollback takes apart again.
    session
        .submit_in(within("t", 2), vec![spec("sum", &["a"], "sum")])
        .await
        .unwrap();
    assert_eq!(session.read("sum").await.unwrap(), [300_000.0]);
    session.roll_back("t", 2).await;
    assert_eq!(session.names().await, ["a"]);
    assert_status(session.read("a").await, Code::FailedPrecondition, "55000");
    session.send(vec![chunk(1, 3)]).await.unwrap();
    session.release("t", 3, 1).await;
    session.roll_back("t", 3).await;
    assert_eq!(session.read("a").await.unwrap(), values);
    assert_eq!(session.publish("t").await.unwrap(), 3);
    assert_eq!(session.publish("t").await.unwrap(), 3);
    assert_status(
        session.put_in(within("t", 1), "late", &[1], &[1.0]).await,
        Code::Aborted,
        "40001",
    );
    assert_eq!(session.read("a").await.unwrap(), values);
}

#[tokio::test]
async fn another_transaction_gives_up_the_one_before() {
    let server = TestServer::start(&[]);
    let session = Session::open(&server.connect().await, "s").await.unwrap();
    session.put_in(within("first", 1), "a", &[1], &[1.0]).await.unwrap();
    session.put_in(within("second", 1), "a", &[1], &[2.0]).await.unwrap();
    assert_status(session.publish("first").await, Code::Aborted, "40001");
    session.publish("second").await.unwrap();
    assert_eq!(session.read("a").await.unwrap(), [2.0]);
}

#[tokio::test]
async fn sessions_see_their_own_tensors_and_persistent_ones() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    let (ann, bob) = (
        Session::open(&client, "ann").await.unwrap(),
        Session::open(&client, "bob").await.unwrap(),
    );
    assert_eq!(
        Session::open(&client, "ann").await.err().unwrap().code(),
        Code::AlreadyExists
    );
    ann.put("a", &[1], &[1.0]).await;
    bob.put("a", &[1], &[2.0]).await;
    assert_eq!(
        (ann.read("a").await.unwrap(), bob.read("a").await.unwrap()),
        (vec![1.0], vec![2.0])
    );
    // Persistent ones are seen by others once they are published.
    keep(&ann, within("t", 1), "p", 7.0).await.unwrap();
    assert_eq!(
        (ann.names().await, bob.names().await),
        (vec!["a".into(), "p".into()], vec!["a".to_owned()])
    );
    ann.publish("t").await.unwrap();
    assert_eq!(bob.read("p").await.unwrap(), [7.0]);
    let error = keep(&bob, None, "p", 8.0).await.unwrap_err();
    assert_eq!(error.code(), Code::AlreadyExists);
    // A tensor of the session hides it for the session alone.
    bob.put("p", &[1], &[9.0]).await;
    assert_eq!(
        (bob.read("p").await.unwrap(), ann.read("p").await.unwrap()),
        (vec![9.0], vec![7.0])
    );
    bob.delete_in(None, "p").await.unwrap();
    // A deletion that is rolled back was seen by nobody else.
    bob.delete_in(within("u", 1), "p").await.unwrap();
    assert_eq!(
        (bob.names().await, ann.read("p").await.unwrap()),
        (vec!["a".to_owned()], vec![7.0])
    );
    bob.roll_back("u", 0).await;
    // Of two that are deleted, or made, at a time, the second is told.
    bob.delete_in(within("v", 1), "p").await.unwrap();
    ann.delete_in(within("w", 1), "p").await.unwrap();
    bob.publish("v").await.unwrap();
    assert_status(ann.publish("w").await, Code::Aborted, "40001");
    ann.roll_back("w", 0).await;
    keep(&ann, within("x", 1), "q", 1.0).await.unwrap();
    keep(&bob, within("y", 1), "q", 2.0).await.unwrap();
    ann.publish("x").await.unwrap();
    assert_status(bob.publish("y").await, Code::AlreadyExists, "42710");
    bob.roll_back("y", 0).await;
    assert_eq!(bob.read("q").await.unwrap(), [1.0]);
    // An incomplete tensor is not published.
    let part = PutTensorsRequest {
        persistent: Some(true),
        ..ann.chunk("part", Some(&[300_000]), 0, &[1.0; 1 << 18])
    };
    assert_status(ann.send(vec![part]).await, Code::FailedPrecondition, "55000");
    drop(ann);
    assert_eq!(bob.read("q").await.unwrap(), [1.0]);
}

#[tokio::test]
async fn a_persistent_result_outlives_its_session() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    let ann = Session::open(&client, "ann").await.unwrap();
    ann.put("x", &[2], &[1.0, 2.0]).await;
    let kept = OperationSpec {
        persistent: true,
        ..spec("mul", &["double", "x"], "kept")
    };
    let operations = vec![spec("add", &["x", "x"], "double"), kept];
    ann.submit_in(within("t", 1), operations).await.unwrap();
    ann.publish("t").await.unwrap();
    drop(ann);
    let bob = Session::open(&client, "bob").await.unwrap();
    assert_eq!(bob.read("kept").await.unwrap(), [2.0, 8.0]);
    assert_eq!(bob.names().await, ["kept"]);
}

#[tokio::test]
async fn the_end_of_a_session_frees_its_memory_and_stops_its_work() {
    let server = TestServer::start(&["--memory-limit", "128MiB"]);
    let client = server.connect().await;
    let session = Session::open(&client, "s").await.unwrap();
    let big: Vec<PutTensorsRequest> = (0..20)
        .map(|number| session.chunk("big", Some(&[20 << 18]), number, &[1.0; 1 << 18]))
        .collect();
    session.send(big).await.unwrap();
    // 20 MiB each: the seventh does not fit, and the error names tensor and limit.
    let products = (0..8).map(|number| spec("gelu", &["big"], &format!("out{number}")));
    let error = session.submit_in(None, products.collect()).await.unwrap_err();
    assert_eq!(error.code(), Code::ResourceExhausted);
    assert_eq!(error.metadata().get("candle-sqlstate").unwrap(), "HV001");
    assert!(error.message().contains("tensor \"out5\" of f32 [5242880]"), "{error}");
    assert!(error.message().contains("memory limit of 134217728 bytes"), "{error}");
    assert_eq!(session.names().await, ["big"]);
    session.submit("gelu", &["big"], "kept").await.unwrap();
    drop(session);
    // All of it is free again, once the server has noticed.
    let next = loop {
        let Ok(next) = Session::open(&client, "s").await else {
            tokio::task::yield_now().await;
            continue;
        };
        break next;
    };
    idle(&client).await;
    let again: Vec<PutTensorsRequest> = (0..120)
        .map(|number| next.chunk("big", Some(&[120 << 18]), number, &[1.0; 1 << 18]))
        .collect();
    next.send(again).await.unwrap();
}

#[tokio::test]
async fn a_session_that_is_not_open_is_told_apart() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    let mut never = Session::open(&client, "s").await.unwrap();
    never.id = "never".into();
    assert_status(never.list().await, Code::DataLoss, "HV00N");
    assert_status(never.put_in(None, "a", &[1], &[1.0]).await, Code::DataLoss, "HV00N");
    assert_status(never.submit("gelu", &["a"], "b").await, Code::DataLoss, "HV00N");
    assert_status(never.read("a").await, Code::DataLoss, "HV00N");
    assert_eq!(
        Session::open(&client, "").await.err().unwrap().code(),
        Code::InvalidArgument
    );
    // A server that shuts down ends the sessions it holds, and ends in time.
    let (mut server, last) = (server, Session::open(&client, "last").await.unwrap());
    server.terminate();
    last.ended().await;
    assert!(server.wait().success());
}

#[tokio::test]
async fn operations_are_cancelled_running_and_waiting() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    let session = Session::open(&client, "s").await.unwrap();
    let queued = session.keep_busy().await;
    session.submit("gelu", &["long199"], "after").await.unwrap();
    // Each is a request; deleting that of one that waits fails it at once, and what depends on it when its turn comes.
    let listed = client
        .telemetry
        .clone()
        .list_requests(ListRequestsRequest {})
        .await
        .unwrap();
    let listed = listed.into_inner().requests;
    assert!(listed.iter().all(|request| request.kind == "tensor_operation"));
    let last = &queued[199];
    assert!(listed.iter().any(|request| request.id == last.request_id));
    let request = CancelRequestRequest {
        id: last.request_id.clone(),
    };
    client.telemetry.clone().cancel_request(request).await.unwrap();
    let error = session.read("long199").await.unwrap_err();
    assert_eq!(error.code(), Code::Cancelled);
    assert!(error.message().contains("operation 200 (matmul"), "{error}");
    let waiting = session.operations().await;
    assert_eq!(waiting[199].status(), OperationStatus::Cancelled);
    for operation in &queued[..199] {
        session.cancel(operation.id).await.unwrap();
    }
    let error = session.read("after").await.unwrap_err();
    assert!(
        error.message().contains("gelu") && error.message().contains("operation 200"),
        "{error}"
    );
    idle(&client).await;
    assert_eq!(session.operations().await.len(), 2);
}

#[tokio::test]
async fn a_rollback_stops_what_it_undoes_and_sessions_take_turns() {
    let server = TestServer::start(&["--max-queue", "201"]);
    let client = server.connect().await;
    let (busy, quick) = (
        Session::open(&client, "busy").await.unwrap(),
        Session::open(&client, "quick").await.unwrap(),
    );
    let queued = busy.keep_busy().await;
    // One session's line does not hold up another's.
    quick.put("x", &[1], &[-1.0]).await;
    quick.submit("relu", &["x"], "y").await.unwrap();
    assert_eq!(quick.read("y").await.unwrap(), [0.0]);
    let still = busy.operations().await;
    assert!(
        still
            .iter()
            .any(|operation| operation.status() == OperationStatus::Queued)
    );
    // The queue is bounded, and a call that waits can be given up.
    let many = (0..202).map(|number| spec("relu", &["busy"], &format!("more{number}")));
    assert_status(
        busy.submit_in(None, many.collect()).await,
        Code::ResourceExhausted,
        "53400",
    );
    let patience = std::time::Duration::from_millis(1);
    assert!(tokio::time::timeout(patience, busy.read("long199")).await.is_err());
    let operation = spec("relu", &["long199"], "undone");
    busy.submit_in(within("t", 1), vec![operation]).await.unwrap();
    busy.roll_back("t", 0).await;
    assert_eq!(busy.operations().await.len(), queued.len());
    drop(busy);
    idle(&client).await;
}

#[tokio::test]
async fn tenants_are_apart_and_roles_are_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tokens");
    std::fs::write(
        &file,
        "ann ann-token-0123456789 memory=1MiB\nbob bob-token-0123456789\nreader reader-token-012345 roles=read\n",
    )
    .unwrap();
    let server = TestServer::start(&["--token-file", file.to_str().unwrap()]);
    let client = server.connect().await;
    let open = async |token: &str| Session::open(&client.with_token(token), "s").await.unwrap();
    let (ann, bob, reader) = (
        open("ann-token-0123456789").await,
        open("bob-token-0123456789").await,
        open("reader-token-012345").await,
    );
    // The same session id and the same names, even persistent ones, are others'.
    keep(&ann, None, "p", 1.0).await.unwrap();
    keep(&bob, None, "p", 2.0).await.unwrap();
    assert_eq!(
        (ann.read("p").await.unwrap(), bob.read("p").await.unwrap()),
        (vec![1.0], vec![2.0])
    );
    let error = ann
        .put_in(None, "big", &[1 << 18], &vec![0.0; 1 << 18])
        .await
        .unwrap_err();
    assert!(error.message().contains("tenant \"ann\""), "{error}");
    assert!(reader.names().await.is_empty());
    assert_status(
        reader.put_in(None, "a", &[1], &[1.0]).await,
        Code::PermissionDenied,
        "42501",
    );
    assert_status(
        reader.submit("gelu", &["a"], "b").await,
        Code::PermissionDenied,
        "42501",
    );
    assert_eq!(
        Session::open(&client, "s").await.err().unwrap().code(),
        Code::Unauthenticated
    );
}
