//! EXPLAIN: names, never values, and never a call to the server.
#![allow(unsafe_code)]

use std::ffi::CString;

use pgrx::prelude::*;

use super::execute::Scan;
use super::plan::Private;
use super::state::Totals;
use crate::error::OrReport;
use crate::table::{column_of, definition};

/// Callback: shows the relation and the inputs when VERBOSE, and what the calls cost when ANALYZE.
#[pg_guard]
pub(super) unsafe extern "C-unwind" fn explain_foreign_scan(
    node: *mut pg_sys::ForeignScanState,
    output: *mut pg_sys::ExplainState,
) {
    // SAFETY: the executor passes a scan of a plan that get_foreign_plan made, and a valid output.
    unsafe {
        if (*output).verbose {
            let plan = (*node).ss.ps.plan.cast::<pg_sys::ForeignScan>();
            let table = (*(*node).ss.ss_currentRelation).rd_id;
            show_inputs(table, &Private::load((*plan).fdw_private), output);
        }
        let Some(scan) = (*node).fdw_state.cast::<Scan>().as_ref() else {
            return;
        };
        if !(*output).analyze {
            return;
        }
        show_totals(&scan.totals, output);
    }
}

/// Shows the relation and the names of its inputs.
///
/// # Safety
/// `output` is valid.
pub(super) unsafe fn show_inputs(table: pg_sys::Oid, private: &Private, output: *mut pg_sys::ExplainState) {
    let (relation, _) = definition(table).or_report();
    let names: Vec<&str> = private
        .attributes
        .iter()
        .filter_map(|attribute| column_of(relation, table, i16::try_from(*attribute).ok()?))
        .map(|column| relation.columns()[column].name)
        .collect();
    // SAFETY: the caller's promise.
    unsafe {
        text(c"Relation", relation.name(), output);
        if !names.is_empty() {
            text(c"Inputs", &names.join(", "), output);
        }
    }
}

/// Shows what the calls cost. What differs from one run to the next is left out with `TIMING off`.
///
/// # Safety
/// `output` is valid.
pub(super) unsafe fn show_totals(totals: &Totals, output: *mut pg_sys::ExplainState) {
    // SAFETY: the caller's promise; labels and units are constants.
    unsafe {
        pg_sys::ExplainPropertyInteger(c"Calls".as_ptr(), std::ptr::null(), totals.calls as i64, output);
        let usage = totals.usage;
        if usage.generations == 0 {
            return;
        }
        for (label, tokens) in [
            (c"Prompt Tokens", usage.prompt_tokens),
            (c"Cached Tokens", usage.cached_tokens),
            (c"Completion Tokens", usage.completion_tokens),
        ] {
            pg_sys::ExplainPropertyInteger(label.as_ptr(), std::ptr::null(), tokens as i64, output);
        }
        if !(*output).timing {
            return;
        }
        let mean = usage.batch_sizes / usage.generations as f64;
        pg_sys::ExplainPropertyFloat(c"Batch Size".as_ptr(), std::ptr::null(), mean, 1, output);
        let times = [
            (c"Queue Time", usage.queue_ms),
            (c"Prefill Time", usage.prefill_ms),
            (c"Decode Time", usage.decode_ms),
        ];
        for (label, time) in times {
            pg_sys::ExplainPropertyFloat(label.as_ptr(), c"ms".as_ptr(), time, 3, output);
        }
    }
}

/// Shows a text.
///
/// # Safety
/// `output` is valid.
unsafe fn text(label: &std::ffi::CStr, value: &str, output: *mut pg_sys::ExplainState) {
    let Ok(value) = CString::new(value) else { return };
    // SAFETY: both strings are NUL-terminated; the output copies them.
    unsafe { pg_sys::ExplainPropertyText(label.as_ptr(), value.as_ptr(), output) }
}
