//! INSERT, COPY, UPDATE and DELETE: rows are staged on the server under the transaction.

mod ahead;
mod change;
mod insert;
mod plan;
mod state;

use pgrx::AllocatedByRust;
use supabase_wrappers::FdwRoutine;

/// Replaces every callback that changes rows. TRUNCATE and direct modification have none and are refused by PostgreSQL.
pub(crate) fn install(routine: &mut FdwRoutine<AllocatedByRust>) {
    routine.AddForeignUpdateTargets = Some(plan::add_foreign_update_targets);
    routine.PlanForeignModify = Some(plan::plan_foreign_modify);
    routine.IsForeignRelUpdatable = Some(plan::is_foreign_rel_updatable);
    routine.BeginForeignModify = Some(state::begin_foreign_modify);
    routine.BeginForeignInsert = Some(state::begin_foreign_insert);
    routine.EndForeignModify = Some(state::end_foreign_modify);
    routine.EndForeignInsert = Some(state::end_foreign_modify);
    routine.ExecForeignInsert = Some(insert::exec_foreign_insert);
    routine.ExecForeignBatchInsert = Some(insert::exec_foreign_batch_insert);
    routine.GetForeignModifyBatchSize = Some(insert::get_foreign_modify_batch_size);
    routine.ExecForeignUpdate = Some(change::exec_foreign_update);
    routine.ExecForeignDelete = Some(change::exec_foreign_delete);
    routine.ExecForeignTruncate = None;
    routine.PlanDirectModify = None;
}
