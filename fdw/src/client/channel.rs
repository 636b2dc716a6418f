//! Opening and keeping connections.
#![allow(unsafe_code)]

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::CStr;
use std::sync::Arc;

use candle_compute_proto::PROTOCOL;
use candle_compute_proto::v1::{DescribeExecutorRequest, GetServerInfoRequest};
use pgrx::{PgSqlErrorCode, pg_sys};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

use super::{Client, Session, TensorSession, read, wait};
use crate::error::{Error, Result, describe};
use crate::options::{ClientCertificate, ServerOptions, token};
use crate::transaction::random_id;

/// Where Debian keeps the authorities that the system trusts.
const SYSTEM_AUTHORITIES: &str = "/etc/ssl/certs/ca-certificates.crt";

/// An open connection and what it was opened with.
struct Open {
    options: ServerOptions,
    certificate: Option<ClientCertificate>,
    client: Client,
}

thread_local! {
    static CONNECTIONS: RefCell<HashMap<Session, Open>> = RefCell::new(HashMap::new());
}

/// The user's connection to the server; opens it when there is none, or when its options have changed.
pub(crate) fn connect(session: Session) -> Result<Client> {
    let options = ServerOptions::parse(&server_options(session.server))?;
    let mapping = mapping_options(session);
    let (token, certificate) = (token(&mapping)?, ClientCertificate::parse(&mapping)?);
    let open = CONNECTIONS.with_borrow(|connections| {
        let open = connections
            .get(&session)
            .filter(|open| open.options == options && open.certificate == certificate && open.client.token == token)?;
        Some(open.client.clone())
    });
    if let Some(client) = open {
        return Ok(client);
    }
    let channel = wait(open_any(&options, certificate.as_ref()))?;
    let client = Client {
        session,
        channel,
        token,
        timeout: options.request_timeout,
        fetch_size: options.fetch_size,
        batch_size: options.batch_size,
        tensor_session: Arc::new(TensorSession::new(random_id())),
    };
    wait(async {
        // A listener that never answers takes connections all the same.
        tokio::time::timeout(options.connect_timeout, greet(&client))
            .await
            .unwrap_or_else(|_| {
                let code = PgSqlErrorCode::ERRCODE_FDW_UNABLE_TO_ESTABLISH_CONNECTION;
                let limit = options.connect_timeout.as_millis();
                Err(
                    Error::new(code, format!("the compute server did not answer within {limit} ms"))
                        .hint("Raise the server option \"connect_timeout_ms\", or check what listens at the endpoint."),
                )
            })
    })?;
    CONNECTIONS.with_borrow_mut(|connections| {
        connections.insert(
            session,
            Open {
                options,
                certificate,
                client: client.clone(),
            },
        );
    });
    Ok(client)
}

/// Checks that the other side is a compute server of this protocol, or an executor: a server of tensors alone.
async fn greet(client: &Client) -> Result<()> {
    let info = read!(client, telemetry.get_server_info(GetServerInfoRequest {})).await;
    let found = match info {
        Ok(info) if info.protocol == PROTOCOL => return Ok(()),
        Ok(info) => format!("It speaks {} (version {}).", info.protocol, info.version),
        Err(error) if error.code != PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED => return Err(error),
        Err(_) => match read!(client, tensors.describe_executor(DescribeExecutorRequest {})).await {
            Ok(executor) if executor.protocol == PROTOCOL => return Ok(()),
            Ok(executor) => format!("It speaks {} ({}).", executor.protocol, executor.executor),
            Err(error) if error.code != PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED => return Err(error),
            Err(_) => "It knows neither the service TelemetryService nor TensorsService.".to_string(),
        },
    };
    let code = PgSqlErrorCode::ERRCODE_FDW_UNABLE_TO_ESTABLISH_CONNECTION;
    Err(Error::new(
        code,
        format!("the endpoint is not a compute server that speaks {PROTOCOL}"),
    )
    .detail(found)
    .hint("Check that the server option \"endpoint\" names the gRPC address of a compute server of this extension's version."))
}

/// Connects to the first endpoint that answers. Backends begin at different ones, which spreads them over the replicas.
async fn open_any(options: &ServerOptions, certificate: Option<&ClientCertificate>) -> Result<Channel> {
    let count = options.endpoints.len();
    let first = std::process::id() as usize % count;
    let mut failures = Vec::new();
    for offset in 0..count {
        let address = &options.endpoints[(first + offset) % count];
        let endpoint = endpoint(address, options, certificate)?;
        match tokio::time::timeout(options.connect_timeout, endpoint.connect()).await {
            Ok(Ok(channel)) => return Ok(channel),
            Ok(Err(error)) => failures.push(format!("{address}: {}", describe(&error))),
            Err(_) => failures.push(format!(
                "{address}: no answer within {} ms",
                options.connect_timeout.as_millis()
            )),
        }
    }
    let code = PgSqlErrorCode::ERRCODE_FDW_UNABLE_TO_ESTABLISH_CONNECTION;
    Err(Error::new(code, "cannot connect to the compute server")
        .detail(failures.join("; "))
        .hint("Check that it is running and that the server option \"endpoint\" names its gRPC address."))
}

