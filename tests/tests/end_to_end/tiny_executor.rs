//! A server of `TensorsService` and nothing else, in plain loops over f32, and the extension in front of it: what
//! `docs/executor.md` asks for is enough.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_compute_proto::v1::tensors_service_server::{TensorsService, TensorsServiceServer};
use candle_compute_proto::v1::*;
use end_to_end_tests::database_errors::expect_failure;
use end_to_end_tests::fixture::Fixture;
use end_to_end_tests::server::ComputeServer;
use postgres::NoTls;
use tokio::sync::{Notify, mpsc};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Request, Response, Status, Streaming};

/// Elements of a chunk.
const CHUNK: usize = 1 << 18;

type Messages<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[derive(Clone)]
struct Held {
    shape: Vec<u64>,
    /// By chunk; none for a result that never comes.
    chunks: BTreeMap<u32, Vec<f32>>,
    pending: bool,
}

/// What a rollback goes back to.
#[derive(Clone, Default)]
struct Contents {
    tensors: BTreeMap<String, Held>,
    operations: Vec<Operation>,
}

#[derive(Default)]
struct Session {
    now: Contents,
    transaction: String,
    /// The contents before the first write of each subtransaction.
    before: Vec<(u32, Contents)>,
}

#[derive(Clone, Default)]
struct Tiny {
    sessions: Arc<Mutex<HashMap<String, Session>>>,
    /// Whether somebody waits for a result.
    waits: Arc<Notify>,
}

fn count(shape: &[u64]) -> usize {
    shape.iter().product::<u64>() as usize
}

impl Held {
    fn chunk_count(&self) -> u32 {
        count(&self.shape).div_ceil(CHUNK).max(1) as u32
    }

    fn values(&self) -> Result<Vec<f32>, Status> {
        match (0..self.chunk_count()).find(|number| !self.chunks.contains_key(number)) {
            Some(missing) => Err(Status::failed_precondition(format!("chunk {missing} is missing"))),
            None => Ok(self.chunks.values().flatten().copied().collect()),
        }
    }

    fn describe(&self, name: &str) -> Tensor {
        let status = match self.chunks.len() as u32 == self.chunk_count() {
            _ if self.pending => TensorStatus::Pending,
            true => TensorStatus::Ready,
            false => TensorStatus::Incomplete,
        };
        Tensor {
            name: name.into(),
            device: "cpu".into(),
            dtype: DataType::F32.into(),
            shape: self.shape.clone(),
            elements: count(&self.shape) as u64,
            chunks: self.chunk_count(),
            status: status.into(),
            received: self.chunks.keys().copied().collect(),
            ..Default::default()
        }
    }
}

impl Tiny {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Session>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Works on a session, as a part of a transaction if there is one.
    fn with<T>(
        &self,
        id: &str,
        context: Option<TransactionContext>,
        work: impl FnOnce(&mut Contents) -> Result<T, Status>,
    ) -> Result<T, Status> {
        let mut sessions = self.lock();
        let session = sessions
            .get_mut(id)
            .ok_or_else(|| Status::data_loss("no such session"))?;
        let mut changed = session.now.clone();
        let result = work(&mut changed)?;
        if let Some(context) = context {
            if session.transaction != context.transaction_id {
                assert!(session.before.is_empty(), "the extension has ended every transaction");
                session.transaction = context.transaction_id;
            }
            let level = context.subtransaction_id.max(1);
            if !session.before.iter().any(|(of, _)| *of == level) {
                session.before.push((level, session.now.clone()));
            }
        }
        session.now = changed;
        Ok(result)
    }
}

/// The result of an operation: its shape and elements; none for one that never comes.
fn compute(spec: &OperationSpec, inputs: &[Held]) -> Result<(Vec<u64>, Option<Vec<f32>>), Status> {
    let shapes: Vec<&[u64]> = inputs.iter().map(|input| input.shape.as_slice()).collect();
    match (spec.operation.as_str(), &shapes[..]) {
        ("never", [shape]) => Ok((shape.to_vec(), None)),
        ("add", [a, b]) if a == b => {
            let (a, b) = (inputs[0].values()?, inputs[1].values()?);
            let sums = a.iter().zip(&b).map(|(a, b)| a + b).collect();
            Ok((shapes[0].to_vec(), Some(sums)))
        }
        ("matmul", [[m, k], [rows, n]]) if k == rows => {
            let (a, b) = (inputs[0].values()?, inputs[1].values()?);
            let [m, k, n] = [*m, *k, *n].map(|size| size as usize);
            let of = |index: usize| (0..k).map(|i| a[index / n * k + i] * b[i * n + index % n]).sum::<f32>();
            Ok((vec![m as u64, n as u64], Some((0..m * n).map(of).collect())))
        }
        (known @ ("add" | "matmul"), _) => Err(Status::invalid_argument(format!("{known} of {shapes:?}"))),
        (unknown, _) => Err(Status::not_found(format!("there is no operation {unknown:?}"))),
    }
}

