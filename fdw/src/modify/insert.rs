//! INSERT and COPY.
#![allow(unsafe_code)]

use pgrx::prelude::*;

use super::state::Change;
use crate::error::{Error, OrReport, Result};

/// Callback: inserts one row and hands it back as the server has it.
#[pg_guard]
pub(super) unsafe extern "C-unwind" fn exec_foreign_insert(
    _state: *mut pg_sys::EState,
    target: *mut pg_sys::ResultRelInfo,
    slot: *mut pg_sys::TupleTableSlot,
    _plan_slot: *mut pg_sys::TupleTableSlot,
) -> *mut pg_sys::TupleTableSlot {
    // SAFETY: the executor passes the target that `begin` prepared, and a row of its table.
    unsafe { insert(target, &[slot]).or_report() };
    slot
}

/// Callback: inserts several rows in one call.
#[pg_guard]
pub(super) unsafe extern "C-unwind" fn exec_foreign_batch_insert(
    _state: *mut pg_sys::EState,
    target: *mut pg_sys::ResultRelInfo,
    slots: *mut *mut pg_sys::TupleTableSlot,
    _plan_slots: *mut *mut pg_sys::TupleTableSlot,
    count: *mut i32,
) -> *mut *mut pg_sys::TupleTableSlot {
    // SAFETY: as above; `slots` has `count` entries.
    unsafe { insert(target, std::slice::from_raw_parts(slots, *count as usize)).or_report() };
    slots
}

/// Callback: how many rows may travel together. One where somebody looks at each row once it is inserted.
#[pg_guard]
pub(super) unsafe extern "C-unwind" fn get_foreign_modify_batch_size(target: *mut pg_sys::ResultRelInfo) -> i32 {
    // SAFETY: the executor passes a valid target; its state is absent for EXPLAIN.
    unsafe {
        let Some(change) = (*target).ri_FdwState.cast::<Change>().as_ref() else {
            return 1;
        };
        let batched = change.table.relation.writes().batched.min(change.client.batch_size);
        if batched > 1 && !reads_back(target) && !before_row(target) {
            batched
        } else {
            1
        }
    }
}

/// Whether RETURNING, a check or a trigger looks at the rows once they are inserted.
unsafe fn reads_back(target: *mut pg_sys::ResultRelInfo) -> bool {
    // SAFETY: the executor's structure is valid.
    unsafe {
        let triggers = (*target).ri_TrigDesc;
        !(*target).ri_projectReturning.is_null()
            || !(*target).ri_WithCheckOptions.is_null()
            || !triggers.is_null() && ((*triggers).trig_insert_after_row || (*triggers).trig_insert_new_table)
    }
}

unsafe fn before_row(target: *mut pg_sys::ResultRelInfo) -> bool {
    // SAFETY: the executor's structure is valid.
    unsafe { (*target).ri_TrigDesc.as_ref() }.is_some_and(|triggers| triggers.trig_insert_before_row)
}

unsafe fn insert(target: *mut pg_sys::ResultRelInfo, slots: &[*mut pg_sys::TupleTableSlot]) -> Result<()> {
    // SAFETY: `begin` made the state; the slots hold rows of its table.
    unsafe {
        let change = &*(*target).ri_FdwState.cast::<Change>();
        change.forget_rows();
        let rows = slots
            .iter()
            .map(|slot| change.inputs(*slot))
            .collect::<Result<Vec<_>>>()?;
        if change.table.relation.writes().ahead && (*target).ri_TrigDesc.is_null() && !reads_back(target) {
            return change.run_ahead(|writer| change.table.relation.insert(writer, rows));
        }
        let inserted = change.run(|writer| change.table.relation.insert(writer, rows))?;
        if inserted.len() != slots.len() {
            return Err(Error::protocol("row for every inserted row"));
        }
        if reads_back(target) {
            for (slot, row) in slots.iter().zip(&inserted) {
                change.fill(*slot, row)?;
            }
        }
    }
    Ok(())
}
