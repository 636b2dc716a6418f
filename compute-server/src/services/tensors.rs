//! `TensorsService`.

use candle_compute_proto::v1::tensors_service_server::TensorsService;
use candle_compute_proto::{PROTOCOL, v1};
use candle_models::executor::OPERATIONS;
use tonic::{Request, Response, Status, Streaming};

use super::{ResponseStream, Service, tensor_streams};
use crate::access::Caller;
use crate::devices;
use crate::error::Error;
use crate::executor::{Put, Write};

#[tonic::async_trait]
impl TensorsService for Service {
    type HoldSessionStream = ResponseStream<v1::HoldSessionResponse>;
    type ReadTensorsStream = ResponseStream<v1::ReadTensorsResponse>;
    type WaitOperationsStream = ResponseStream<v1::WaitOperationsResponse>;

    async fn describe_executor(
        &self,
        _request: Request<v1::DescribeExecutorRequest>,
    ) -> Result<Response<v1::DescribeExecutorResponse>, Status> {
        let operations = OPERATIONS.iter().map(|operation| {
            let inputs = operation.inputs();
            v1::OperationDescription {
                name: operation.name().to_owned(),
                least_inputs: u32::try_from(*inputs.start()).unwrap_or(u32::MAX),
                most_inputs: u32::try_from(*inputs.end()).unwrap_or(u32::MAX),
                attributes: operation.attributes().iter().map(ToString::to_string).collect(),
            }
        });
        Ok(Response::new(v1::DescribeExecutorResponse {
            protocol: PROTOCOL.to_owned(),
            executor: concat!("compute-server ", env!("CARGO_PKG_VERSION")).to_owned(),
            operations: operations.collect(),
            devices: devices::list(self.app.config.threads, self.app.memory.used()),
            max_message_bytes: self.app.config.limits.message_bytes as u64,
            max_waiting_operations: self.app.executor.queue_limit as u64,
            durable: false,
        }))
    }

    async fn hold_session(
        &self,
        request: Request<v1::HoldSessionRequest>,
    ) -> Result<Response<Self::HoldSessionStream>, Status> {
        let caller = Caller::of(&request)?;
        let session = self.app.executor.open(&caller, &request.into_inner().session_id)?;
        Ok(Response::new(tensor_streams::hold(session)))
    }

    async fn put_tensors(
        &self,
        request: Request<Streaming<v1::PutTensorsRequest>>,
    ) -> Result<Response<v1::PutTensorsResponse>, Status> {
        let caller = Caller::of(&request)?;
        let mut messages = request.into_inner();
        let mut next = messages.message().await?;
        let first = next.as_ref().ok_or_else(|| Error::invalid("the stream is empty"))?;
        let context = first.transaction.as_ref();
        let mut write = Write::begin(&self.app.executor, &caller, &first.session_id, context)?;
        let mut tensors = Vec::new();
        while let Some(message) = next {
            let chunk = message
                .chunk
                .as_ref()
                .ok_or_else(|| Error::invalid("chunk is required"))?;
            let tensor = write.put(&Put {
                chunk,
                has_shape: message.has_shape,
                device: &message.device,
                persistent: message.persistent,
            })?;
            tensors.push(tensor.describe());
            next = messages.message().await?;
        }
        write.finish()?;
        Ok(Response::new(v1::PutTensorsResponse { tensors }))
    }

    async fn list_tensors(
        &self,
        request: Request<v1::ListTensorsRequest>,
    ) -> Result<Response<v1::ListTensorsResponse>, Status> {
        let caller = Caller::of(&request)?;
        let v1::ListTensorsRequest { session_id, names, .. } = request.into_inner();
        let tensors = self.app.executor.tensors(&caller, &session_id, &names)?;
        let tensors = tensors.iter().map(|tensor| tensor.describe()).collect();
        Ok(Response::new(v1::ListTensorsResponse { tensors }))
    }

    async fn read_tensors(
        &self,
        request: Request<v1::ReadTensorsRequest>,
    ) -> Result<Response<Self::ReadTensorsStream>, Status> {
        let caller = Caller::of(&request)?;
        let v1::ReadTensorsRequest {
            session_id, selection, ..
        } = request.into_inner();
        let selection = selection.unwrap_or_default();
        let tensors = self.app.executor.tensors(&caller, &session_id, &selection.names)?;
        Ok(Response::new(tensor_streams::read(tensors, selection)))
    }