#[tonic::async_trait]
impl TensorsService for Tiny {
    type HoldSessionStream = Messages<HoldSessionResponse>;
    type ReadTensorsStream = Messages<ReadTensorsResponse>;
    type WaitOperationsStream = Messages<WaitOperationsResponse>;

    async fn describe_executor(
        &self,
        _: Request<DescribeExecutorRequest>,
    ) -> Result<Response<DescribeExecutorResponse>, Status> {
        let device = Device {
            name: "cpu".into(),
            kind: "loops".into(),
            available: true,
            ..Default::default()
        };
        Ok(Response::new(DescribeExecutorResponse {
            protocol: "candle.compute.v1".into(),
            executor: "tiny".into(),
            devices: vec![device],
            ..Default::default()
        }))
    }

    async fn hold_session(
        &self,
        request: Request<HoldSessionRequest>,
    ) -> Result<Response<Self::HoldSessionStream>, Status> {
        let id = request.into_inner().session_id;
        self.lock().insert(id.clone(), Session::default());
        let (sender, receiver) = mpsc::channel(1);
        let sessions = Arc::clone(&self.sessions);
        tokio::spawn(async move {
            let _ = sender.send(Ok(HoldSessionResponse {})).await;
            sender.closed().await;
            sessions.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn put_tensors(
        &self,
        request: Request<Streaming<PutTensorsRequest>>,
    ) -> Result<Response<PutTensorsResponse>, Status> {
        let messages: Vec<PutTensorsRequest> = request.into_inner().collect::<Result<_, Status>>().await?;
        let first = messages.first().cloned().unwrap_or_default();
        let tensors = self.with(&first.session_id, first.transaction, |contents| {
            let put = messages.into_iter().map(|message| {
                let chunk = message.chunk.unwrap_or_default();
                let made = Held {
                    shape: chunk.shape,
                    chunks: BTreeMap::new(),
                    pending: false,
                };
                let held = contents.tensors.entry(chunk.name.clone()).or_insert(made);
                let values = chunk.data.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
                match held.chunks.insert(chunk.chunk, values.collect()) {
                    None => Ok(held.describe(&chunk.name)),
                    Some(_) => Err(Status::already_exists(format!(
                        "tensor {:?} exists already",
                        chunk.name
                    ))),
                }
            });
            put.collect()
        })?;
        Ok(Response::new(PutTensorsResponse { tensors }))
    }

    async fn list_tensors(
        &self,
        request: Request<ListTensorsRequest>,
    ) -> Result<Response<ListTensorsResponse>, Status> {
        let request = request.into_inner();
        let tensors = self.with(&request.session_id, None, |contents| {
            let wanted = |name: &String| request.names.is_empty() || request.names.contains(name);
            let tensors = contents.tensors.iter().filter(|(name, _)| wanted(name));
            Ok(tensors.map(|(name, held)| held.describe(name)).collect())
        })?;
        Ok(Response::new(ListTensorsResponse { tensors }))
    }

    async fn read_tensors(
        &self,
        request: Request<ReadTensorsRequest>,
    ) -> Result<Response<Self::ReadTensorsStream>, Status> {
        let request = request.into_inner();
        let selection = request.selection.unwrap_or_default();
        let tensors = self.with(&request.session_id, None, |contents| Ok(contents.tensors.clone()))?;
        let mut messages = Vec::new();
        for (name, held) in tensors {
            if !selection.names.is_empty() && !selection.names.contains(&name) {
                continue;
            }
            if held.pending && !selection.without_data {
                self.waits.notify_one();
                return Ok(Response::new(Box::pin(tokio_stream::pending())));
            }
            if !selection.without_data {
                held.values()?;
            }
            let chosen = |number: &u32| selection.chunks.is_empty() || selection.chunks.contains(number);
            for number in (0..held.chunk_count()).filter(chosen) {
                let values = held.chunks.get(&number).cloned().unwrap_or_default();
                let data: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
                let chunk = TensorChunk {
                    name: name.clone(),
                    dtype: DataType::F32.into(),
                    shape: held.shape.clone(),
                    chunk: number,
                    offset: u64::from(number) * CHUNK as u64,
                    elements: values.len() as u64,
                    data: if selection.without_data { Vec::new() } else { data }.into(),
                    ..Default::default()
                };
                messages.push(Ok(ReadTensorsResponse {
                    chunk: Some(chunk),
                    tensor: Some(held.describe(&name)),
                }));
            }
        }
        Ok(Response::new(Box::pin(tokio_stream::iter(messages))))
    }

    async fn delete_tensors(
        &self,
        request: Request<DeleteTensorsRequest>,
    ) -> Result<Response<DeleteTensorsResponse>, Status> {
        let request = request.into_inner();
        self.with(&request.session_id, request.transaction, |contents| {
            request
                .names
                .iter()
                .try_for_each(|name| match contents.tensors.remove(name) {
                    Some(_) => Ok(()),
                    None => Err(Status::not_found(format!("there is no tensor {name:?}"))),
                })
        })?;
        Ok(Response::new(DeleteTensorsResponse {}))
    }

    async fn submit_operations(
        &self,
        request: Request<SubmitOperationsRequest>,
    ) -> Result<Response<SubmitOperationsResponse>, Status> {
        let request = request.into_inner();
        let operations = self.with(&request.session_id, request.transaction, |contents| {
            let submitted = request.operations.into_iter().map(|spec| {
                let missing = |name: &String| Status::not_found(format!("there is no tensor {name:?}"));
                let inputs = spec
                    .inputs
                    .iter()
                    .map(|name| contents.tensors.get(name).cloned().ok_or_else(|| missing(name)));
                let (shape, values) = compute(&spec, &inputs.collect::<Result<Vec<_>, Status>>()?)?;
                let pending = values.is_none();
                let chunks = values.map(|values| values.chunks(CHUNK).map(<[f32]>::to_vec).collect::<Vec<_>>());
                let chunks = (0..).zip(chunks.unwrap_or_default()).collect();
                let held = Held { shape, chunks, pending };
                contents.tensors.insert(spec.outputs[0].clone(), held);
                let status = if pending {
                    OperationStatus::Running
                } else {
                    OperationStatus::Done
                };
                let operation = Operation {
                    id: contents.operations.len() as u64 + 1,
                    spec: Some(spec),
                    status: status.into(),
                    ..Default::default()
                };
                contents.operations.push(operation.clone());
                Ok(operation)
            });
            submitted.collect()
        })?;
        Ok(Response::new(SubmitOperationsResponse { operations }))
    }

    async fn list_operations(
        &self,
        request: Request<ListOperationsRequest>,
    ) -> Result<Response<ListOperationsResponse>, Status> {
        let request = request.into_inner();
        let mut operations = self.with(&request.session_id, None, |contents| Ok(contents.operations.clone()))?;
        operations.retain(|operation| request.ids.is_empty() || request.ids.contains(&operation.id));
        Ok(Response::new(ListOperationsResponse { operations }))
    }

    async fn wait_operations(
        &self,
        _: Request<WaitOperationsRequest>,
    ) -> Result<Response<Self::WaitOperationsStream>, Status> {
        Err(Status::unimplemented("not mandatory"))
    }

    async fn cancel_operations(
        &self,
        request: Request<CancelOperationsRequest>,
    ) -> Result<Response<CancelOperationsResponse>, Status> {
        let request = request.into_inner();
        self.with(&request.session_id, None, |contents| {
            contents
                .operations
                .retain(|operation| !request.ids.contains(&operation.id));
            Ok(())
        })?;
        Ok(Response::new(CancelOperationsResponse {}))
    }

    async fn publish_tensors(
        &self,
        request: Request<PublishTensorsRequest>,
    ) -> Result<Response<PublishTensorsResponse>, Status> {
        let request = request.into_inner();
        let mut sessions = self.lock();
        let session = sessions
            .get_mut(&request.session_id)
            .ok_or_else(|| Status::data_loss("no such session"))?;
        if session.transaction != request.transaction_id && request.expects_writes {
            return Err(Status::aborted("no such transaction"));
        }
        session.before.clear();
        Ok(Response::new(PublishTensorsResponse::default()))
    }

    async fn rollback_tensors(
        &self,
        request: Request<RollbackTensorsRequest>,
    ) -> Result<Response<RollbackTensorsResponse>, Status> {
        let request = request.into_inner();
        let mut sessions = self.lock();
        let session = sessions
            .get_mut(&request.session_id)
            .ok_or_else(|| Status::data_loss("no such session"))?;
        let first = session
            .before
            .iter()
            .position(|(level, _)| *level >= request.subtransaction_id);
        if session.transaction == request.transaction_id
            && let Some((_, contents)) = first.and_then(|first| session.before.drain(first..).next())
        {
            session.now = contents;
        }
        Ok(Response::new(RollbackTensorsResponse::default()))
    }

    async fn release_tensors(
        &self,
        request: Request<ReleaseTensorsRequest>,
    ) -> Result<Response<ReleaseTensorsResponse>, Status> {
        let request = request.into_inner();
        let mut sessions = self.lock();
        let session = sessions
            .get_mut(&request.session_id)
            .ok_or_else(|| Status::data_loss("no such session"))?;
        let parent = request.parent_subtransaction_id;
        let known = session.before.iter().any(|(level, _)| *level == parent);
        for (level, _) in &mut session.before {
            if *level == request.subtransaction_id {
                *level = parent;
            }
        }
        if known {
            // The earlier one of the two is what the parent goes back to.
            session.before.dedup_by_key(|(level, _)| *level);
        }
        Ok(Response::new(ReleaseTensorsResponse {}))
    }
}

/// Serves on a free port until the program ends.
fn serve(tiny: Tiny) -> SocketAddr {
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            sender.send(listener.local_addr().unwrap()).unwrap();
            let server = tonic::transport::Server::builder().add_service(TensorsServiceServer::new(tiny));
            server
                .serve_with_incoming(TcpListenerStream::new(listener))
                .await
                .unwrap();
        });
    });
    receiver.recv().unwrap()
}

