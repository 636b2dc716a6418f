//! Planning of changes: which rows can be named, and what is refused before anything runs.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::ptr::null_mut;

use pgrx::prelude::*;

use crate::error::{Error, OrReport, Result};
use crate::relation::Relation;
use crate::table::{column_of, definition};

/// Name of the junk column that carries a column of the row's identity.
pub(super) fn junk_name(column: &str) -> CString {
    CString::new(format!("candle_fdw.{column}")).unwrap_or_default()
}

/// Name of the junk column that carries the whole old row; PostgreSQL's own.
pub(super) const WHOLE_ROW: &std::ffi::CStr = c"wholerow";

/// Callback: has UPDATE and DELETE fetch the columns that identify a row.
#[pg_guard]
pub(super) unsafe extern "C-unwind" fn add_foreign_update_targets(
    root: *mut pg_sys::PlannerInfo,
    index: pg_sys::Index,
    _entry: *mut pg_sys::RangeTblEntry,
    target: pg_sys::Relation,
) {
    // SAFETY: the planner passes an open relation; its descriptor has `natts` attributes.
    unsafe {
        let (relation, _) = definition((*target).rd_id).or_report();
        let descriptor = (*target).rd_att;
        let attributes = (*descriptor).attrs.as_slice((*descriptor).natts as usize);
        for name in relation.identity() {
            let attribute = attributes
                .iter()
                .find(|attribute| !attribute.attisdropped && pgrx::name_data_to_str(&attribute.attname) == *name);
            let Some(attribute) = attribute else {
                let code = PgSqlErrorCode::ERRCODE_FDW_COLUMN_NAME_NOT_FOUND;
                Error::new(
                    code,
                    format!(
                        "rows of \"{}\" cannot be named without the column \"{name}\"",
                        relation.name()
                    ),
                )
                .report()
            };
            let var = pg_sys::makeVar(
                index as _,
                attribute.attnum,
                attribute.atttypid,
                attribute.atttypmod,
                attribute.attcollation,
                0,
            );
            let name = pg_sys::pstrdup(junk_name(name).as_ptr());
            pg_sys::add_row_identity_var(root, var, index, name);
        }
        if !(*(*root).parse).returningList.is_null() {
            let var = pg_sys::makeVar(index as _, 0, pg_sys::RECORDOID, -1, pg_sys::Oid::INVALID, 0);
            pg_sys::add_row_identity_var(root, var, index, WHOLE_ROW.as_ptr());
        }
    }
}

/// Callback: refuses what the relation does not take.
#[pg_guard]
pub(super) unsafe extern "C-unwind" fn plan_foreign_modify(
    root: *mut pg_sys::PlannerInfo,
    plan: *mut pg_sys::ModifyTable,
    index: pg_sys::Index,
    _subplan: i32,
) -> *mut pg_sys::List {
    // SAFETY: the planner passes valid structures, and `index` is in its range table.
    unsafe {
        refuse_on_conflict(plan).or_report();
        let entry = *(*root).simple_rte_array.add(index as usize);
        if (*plan).operation == pg_sys::CmdType::CMD_UPDATE {
            let (relation, _) = definition((*entry).relid).or_report();
            check_updated(relation, entry).or_report();
        }
    }
    null_mut()
}

/// Refuses `ON CONFLICT`: the server alone knows what conflicts, and answers with an error.
///
/// # Safety
/// `plan` is valid.
pub(super) unsafe fn refuse_on_conflict(plan: *mut pg_sys::ModifyTable) -> Result<()> {
    // SAFETY: the caller's promise.
    if unsafe { (*plan).onConflictAction } == pg_sys::OnConflictAction::ONCONFLICT_NONE {
        return Ok(());
    }
    let code = PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED;
    Err(
        Error::new(code, "ON CONFLICT is not supported for tables of a compute server")
            .hint("Ask whether the row exists first, or catch the error: SQLSTATE 42710 says that the name is taken."),
    )
}

unsafe fn check_updated(relation: &dyn Relation, entry: *mut pg_sys::RangeTblEntry) -> Result<()> {
    if relation.writes().update.is_empty() {
        // PostgreSQL refuses the statement when it begins.
        return Ok(());
    }
    let mut member = -1;
    loop {
        // SAFETY: a set of the range table entry.
        member = unsafe { pg_sys::bms_next_member((*entry).updatedCols, member) };
        if member < 0 {
            return Ok(());
        }
        let attribute = (member + pg_sys::FirstLowInvalidHeapAttributeNumber) as i16;
        // SAFETY: reads the oid of the entry's table.
        let column = column_of(relation, unsafe { (*entry).relid }, attribute);
        let name = column.map_or("?", |column| relation.columns()[column].name);
        if !relation.writes().update.contains(&name) {
            let code = PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED;
            let error = Error::new(
                code,
                format!("column \"{name}\" of \"{}\" cannot be updated", relation.name()),
            );
            return Err(error.hint(format!("UPDATE may change: {}.", relation.writes().update.join(", "))));
        }
    }
}

/// Callback: the changes that the relation takes, as bits.
#[pg_guard]
pub(super) unsafe extern "C-unwind" fn is_foreign_rel_updatable(target: pg_sys::Relation) -> i32 {
    // SAFETY: PostgreSQL passes an open relation.
    let (relation, _) = definition(unsafe { (*target).rd_id }).or_report();
    let writes = relation.writes();
    let bit = |command: pg_sys::CmdType::Type, takes: bool| if takes { 1_i32 << command } else { 0 };
    bit(pg_sys::CmdType::CMD_INSERT, writes.insert)
        | bit(pg_sys::CmdType::CMD_UPDATE, !writes.update.is_empty())
        | bit(pg_sys::CmdType::CMD_DELETE, writes.delete)
}