fn endpoint(address: &str, options: &ServerOptions, certificate: Option<&ClientCertificate>) -> Result<Endpoint> {
    let bad = |error: tonic::transport::Error| {
        let code = PgSqlErrorCode::ERRCODE_FDW_INVALID_OPTION_NAME;
        Error::new(code, format!("cannot use the endpoint {address}")).detail(describe(&error))
    };
    let endpoint = Endpoint::from_shared(address.to_string())
        .map_err(bad)?
        .connect_timeout(options.connect_timeout)
        .tcp_nodelay(true)
        // The default windows of 64 KB would make every chunk of a tensor wait for a round trip.
        .initial_stream_window_size(4 << 20)
        .initial_connection_window_size(16 << 20)
        // A chunk of a tensor in one frame rather than in 64.
        .max_frame_size((1 << 20) + 4096);
    if !address.starts_with("https:") {
        return match certificate {
            None => Ok(endpoint),
            Some(_) => {
                let code = PgSqlErrorCode::ERRCODE_FDW_INVALID_OPTION_NAME;
                let message = format!("the option \"tls_cert\" is of no use with the endpoint {address}");
                Err(Error::new(code, message).hint("Use an endpoint that begins with https://."))
            }
        };
    }
    let file = options.tls_ca.as_deref().unwrap_or(SYSTEM_AUTHORITIES);
    let authorities = std::fs::read(file).map_err(|error| {
        let code = PgSqlErrorCode::ERRCODE_FDW_INVALID_OPTION_NAME;
        Error::new(code, format!("cannot read the certificate authorities in {file}"))
            .detail(error.to_string())
            .hint("Name a PEM file that the database server can read in the server option \"tls_ca\".")
    })?;
    let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(authorities));
    if let Some(domain) = &options.tls_domain {
        tls = tls.domain_name(domain);
    }
    if let Some(files) = certificate {
        let read = |option: &str, file: &str| {
            std::fs::read(file).map_err(|error| {
                let code = PgSqlErrorCode::ERRCODE_FDW_INVALID_OPTION_NAME;
                Error::new(code, format!("cannot read the file of the option \"{option}\"")).detail(error.to_string())
            })
        };
        let identity = (read("tls_cert", &files.certificate)?, read("tls_key", &files.key)?);
        tls = tls.identity(Identity::from_pem(identity.0, identity.1));
    }
    endpoint.tls_config(tls).map_err(bad)
}

fn server_options(server: pg_sys::Oid) -> HashMap<String, String> {
    // SAFETY: raises an error for an unknown server; the struct and its list live in the current memory context.
    unsafe { option_map((*pg_sys::GetForeignServer(server)).options) }
}

/// Options of the user's mapping, else of the one for PUBLIC; empty when there is neither.
fn mapping_options(session: Session) -> HashMap<String, String> {
    // SAFETY: GetUserMapping raises an error where no mapping exists, so existence is asked first.
    unsafe {
        let exists = |user: pg_sys::Oid| {
            let cache = pg_sys::SysCacheIdentifier::USERMAPPINGUSERSERVER as i32;
            let none = pg_sys::Datum::from(0_usize);
            pg_sys::SearchSysCacheExists(cache, user.into(), session.server.into(), none, none)
        };
        if !exists(session.user) && !exists(pg_sys::Oid::INVALID) {
            return HashMap::new();
        }
        option_map((*pg_sys::GetUserMapping(session.user, session.server)).options)
    }
}

/// Names and values of a list of DefElem.
///
/// # Safety
/// `list` is NIL or a list of DefElem.
pub(crate) unsafe fn option_map(list: *mut pg_sys::List) -> HashMap<String, String> {
    // SAFETY: the caller's promise; both strings are NUL-terminated.
    unsafe {
        crate::nodes::items::<pg_sys::DefElem>(list)
            .into_iter()
            .map(|option| {
                let name = CStr::from_ptr((*option).defname).to_string_lossy().into_owned();
                let value = CStr::from_ptr(pg_sys::defGetString(option))
                    .to_string_lossy()
                    .into_owned();
                (name, value)
            })
            .collect()
    }
}
