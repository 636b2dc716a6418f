//! One expert server: the connection to it, and what its failures mean.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use candle_compute_proto::MAX_MESSAGE_BYTES;
use candle_compute_proto::v1::experts_service_client::ExpertsServiceClient;
use candle_models::config::ExpertServer;
use tokio_rustls::rustls;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic::{Code, Request, Status};

use super::access::ExpertAccess;
use super::address::Address;
use crate::error::{Error, Result};

/// Longest time for a connection, and again for its TLS.
const CONNECT: Duration = Duration::from_secs(2);
/// How often a server that computes is asked whether it is still there, and how soon it has to say so: what has died or
/// hangs is given up after both together.
const ALIVE: Duration = Duration::from_secs(1);
/// Longest time for an answer of a server that says that it is there.
const ANSWER: Duration = Duration::from_secs(60);

const CHECK_SERVER: &str =
    "Check that it runs and holds the model, or load the model again with other \"expert_servers\".";
const CHECK_TOKEN: &str =
    "Give its token in the file of --expert-token-file of the model's server; a change counts from the next call.";
const CHECK_ROLES: &str = "The token for an expert server needs the role generate there, and for weights that are lent and for training the role train.";
const CHECK_AUTHORITY: &str = "Give the authority that signed its certificate in the file of --expert-ca-file of the model's server, and in \
     expert_servers a name that the certificate has.";

/// A server of experts, as `config.expert_servers` names it.
pub(super) struct Server {
    /// The entry.
    pub(super) settings: ExpertServer,
    /// The model's name there.
    pub(super) model: Arc<str>,
    address: Address,
    access: Arc<ExpertAccess>,
    /// With the version of the authorities that it trusts.
    channel: Mutex<Option<(u64, Channel)>>,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Server").field(&self.settings).finish()
    }
}

/// Calls of an expert server.
pub(super) type Client = ExpertsServiceClient<InterceptedService<Channel, Bearer>>;

/// Shows a token with every call, if there is one.
#[derive(Clone)]
pub(super) struct Bearer(Option<MetadataValue<Ascii>>);

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> std::result::Result<Request<()>, Status> {
        if let Some(value) = &self.0 {
            request.metadata_mut().insert("authorization", value.clone());
        }
        Ok(request)
    }
}

impl Server {
    /// The server of an entry, for the model `model` unless the entry names another one. Nothing is connected yet.
    ///
    /// # Errors
    /// `InvalidArgument` for an endpoint that is no address.
    pub(super) fn new(settings: ExpertServer, model: &str, access: &Arc<ExpertAccess>) -> Result<Self> {
        let endpoint = &settings.endpoint;
        let address = Address::parse(endpoint).map_err(|reason| {
            Error::invalid(format!(
                "\"expert_servers\": endpoint \"{endpoint}\" is no address: {reason}; give http://HOST:PORT or https://HOST:PORT"
            ))
        })?;
        Ok(Self {
            model: settings.model.as_deref().unwrap_or(model).into(),
            settings,
            address,
            access: Arc::clone(access),
            channel: Mutex::new(None),
        })
    }

    /// A client with the token and the authorities that count now. Within a runtime.
    ///
    /// # Errors
    /// [`candle_models::Error::ExpertServer`] where no connection can be set up.
    pub(super) fn client(&self) -> candle_models::Result<Client> {
        let bearer = Bearer(self.access.authorization(&self.address));
        Ok(ExpertsServiceClient::with_interceptor(self.channel()?, bearer)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES))
    }

    fn channel(&self) -> candle_models::Result<Channel> {
        let authorities = self.address.tls.then(|| self.access.authorities());
        let version = authorities.as_ref().map_or(0, |authorities| authorities.version);
        let mut kept = self.channel.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, channel)) = kept.as_ref().filter(|(known, _)| *known == version) {
            return Ok(channel.clone());
        }
        let unusable = |error: tonic::transport::Error| self.failed(&with_causes(&error, error.to_string()));
        let mut endpoint = Endpoint::from_shared(self.settings.endpoint.clone())
            .map_err(unusable)?
            .connect_timeout(CONNECT)
            .timeout(ANSWER)
            .http2_keep_alive_interval(ALIVE)
            .keep_alive_timeout(ALIVE)
            .tcp_nodelay(true);
        if let Some(authorities) = authorities {
            let pem = authorities
                .pem()
                .map_err(|reason| self.error(&reason, CHECK_AUTHORITY))?;
            let trusted = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&*pem));
            endpoint = endpoint.tls_config(trusted.timeout(CONNECT)).map_err(unusable)?;
        }
        let channel = endpoint.connect_lazy();
        *kept = Some((version, channel.clone()));
        Ok(channel)
    }

    /// A failure that has no better known cause.
    pub(super) fn failed(&self, reason: &str) -> candle_models::Error {
        self.error(reason, CHECK_SERVER)
    }

    /// What a call failed with.
    pub(super) fn refused(&self, status: &Status) -> candle_models::Error {
        match status.code() {
            Code::Unauthenticated if self.access.authorization(&self.address).is_none() => {
                self.error("it asks for a token, and there is none for it", CHECK_TOKEN)
            }
            Code::Unauthenticated => self.error("it does not know the token that it was shown", CHECK_TOKEN),
            Code::PermissionDenied => self.error(status.message(), CHECK_ROLES),
            _ => {
                let reason = with_causes(status, status.message().to_owned());
                let hint = match has_bad_certificate(status) {
                    true => CHECK_AUTHORITY,
                    false => CHECK_SERVER,
                };
                self.error(&reason, hint)
            }
        }
    }

    fn error(&self, reason: &str, hint: &'static str) -> candle_models::Error {
        candle_models::Error::ExpertServer {
            endpoint: self.settings.endpoint.clone(),
            reason: reason.to_owned(),
            hint,
        }
    }
}

/// The causes of an error, outermost first.
fn causes<'a>(
    error: &'a (dyn std::error::Error + 'static),
) -> impl Iterator<Item = &'a (dyn std::error::Error + 'static)> {
    std::iter::successors(error.source(), |error| error.source())
}

/// Whether the certificate of the other side was not accepted.
fn has_bad_certificate(status: &Status) -> bool {
    causes(status).any(|error| {
        let inner = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        let inner = inner.and_then(|inner| inner.downcast_ref::<rustls::Error>());
        matches!(
            inner.or(error.downcast_ref()),
            Some(rustls::Error::InvalidCertificate(_))
        )
    })
}

/// A message with the causes that it does not name.
fn with_causes(error: &(dyn std::error::Error + 'static), message: String) -> String {
    causes(error).fold(message, |text, cause| {
        let reason = cause.to_string();
        match text.contains(&reason) {
            true => text,
            false => format!("{text}: {reason}"),
        }
    })
}
