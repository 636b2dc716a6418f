//! `TransactionsService`.

use std::sync::Arc;

use candle_compute_proto::v1;
use candle_compute_proto::v1::transactions_service_server::TransactionsService;
use tonic::{Request, Response, Status};

use super::Service;
use crate::access::Caller;
use crate::error::Error;

#[tonic::async_trait]
impl TransactionsService for Service {
    async fn publish(&self, request: Request<v1::PublishRequest>) -> Result<Response<v1::PublishResponse>, Status> {
        let caller = Caller::of(&request)?;
        let v1::PublishRequest {
            transaction_id,
            expects_writes,
        } = request.into_inner();
        self.check(&caller, &transaction_id)?;
        let app = Arc::clone(&self.app);
        // A client that goes away must not leave half a publish.
        let published = tokio::spawn(async move { app.publish(&transaction_id, expects_writes).await });
        let writes = published
            .await
            .map_err(|error| Error::Internal(format!("publishing failed: {error}")))??;
        Ok(Response::new(v1::PublishResponse { writes }))
    }

    async fn rollback(&self, request: Request<v1::RollbackRequest>) -> Result<Response<v1::RollbackResponse>, Status> {
        let caller = Caller::of(&request)?;
        let v1::RollbackRequest {
            transaction_id,
            subtransaction_id,
        } = request.into_inner();
        self.check(&caller, &transaction_id)?;
        let app = Arc::clone(&self.app);
        let rolled_back = tokio::spawn(async move { app.roll_back(&transaction_id, subtransaction_id).await });
        let writes = rolled_back
            .await
            .map_err(|error| Error::Internal(format!("rolling back failed: {error}")))??;
        Ok(Response::new(v1::RollbackResponse { writes }))
    }

    async fn release(&self, request: Request<v1::ReleaseRequest>) -> Result<Response<v1::ReleaseResponse>, Status> {
        let caller = Caller::of(&request)?;
        let v1::ReleaseRequest {
            transaction_id,
            subtransaction_id,
            parent_subtransaction_id,
        } = request.into_inner();
        self.check(&caller, &transaction_id)?;
        if parent_subtransaction_id >= subtransaction_id {
            return Err(Error::invalid(format!(
                "parent_subtransaction_id is {parent_subtransaction_id}; it must be less than subtransaction_id, which is {subtransaction_id}"
            ))
            .into());
        }
        let app = Arc::clone(&self.app);
        let released = tokio::spawn(async move {
            app.release(&transaction_id, subtransaction_id, parent_subtransaction_id)
                .await
        });
        released
            .await
            .map_err(|error| Error::Internal(format!("releasing failed: {error}")))??;
        Ok(Response::new(v1::ReleaseResponse {}))
    }
}

impl Service {
    /// Refuses what names no transaction, and another tenant's.
    fn check(&self, caller: &Caller, transaction_id: &str) -> Result<(), Error> {
        if transaction_id.is_empty() {
            return Err(Error::invalid("transaction_id is required"));
        }
        self.app.transactions.check_tenant(transaction_id, caller)
    }
}
