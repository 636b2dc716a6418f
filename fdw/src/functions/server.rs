//! The server that functions use: the one that `candle_fdw.server` names, or the only one there is.
#![allow(unsafe_code)]

use std::ffi::CString;

use pgrx::prelude::*;
use pgrx::{GucContext, GucFlags, GucRegistry, GucSetting};

use crate::client::{Client, Session, connect};
use crate::error::{Error, Result};

static SERVER: GucSetting<Option<CString>> = GucSetting::<Option<CString>>::new(None);

/// Defines `candle_fdw.server`.
pub(crate) fn register_settings() {
    GucRegistry::define_string_guc(
        c"candle_fdw.server",
        c"Foreign server that the functions of the schema candle use.",
        c"Needed only where there is more than one server of the wrapper candle_fdw.",
        &SERVER,
        GucContext::Userset,
        GucFlags::default(),
    );
}

/// The connection that functions of the current user use.
pub(super) fn client() -> Result<Client> {
    Ok(default_client()?.0)
}

/// As [`client`], with the name of the server.
pub(crate) fn default_client() -> Result<(Client, String)> {
    // SAFETY: reads a variable of the backend.
    if unsafe { pg_sys::GetDatabaseEncoding() } != pg_sys::pg_enc::PG_UTF8 as i32 {
        let code = PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED;
        return Err(Error::new(code, "candle's functions need a database in UTF8")
            .hint("The foreign tables convert from and to every encoding."));
    }
    let (server, name) = find()?;
    // SAFETY: reads a variable of the backend, and looks into the catalogs.
    let (user, allowed) = unsafe {
        let user = pg_sys::GetUserId();
        (
            user,
            pg_sys::pg_foreign_server_aclcheck(server, user, pg_sys::ACL_USAGE) == pg_sys::AclResult::ACLCHECK_OK,
        )
    };
    if !allowed {
        let code = PgSqlErrorCode::ERRCODE_INSUFFICIENT_PRIVILEGE;
        return Err(Error::new(
            code,
            "permission denied for the foreign server that candle's functions use",
        )
        .hint("GRANT USAGE ON FOREIGN SERVER … TO …"));
    }
    Ok((connect(Session { server, user })?, name))
}

fn find() -> Result<(pg_sys::Oid, String)> {
    let servers = servers()?;
    let names = || {
        servers
            .iter()
            .map(|(_, name)| name.as_str())
            .collect::<Vec<_>>()
            .join(", ")
    };
    let code = PgSqlErrorCode::ERRCODE_FDW_UNABLE_TO_CREATE_EXECUTION;
    let wanted = SERVER
        .get()
        .map(|name| name.to_string_lossy().into_owned())
        .filter(|name| !name.is_empty());
    match (wanted, &servers[..]) {
        (_, []) => Err(
            Error::new(code, "there is no foreign server of the wrapper candle_fdw").hint(
                "CREATE SERVER compute FOREIGN DATA WRAPPER candle_fdw OPTIONS (endpoint 'http://127.0.0.1:50051');",
            ),
        ),
        (Some(wanted), _) => servers
            .iter()
            .find(|(_, name)| *name == wanted)
            .cloned()
            .ok_or_else(|| {
                let code = PgSqlErrorCode::ERRCODE_UNDEFINED_OBJECT;
                Error::new(
                    code,
                    format!("candle_fdw.server names no server of the wrapper candle_fdw: \"{wanted}\""),
                )
                .hint(format!("Servers are: {}.", names()))
            }),
        (None, [only]) => Ok(only.clone()),
        (None, _) => Err(
            Error::new(code, "there are several servers of the wrapper candle_fdw").hint(format!(
                "Choose one: SET candle_fdw.server = '…'. Servers are: {}.",
                names()
            )),
        ),
    }
}

/// Servers of the wrapper, by name.
fn servers() -> Result<Vec<(pg_sys::Oid, String)>> {
    let query = "SELECT s.oid, s.srvname::text FROM pg_catalog.pg_foreign_server s \
                 JOIN pg_catalog.pg_foreign_data_wrapper w ON w.oid OPERATOR(pg_catalog.=) s.srvfdw \
                 WHERE w.fdwname OPERATOR(pg_catalog.=) 'candle_fdw' ORDER BY 2";
    let failed = |error: pgrx::spi::Error| {
        Error::new(
            PgSqlErrorCode::ERRCODE_INTERNAL_ERROR,
            "cannot list the foreign servers",
        )
        .detail(error.to_string())
    };
    Spi::connect(|client| {
        let rows = client.select(query, None, &[]).map_err(failed)?;
        rows.map(|row| {
            let oid = row.get::<pg_sys::Oid>(1).map_err(failed)?;
            let name = row.get::<String>(2).map_err(failed)?;
            Ok((oid.unwrap_or(pg_sys::Oid::INVALID), name.unwrap_or_default()))
        })
        .collect()
    })
}
