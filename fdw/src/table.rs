//! A foreign table as its definition has it: which attribute shows which column of which relation, and whose it is.
#![allow(unsafe_code)]

use std::ffi::CStr;

use pgrx::{PgSqlErrorCode, pg_sys};

use crate::client::{Session, option_map};
use crate::error::{Error, Result};
use crate::options;
use crate::relation::Relation;
use crate::values::SqlType;

/// An attribute of the table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Attribute {
    /// Its position in the relation's columns.
    pub(crate) column: usize,
    pub(crate) sql_type: SqlType,
}

/// A foreign table.
pub(crate) struct Table {
    pub(crate) relation: &'static dyn Relation,
    pub(crate) server: pg_sys::Oid,
    /// By attribute number less one; None for dropped attributes.
    pub(crate) attributes: Vec<Option<Attribute>>,
}

impl Table {
    /// Reads the definition. Errors: a column that the relation does not have, or of a type that cannot hold it.
    pub(crate) fn open(relation: pg_sys::Relation) -> Result<Self> {
        // SAFETY: the relation is open, so its descriptor holds `natts` attributes.
        let (table, attributes) = unsafe {
            let descriptor = (*relation).rd_att;
            (
                (*relation).rd_id,
                (*descriptor).attrs.as_slice((*descriptor).natts as usize),
            )
        };
        let (shown, server) = definition(table)?;
        let attributes = attributes.iter().map(|attribute| {
            if attribute.attisdropped {
                return Ok(None);
            }
            let name = pgrx::name_data_to_str(&attribute.attname);
            let column = shown
                .columns()
                .iter()
                .position(|column| column.name == name)
                .ok_or_else(|| {
                    let names: Vec<&str> = shown.columns().iter().map(|column| column.name).collect();
                    let code = PgSqlErrorCode::ERRCODE_FDW_COLUMN_NAME_NOT_FOUND;
                    Error::new(code, format!("relation \"{}\" has no column \"{name}\"", shown.name()))
                        .hint(format!("Its columns are {}.", names.join(", ")))
                })?;
            let sql_type = SqlType::new(attribute.atttypid, attribute.atttypmod);
            sql_type.check(name, shown.columns()[column].kind)?;
            Ok(Some(Attribute { column, sql_type }))
        });
        Ok(Self {
            relation: shown,
            server,
            attributes: attributes.collect::<Result<_>>()?,
        })
    }

    /// The session of the user with whose rights the statement reads or writes this table.
    pub(crate) fn session(&self, user: pg_sys::Oid) -> Session {
        Session {
            server: self.server,
            user,
        }
    }
}

/// The relation that a foreign table shows, and its server.
pub(crate) fn definition(table: pg_sys::Oid) -> Result<(&'static dyn Relation, pg_sys::Oid)> {
    // SAFETY: raises an error for what is no foreign table; the struct lives in the current memory context.
    let (options, server) = unsafe {
        let foreign = pg_sys::GetForeignTable(table);
        (option_map((*foreign).options), (*foreign).serverid)
    };
    Ok((options::table_relation(&options)?, server))
}

/// Position in the relation's columns of a table's attribute, by its name; None where there is none.
pub(crate) fn column_of(relation: &dyn Relation, table: pg_sys::Oid, attribute: i16) -> Option<usize> {
    // SAFETY: answers NULL for an attribute that is missing or dropped.
    let name = unsafe { pg_sys::get_attname(table, attribute, true) };
    if name.is_null() {
        return None;
    }
    // SAFETY: a name is NUL-terminated.
    let name = unsafe { CStr::from_ptr(name) }.to_str().ok()?;
    relation.columns().iter().position(|column| column.name == name)
}

/// The user whose rights count for an entry of the range table: a view's owner, else the current user.
///
/// # Safety
/// `estate` is valid and `index` is 0 or an index of its range table.
pub(crate) unsafe fn effective_user(estate: *mut pg_sys::EState, index: pg_sys::Index) -> pg_sys::Oid {
    // SAFETY: the caller's promise.
    unsafe {
        if index > 0 {
            let entry = pg_sys::exec_rt_fetch(index, estate);
            if (*entry).checkAsUser != pg_sys::Oid::INVALID {
                return (*entry).checkAsUser;
            }
        }
        pg_sys::GetUserId()
    }
}
