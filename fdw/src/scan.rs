//! SELECT: which clauses give inputs, the paths that the planner may take, the scan itself, and EXPLAIN.

mod answers;
mod clauses;
mod execute;
mod explain;
mod inputs;
mod join;
mod paths;
mod plan;
mod state;

use pgrx::{AllocatedByRust, pg_sys};
use supabase_wrappers::FdwRoutine;

pub(crate) use join::register as register_joins;

/// Replaces every scan callback.
pub(crate) fn install(routine: &mut FdwRoutine<AllocatedByRust>) {
    routine.GetForeignRelSize = Some(paths::get_foreign_rel_size);
    routine.GetForeignPaths = Some(paths::get_foreign_paths);
    routine.GetForeignPlan = Some(plan::get_foreign_plan);
    routine.BeginForeignScan = Some(execute::begin_foreign_scan);
    routine.IterateForeignScan = Some(execute::iterate_foreign_scan);
    routine.ReScanForeignScan = Some(execute::rescan_foreign_scan);
    routine.EndForeignScan = Some(execute::end_foreign_scan);
    routine.ExplainForeignScan = Some(explain::explain_foreign_scan);
    routine.GetForeignUpperPaths = None;
    routine.GetForeignJoinPaths = None;
    routine.AnalyzeForeignTable = None;
    routine.IsForeignScanParallelSafe = None::<
        unsafe extern "C-unwind" fn(
            *mut pg_sys::PlannerInfo,
            *mut pg_sys::RelOptInfo,
            *mut pg_sys::RangeTblEntry,
        ) -> bool,
    >;
}