#[test]
fn a_server_of_tensors_alone_is_enough() {
    let tiny = Tiny::default();
    let address = serve(tiny.clone());
    let fixture = Fixture::bare(ComputeServer::start());
    let mut client = fixture.connect();
    let setup = format!(
        "CREATE SERVER tiny FOREIGN DATA WRAPPER candle_fdw OPTIONS (endpoint 'http://{address}');
         CREATE SCHEMA llm;
         IMPORT FOREIGN SCHEMA candle FROM SERVER tiny INTO llm;
         INSERT INTO llm.tensors (name, shape, data) VALUES
             ('a', '{{2,2}}', candle.tensor_data('{{1,2,3,4}}')), ('b', '{{2,2}}', candle.tensor_data('{{0,1,1,0}}'));
         INSERT INTO llm.tensor_operations (operation, inputs, outputs) VALUES
             ('matmul', '{{a,b}}', '{{c}}'), ('add', '{{c,a}}', '{{d}}')"
    );
    client.batch_execute(&setup).unwrap();
    let mut read = |name: &str| -> Option<Vec<f64>> {
        let query = "SELECT candle.tensor_elements(data) FROM llm.tensors WHERE name = $1";
        client.query_opt(query, &[&name]).unwrap().map(|row| row.get(0))
    };
    assert_eq!(read("d"), Some(vec![3.0, 3.0, 7.0, 7.0]));
    assert_eq!(read("nothing"), None);
    // ROLLBACK and savepoints by the service's own calls.
    client
        .batch_execute(
            "BEGIN; INSERT INTO llm.tensors (name, shape, data) VALUES ('x', '{1}', candle.tensor_data('{1}'));
             SAVEPOINT s; DELETE FROM llm.tensors WHERE name = 'x';
             INSERT INTO llm.tensors (name, shape, data) VALUES ('y', '{1}', candle.tensor_data('{2}'));
             ROLLBACK TO s;
             SAVEPOINT t; INSERT INTO llm.tensors (name, shape, data) VALUES ('z', '{1}', candle.tensor_data('{3}'));
             RELEASE t; COMMIT;
             BEGIN; DELETE FROM llm.tensors WHERE name <> 'x'; ROLLBACK",
        )
        .unwrap();
    let names: String = client
        .query_one("SELECT string_agg(name, ',' ORDER BY name) FROM llm.tensors", &[])
        .unwrap()
        .get(0);
    assert_eq!(names, "a,b,c,d,x,z");
    let row = client.query_one("SELECT name, kind FROM llm.devices", &[]).unwrap();
    assert_eq!((row.get(0), row.get(1)), ("cpu", "loops"));
    // Codes without metadata become SQLSTATEs, and what the server does not have is not supported.
    let operation = |operation: &str, inputs: &str| {
        format!(
            "INSERT INTO llm.tensor_operations (operation, inputs, outputs) VALUES ('{operation}', '{inputs}', '{{e}}')"
        )
    };
    expect_failure(client.batch_execute(&operation("matmul", "{a,x}")), "22023");
    expect_failure(client.batch_execute(&operation("matmul", "{a,nothing}")), "42704");
    expect_failure(client.batch_execute(&operation("softmax", "{a}")), "42704");
    expect_failure(client.query("SELECT * FROM llm.models", &[]), "0A000");
    // A result that never comes can be given up.
    client.batch_execute(&operation("never", "{a}")).unwrap();
    let token = client.cancel_token();
    let waiting = std::thread::spawn(move || {
        let result = client.query("SELECT data FROM llm.tensors WHERE name = 'e'", &[]);
        (result.map(drop), client)
    });
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(tiny.waits.notified());
    token.cancel_query(NoTls).unwrap();
    let (result, mut client) = waiting.join().unwrap();
    expect_failure(result, "57014");
    client
        .batch_execute("DELETE FROM llm.tensor_operations WHERE operation = 'never'")
        .unwrap();
    // The end of the backend is that of its session.
    drop(client);
    end_to_end_tests::waiting::wait_for("the session to end", || tiny.lock().is_empty().then_some(()));
}