    async fn delete_tensors(
        &self,
        request: Request<v1::DeleteTensorsRequest>,
    ) -> Result<Response<v1::DeleteTensorsResponse>, Status> {
        let caller = Caller::of(&request)?;
        let v1::DeleteTensorsRequest {
            session_id,
            transaction,
            names,
        } = request.into_inner();
        let mut write = Write::begin(&self.app.executor, &caller, &session_id, transaction.as_ref())?;
        write.delete(&names)?;
        write.finish()?;
        Ok(Response::new(v1::DeleteTensorsResponse {}))
    }

    async fn submit_operations(
        &self,
        request: Request<v1::SubmitOperationsRequest>,
    ) -> Result<Response<v1::SubmitOperationsResponse>, Status> {
        let caller = Caller::of(&request)?;
        let v1::SubmitOperationsRequest {
            session_id,
            transaction,
            operations,
        } = request.into_inner();
        let mut write = Write::begin(&self.app.executor, &caller, &session_id, transaction.as_ref())?;
        let submitted = operations.into_iter().map(|spec| write.submit(spec));
        let submitted = submitted.collect::<Result<Vec<_>, Error>>()?;
        write.finish()?;
        let operations = submitted.iter().map(|operation| operation.facts.describe()).collect();
        Ok(Response::new(v1::SubmitOperationsResponse { operations }))
    }

    async fn list_operations(
        &self,
        request: Request<v1::ListOperationsRequest>,
    ) -> Result<Response<v1::ListOperationsResponse>, Status> {
        let caller = Caller::of(&request)?;
        let v1::ListOperationsRequest { session_id, ids, .. } = request.into_inner();
        let operations = self.app.executor.operations(&caller, &session_id, &ids)?;
        let operations = operations.iter().map(|operation| operation.facts.describe()).collect();
        Ok(Response::new(v1::ListOperationsResponse { operations }))
    }

    async fn wait_operations(
        &self,
        request: Request<v1::WaitOperationsRequest>,
    ) -> Result<Response<Self::WaitOperationsStream>, Status> {
        let caller = Caller::of(&request)?;
        let v1::WaitOperationsRequest { session_id, ids, .. } = request.into_inner();
        let operations = self.app.executor.operations(&caller, &session_id, &ids)?;
        Ok(Response::new(tensor_streams::wait(operations, &ids)?))
    }

    async fn cancel_operations(
        &self,
        request: Request<v1::CancelOperationsRequest>,
    ) -> Result<Response<v1::CancelOperationsResponse>, Status> {
        let caller = Caller::of(&request)?;
        let v1::CancelOperationsRequest { session_id, ids } = request.into_inner();
        self.app.executor.cancel(&caller, &session_id, &ids)?;
        Ok(Response::new(v1::CancelOperationsResponse {}))
    }

    async fn publish_tensors(
        &self,
        request: Request<v1::PublishTensorsRequest>,
    ) -> Result<Response<v1::PublishTensorsResponse>, Status> {
        let caller = Caller::of(&request)?;
        let v1::PublishTensorsRequest {
            session_id,
            transaction_id,
            expects_writes,
        } = request.into_inner();
        let executor = &self.app.executor;
        let writes = executor.publish(&caller, &session_id, &transaction_id, expects_writes)?;
        Ok(Response::new(v1::PublishTensorsResponse { writes }))
    }

    async fn rollback_tensors(
        &self,
        request: Request<v1::RollbackTensorsRequest>,
    ) -> Result<Response<v1::RollbackTensorsResponse>, Status> {
        let caller = Caller::of(&request)?;
        let v1::RollbackTensorsRequest {
            session_id,
            transaction_id,
            subtransaction_id,
        } = request.into_inner();
        let executor = &self.app.executor;
        let writes = executor.roll_back(&caller, &session_id, &transaction_id, subtransaction_id)?;
        Ok(Response::new(v1::RollbackTensorsResponse { writes }))
    }

    async fn release_tensors(
        &self,
        request: Request<v1::ReleaseTensorsRequest>,
    ) -> Result<Response<v1::ReleaseTensorsResponse>, Status> {
        let caller = Caller::of(&request)?;
        let v1::ReleaseTensorsRequest {
            session_id,
            transaction_id,
            subtransaction_id,
            parent_subtransaction_id,
        } = request.into_inner();
        self.app.executor.release(
            &caller,
            &session_id,
            &transaction_id,
            subtransaction_id,
            parent_subtransaction_id,
        )?;
        Ok(Response::new(v1::ReleaseTensorsResponse {}))
    }
}
