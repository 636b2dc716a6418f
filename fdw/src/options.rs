//! Options of servers, user mappings and tables: refused when unknown or malformed, read as validated types.

use std::collections::HashMap;
use std::time::Duration;

use pgrx::{PgSqlErrorCode, pg_sys};
use supabase_wrappers::prelude::{FOREIGN_SERVER_RELATION_ID, FOREIGN_TABLE_RELATION_ID};
use tonic::transport::Uri;

use crate::error::{Error, Result};
use crate::relation;

const SERVER_OPTIONS: &[&str] = &[
    "endpoint",
    "tls_ca",
    "tls_domain",
    "connect_timeout_ms",
    "request_timeout_ms",
    "fetch_size",
    "batch_size",
];
const USER_MAPPING_OPTIONS: &[&str] = &["token", "tls_cert", "tls_key"];
const TABLE_OPTIONS: &[&str] = &["relation"];

/// Catalog of user mappings, pg_user_mapping.
const USER_MAPPING_RELATION_ID: u32 = 1418;

/// The validated options of a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ServerOptions {
    /// Addresses of the server and its replicas; at least one.
    pub(crate) endpoints: Vec<String>,
    /// PEM file with the authorities that may have signed the server's certificate.
    pub(crate) tls_ca: Option<String>,
    /// Name that the certificate must carry. Default: the endpoint's host.
    pub(crate) tls_domain: Option<String>,
    pub(crate) connect_timeout: Duration,
    /// Longest wait for an answer, and between the messages of a stream. None: without end.
    pub(crate) request_timeout: Option<Duration>,
    /// Sets of inputs of one scan that the server works on at a time.
    pub(crate) fetch_size: usize,
    /// Rows of one INSERT that travel together.
    pub(crate) batch_size: i32,
}

impl ServerOptions {
    /// Parses a server's options. Errors: HV00J for a missing, HV00D for an unknown or malformed one.
    pub(crate) fn parse(options: &HashMap<String, String>) -> Result<Self> {
        refuse_unknown(options, SERVER_OPTIONS, "server")?;
        let endpoint = options.get("endpoint").ok_or_else(|| {
            missing("endpoint")
                .hint("Give the compute server's gRPC address: OPTIONS (endpoint 'http://127.0.0.1:50051').")
        })?;
        let endpoints = endpoint
            .split(',')
            .map(|one| parse_endpoint(one.trim()))
            .collect::<Result<Vec<_>>>()?;
        let tls = endpoints.iter().any(|endpoint| endpoint.starts_with("https:"));
        for name in ["tls_ca", "tls_domain"] {
            if options.contains_key(name) && !tls {
                return Err(malformed(name, "is only for an endpoint that begins with https://"));
            }
        }
        let timeout = integer(options, "request_timeout_ms", 0, 0, i32::MAX)?;
        Ok(Self {
            endpoints,
            tls_ca: options.get("tls_ca").cloned(),
            tls_domain: options.get("tls_domain").cloned(),
            connect_timeout: Duration::from_millis(integer(options, "connect_timeout_ms", 5000, 1, 600_000)? as u64),
            request_timeout: (timeout > 0).then(|| Duration::from_millis(timeout as u64)),
            fetch_size: integer(options, "fetch_size", 16, 1, 1024)? as usize,
            batch_size: integer(options, "batch_size", 128, 1, 10_000)?,
        })
    }
}

/// Files of the certificate that a user mapping shows to the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ClientCertificate {
    /// Certificate chain in PEM.
    pub(crate) certificate: String,
    /// Its private key in PEM.
    pub(crate) key: String,
}

impl ClientCertificate {
    /// Parses a user mapping's options. Errors: HV00J when one of the two is missing.
    pub(crate) fn parse(options: &HashMap<String, String>) -> Result<Option<Self>> {
        match (options.get("tls_cert"), options.get("tls_key")) {
            (Some(certificate), Some(key)) => Ok(Some(Self {
                certificate: certificate.clone(),
                key: key.clone(),
            })),
            (None, None) => Ok(None),
            (Some(_), None) => Err(missing("tls_key").hint("It belongs to the option \"tls_cert\".")),
            (None, Some(_)) => Err(missing("tls_cert").hint("It belongs to the option \"tls_key\".")),
        }
    }
}

#[allow(unsafe_code)]
fn is_superuser() -> bool {
    // SAFETY: looks the present user up in the catalogs.
    unsafe { pg_sys::superuser() }
}

