//! UPDATE and DELETE.
#![allow(unsafe_code)]

use pgrx::prelude::*;

use super::state::Change;
use crate::error::{OrReport, Result};

/// Callback: updates the row that the subplan found.
#[pg_guard]
pub(super) unsafe extern "C-unwind" fn exec_foreign_update(
    _state: *mut pg_sys::EState,
    target: *mut pg_sys::ResultRelInfo,
    slot: *mut pg_sys::TupleTableSlot,
    plan_slot: *mut pg_sys::TupleTableSlot,
) -> *mut pg_sys::TupleTableSlot {
    // SAFETY: the executor passes the target that `begin` prepared, the new row and the subplan's row.
    unsafe {
        let change = &*(*target).ri_FdwState.cast::<Change>();
        let update = || -> Result<()> {
            let identity = change.identity(plan_slot)?;
            let new = change.assignments(slot)?;
            change.run(|writer| change.table.relation.update(writer, identity, new))
        };
        update().or_report();
    }
    slot
}

/// Callback: deletes the row that the subplan found.
#[pg_guard]
pub(super) unsafe extern "C-unwind" fn exec_foreign_delete(
    _state: *mut pg_sys::EState,
    target: *mut pg_sys::ResultRelInfo,
    slot: *mut pg_sys::TupleTableSlot,
    plan_slot: *mut pg_sys::TupleTableSlot,
) -> *mut pg_sys::TupleTableSlot {
    // SAFETY: the executor passes the target that `begin` prepared, a free slot and the subplan's row.
    unsafe {
        let change = &*(*target).ri_FdwState.cast::<Change>();
        change.forget_rows();
        let delete = || -> Result<()> {
            let identity = change.identity(plan_slot)?;
            if change.keep_deleted(&identity) {
                return Ok(());
            }
            change.run(|writer| change.table.relation.delete(writer, identity))
        };
        delete().or_report();
        change.fill_old_row(slot, plan_slot);
    }
    slot
}
