//! Sessions of the executor, and short ways to use one.

use candle_compute_proto::v1::tensors_service_client::TensorsServiceClient;
use candle_compute_proto::v1::*;
use tonic::{Status, Streaming};

use crate::support::{Client, Transport, collect};

/// An open session.
pub struct Session {
    pub client: TensorsServiceClient<Transport>,
    pub id: String,
    held: Streaming<HoldSessionResponse>,
}

/// Little-endian elements.
pub fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// Elements from little-endian bytes.
pub fn floats(data: &[u8]) -> Vec<f32> {
    data.as_chunks()
        .0
        .iter()
        .map(|bytes| f32::from_le_bytes(*bytes))
        .collect()
}

/// A transaction on its top level, or in a subtransaction.
pub fn within(transaction_id: &str, subtransaction_id: u32) -> Option<TransactionContext> {
    Some(TransactionContext {
        transaction_id: transaction_id.into(),
        subtransaction_id,
    })
}

impl Session {
    pub async fn open(client: &Client, id: &str) -> Result<Self, Status> {
        let mut tensors = client.tensors.clone();
        let request = HoldSessionRequest { session_id: id.into() };
        let mut held = tensors.hold_session(request).await?.into_inner();
        held.message().await?.unwrap();
        Ok(Self {
            client: tensors,
            id: id.into(),
            held,
        })
    }

    /// Waits until the server has ended the stream that holds the session.
    pub async fn ended(mut self) {
        assert!(matches!(self.held.message().await, Ok(None) | Err(_)));
    }

    /// A chunk of an f32 tensor; the shape is given where there is one.
    pub fn chunk(&self, name: &str, shape: Option<&[u64]>, number: u32, values: &[f32]) -> PutTensorsRequest {
        PutTensorsRequest {
            session_id: self.id.clone(),
            chunk: Some(TensorChunk {
                name: name.into(),
                shape: shape.unwrap_or_default().to_vec(),
                chunk: number,
                data: bytes(values).into(),
                ..Default::default()
            }),
            has_shape: shape.is_some(),
            ..Default::default()
        }
    }

    pub async fn send(&self, messages: Vec<PutTensorsRequest>) -> Result<Vec<Tensor>, Status> {
        let sent = self.client.clone().put_tensors(tokio_stream::iter(messages)).await?;
        Ok(sent.into_inner().tensors)
    }

    /// Puts an f32 tensor of one chunk, in a transaction if there is one.
    pub async fn put_in(
        &self,
        transaction: Option<TransactionContext>,
        name: &str,
        shape: &[u64],
        values: &[f32],
    ) -> Result<Tensor, Status> {
        let message = PutTensorsRequest {
            transaction,
            ..self.chunk(name, Some(shape), 0, values)
        };
        Ok(self.send(vec![message]).await?.remove(0))
    }

    pub async fn put(&self, name: &str, shape: &[u64], values: &[f32]) -> Tensor {
        self.put_in(None, name, shape, values).await.unwrap()
    }

    pub async fn submit_in(
        &self,
        transaction: Option<TransactionContext>,
        operations: Vec<OperationSpec>,
    ) -> Result<Vec<Operation>, Status> {
        let request = SubmitOperationsRequest {
            session_id: self.id.clone(),
            transaction,
            operations,
        };
        Ok(self
            .client
            .clone()
            .submit_operations(request)
            .await?
            .into_inner()
            .operations)
    }

    pub async fn submit(&self, operation: &str, inputs: &[&str], output: &str) -> Result<Operation, Status> {
        let spec = spec(operation, inputs, output);
        Ok(self.submit_in(None, vec![spec]).await?.remove(0))
    }

    pub async fn chunks(&self, names: &[&str]) -> Result<Vec<ReadTensorsResponse>, Status> {
        let request = ReadTensorsRequest {
            session_id: self.id.clone(),
            transaction: None,
            selection: Some(TensorSelection {
                names: names.iter().map(ToString::to_string).collect(),
                ..Default::default()
            }),
        };
        collect(self.client.clone().read_tensors(request).await?.into_inner()).await
    }