/// The validator of CREATE and ALTER: `options` as `name=value`, `catalog` what they belong to.
pub(crate) fn validate(options: Vec<Option<String>>, catalog: Option<pg_sys::Oid>) -> Result<()> {
    let options: HashMap<String, String> = options
        .into_iter()
        .flatten()
        .filter_map(|option| {
            option
                .split_once('=')
                .map(|(name, value)| (name.to_string(), value.to_string()))
        })
        .collect();
    let catalog = catalog.unwrap_or(pg_sys::Oid::INVALID);
    if catalog == FOREIGN_SERVER_RELATION_ID {
        ServerOptions::parse(&options).map(|_| ())
    } else if catalog.to_u32() == USER_MAPPING_RELATION_ID {
        refuse_unknown(&options, USER_MAPPING_OPTIONS, "user mapping")?;
        // The backend reads the files with the rights of the database server, whoever asks.
        if ClientCertificate::parse(&options)?.is_some() && !is_superuser() {
            let code = PgSqlErrorCode::ERRCODE_INSUFFICIENT_PRIVILEGE;
            return Err(Error::new(
                code,
                "only superusers may set the options \"tls_cert\" and \"tls_key\"",
            ));
        }
        token(&options).map(|_| ())
    } else if catalog == FOREIGN_TABLE_RELATION_ID {
        table_relation(&options).map(|_| ())
    } else {
        refuse_unknown(&options, &[], "foreign data wrapper or column")
    }
}

/// The token of a user mapping, ready to be sent.
pub(crate) fn token(options: &HashMap<String, String>) -> Result<Option<tonic::metadata::AsciiMetadataValue>> {
    let Some(token) = options.get("token") else {
        return Ok(None);
    };
    let value = format!("Bearer {token}")
        .parse::<tonic::metadata::AsciiMetadataValue>()
        .ok();
    let mut value = value.filter(|_| !token.is_empty()).ok_or_else(|| {
        // The value is a secret and not shown.
        malformed("token", "must be one or more visible ASCII characters")
    })?;
    value.set_sensitive(true);
    Ok(Some(value))
}

/// The relation that a foreign table shows.
pub(crate) fn table_relation(options: &HashMap<String, String>) -> Result<&'static dyn relation::Relation> {
    refuse_unknown(options, TABLE_OPTIONS, "foreign table")?;
    let name = options.get("relation").ok_or_else(|| {
        missing("relation")
            .hint("Name what the table shows, as OPTIONS (relation 'generations'), or use IMPORT FOREIGN SCHEMA.")
    })?;
    relation::find(name).ok_or_else(|| {
        let names: Vec<&str> = relation::RELATIONS.iter().map(|relation| relation.name()).collect();
        malformed("relation", &format!("names no relation: {name}"))
            .hint(format!("Relations are {}.", names.join(", ")))
    })
}

fn refuse_unknown(options: &HashMap<String, String>, valid: &[&str], of: &str) -> Result<()> {
    let mut unknown: Vec<&String> = options.keys().filter(|name| !valid.contains(&name.as_str())).collect();
    unknown.sort();
    let Some(name) = unknown.first() else { return Ok(()) };
    let code = PgSqlErrorCode::ERRCODE_FDW_INVALID_OPTION_NAME;
    let hint = match valid {
        [] => "There are no valid options here.".to_string(),
        valid => format!("Valid options here are: {}.", valid.join(", ")),
    };
    Err(Error::new(code, format!("invalid option \"{name}\" of a {of}")).hint(hint))
}

fn parse_endpoint(endpoint: &str) -> Result<String> {
    let wrong = || {
        // What stands before an @ may be a secret.
        let given = if endpoint.contains('@') { "…" } else { endpoint };
        malformed(
            "endpoint",
            &format!("holds \"{given}\", which is no address of a server"),
        )
        .hint("Give a list of addresses such as http://127.0.0.1:50051 or https://host:443, separated by commas.")
    };
    let uri: Uri = endpoint.parse().map_err(|_| wrong())?;
    let authority = uri.authority().ok_or_else(wrong)?;
    if authority.as_str().contains('@') {
        return Err(malformed("endpoint", "must not hold a user or a password")
            .hint("Give the token in a user mapping: CREATE USER MAPPING … OPTIONS (token '…')."));
    }
    let plain = matches!(uri.path(), "" | "/") && uri.query().is_none();
    let scheme = matches!(uri.scheme_str(), Some("http" | "https"));
    // Uri takes any digits for a port, and reports none where they are too many.
    let port = match authority.as_str().strip_prefix(authority.host()) {
        Some("") => true,
        rest => rest
            .and_then(|rest| rest.strip_prefix(':')?.parse::<u16>().ok())
            .is_some_and(|port| port > 0),
    };
    if plain && scheme && port && !authority.host().is_empty() {
        Ok(endpoint.to_string())
    } else {
        Err(wrong())
    }
}

fn integer(options: &HashMap<String, String>, name: &str, default: i32, least: i32, most: i32) -> Result<i32> {
    let Some(text) = options.get(name) else {
        return Ok(default);
    };
    match text.trim().parse::<i32>() {
        Ok(value) if (least..=most).contains(&value) => Ok(value),
        _ => Err(malformed(
            name,
            &format!("must be a whole number from {least} to {most}, not \"{text}\""),
        )),
    }
}

fn missing(name: &str) -> Error {
    Error::new(
        PgSqlErrorCode::ERRCODE_FDW_OPTION_NAME_NOT_FOUND,
        format!("required option \"{name}\" is missing"),
    )
}

fn malformed(name: &str, why: &str) -> Error {
    Error::new(
        PgSqlErrorCode::ERRCODE_FDW_INVALID_OPTION_NAME,
        format!("option \"{name}\" {why}"),
    )
}