    /// The elements of an f32 tensor, once they are there.
    pub async fn read(&self, name: &str) -> Result<Vec<f32>, Status> {
        let chunks = self.chunks(&[name]).await?;
        let data = chunks
            .iter()
            .flat_map(|message| floats(&message.chunk.as_ref().unwrap().data));
        Ok(data.collect())
    }

    pub async fn list(&self) -> Result<Vec<Tensor>, Status> {
        let request = ListTensorsRequest {
            session_id: self.id.clone(),
            ..Default::default()
        };
        Ok(self.client.clone().list_tensors(request).await?.into_inner().tensors)
    }

    pub async fn names(&self) -> Vec<String> {
        self.list()
            .await
            .unwrap()
            .into_iter()
            .map(|tensor| tensor.name)
            .collect()
    }

    pub async fn operations(&self) -> Vec<Operation> {
        let request = ListOperationsRequest {
            session_id: self.id.clone(),
            ..Default::default()
        };
        self.client
            .clone()
            .list_operations(request)
            .await
            .unwrap()
            .into_inner()
            .operations
    }

    pub async fn delete_in(&self, transaction: Option<TransactionContext>, name: &str) -> Result<(), Status> {
        let request = DeleteTensorsRequest {
            session_id: self.id.clone(),
            transaction,
            names: vec![name.into()],
        };
        self.client.clone().delete_tensors(request).await.map(drop)
    }

    pub async fn cancel(&self, id: u64) -> Result<(), Status> {
        let request = CancelOperationsRequest {
            session_id: self.id.clone(),
            ids: vec![id],
        };
        self.client.clone().cancel_operations(request).await.map(drop)
    }

    pub async fn publish(&self, transaction: &str) -> Result<u64, Status> {
        let request = PublishTensorsRequest {
            session_id: self.id.clone(),
            transaction_id: transaction.into(),
            expects_writes: true,
        };
        Ok(self.client.clone().publish_tensors(request).await?.into_inner().writes)
    }

    pub async fn roll_back(&self, transaction: &str, subtransaction_id: u32) -> u64 {
        let request = RollbackTensorsRequest {
            session_id: self.id.clone(),
            transaction_id: transaction.into(),
            subtransaction_id,
        };
        self.client
            .clone()
            .rollback_tensors(request)
            .await
            .unwrap()
            .into_inner()
            .writes
    }

    pub async fn release(&self, transaction: &str, subtransaction_id: u32, parent_subtransaction_id: u32) {
        let request = ReleaseTensorsRequest {
            session_id: self.id.clone(),
            transaction_id: transaction.into(),
            subtransaction_id,
            parent_subtransaction_id,
        };
        self.client.clone().release_tensors(request).await.unwrap();
    }

    /// Queues products that together take many seconds: `long0`, `long1`, …
    pub async fn keep_busy(&self) -> Vec<Operation> {
        let size = 1536;
        let count = (size * size) as usize;
        let values = vec![0.5f32; count];
        let chunks = values.chunks(1 << 18).zip(0..);
        let messages = chunks.map(|(chunk, number)| self.chunk("busy", Some(&[size, size]), number, chunk));
        self.send(messages.collect()).await.unwrap();
        let products = (0..200).map(|number| spec("matmul", &["busy", "busy"], &format!("long{number}")));
        self.submit_in(None, products.collect()).await.unwrap()
    }
}

/// An operation without attributes.
pub fn spec(operation: &str, inputs: &[&str], output: &str) -> OperationSpec {
    OperationSpec {
        operation: operation.into(),
        inputs: inputs.iter().map(ToString::to_string).collect(),
        outputs: vec![output.into()],
        ..Default::default()
    }
}
