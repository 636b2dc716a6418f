//! The paths of such joins.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::ptr::null_mut;

use pgrx::is_a;
use pgrx::prelude::*;

use super::plan;
use crate::error::OrReport;
use crate::nodes::{integer_list, items, make_node};
use crate::relation::Estimate;
use crate::scan::clauses::{Planned, plain_clauses};
use crate::scan::execute::iterate_foreign_scan;
use crate::scan::paths::{ROW_COST, calls};
use crate::table::definition;

/// By what the cost of a call is divided where the server works on many at a time.
const AT_A_TIME: f64 = 64.0;

thread_local! {
    static PREVIOUS: Cell<pg_sys::set_join_pathlist_hook_type> = const { Cell::new(None) };
}

/// Hooks into the planner.
pub(super) fn register() {
    // SAFETY: the library is loaded once in a backend, which has one thread.
    unsafe {
        PREVIOUS.set(pg_sys::set_join_pathlist_hook);
        pg_sys::set_join_pathlist_hook = Some(add_paths);
    }
}

/// Hook: adds a path where the inner relation is one of ours and takes inputs from the outer one.
#[pg_guard]
unsafe extern "C-unwind" fn add_paths(
    root: *mut pg_sys::PlannerInfo,
    join: *mut pg_sys::RelOptInfo,
    outer: *mut pg_sys::RelOptInfo,
    inner: *mut pg_sys::RelOptInfo,
    kind: pg_sys::JoinType::Type,
    extra: *mut pg_sys::JoinPathExtraData,
) {
    // SAFETY: the planner passes valid structures.
    unsafe {
        if let Some(previous) = PREVIOUS.get() {
            previous(root, join, outer, inner, kind, extra);
        }
        let wanted = [
            pg_sys::JoinType::JOIN_INNER,
            pg_sys::JoinType::JOIN_LEFT,
            pg_sys::JoinType::JOIN_UNIQUE_OUTER,
        ];
        if wanted.contains(&kind) && is_ours(inner) && is_plain(root, join, extra) {
            Join {
                root,
                join,
                outer,
                inner,
                kind,
                extra,
            }
            .add();
        }
    }
}

/// Whether a relation is a foreign table of this extension.
unsafe fn is_ours(rel: *mut pg_sys::RelOptInfo) -> bool {
    // SAFETY: the planner's structures are valid.
    unsafe {
        let base = (*rel).reloptkind == pg_sys::RelOptKind::RELOPT_BASEREL;
        let Some(routine) = (*rel).fdwroutine.as_ref().filter(|_| base) else {
            return false;
        };
        let ours: pg_sys::IterateForeignScan_function = Some(iterate_foreign_scan);
        routine.IterateForeignScan.map(|function| function as usize) == ours.map(|function| function as usize)
    }
}

/// Whether no row that is found will be changed or locked, and the join asks for nothing that the node does not know.
unsafe fn is_plain(
    root: *mut pg_sys::PlannerInfo,
    join: *mut pg_sys::RelOptInfo,
    extra: *mut pg_sys::JoinPathExtraData,
) -> bool {
    // SAFETY: the planner's structures are valid.
    unsafe {
        let query = (*root).parse;
        let command = (*query).commandType;
        let reads = matches!(command, pg_sys::CmdType::CMD_SELECT | pg_sys::CmdType::CMD_INSERT);
        let restrictions = items::<pg_sys::RestrictInfo>((*extra).restrictlist);
        reads
            && (*query).rowMarks.is_null()
            && (*join).lateral_relids.is_null()
            && restrictions.iter().all(|one| !(**one).pseudoconstant)
    }
}

struct Join {
    root: *mut pg_sys::PlannerInfo,
    join: *mut pg_sys::RelOptInfo,
    outer: *mut pg_sys::RelOptInfo,
    inner: *mut pg_sys::RelOptInfo,
    kind: pg_sys::JoinType::Type,
    extra: *mut pg_sys::JoinPathExtraData,
}

impl Join {
    /// Adds a path for the scan of the inner relation that takes most from the outer one.
    unsafe fn add(&self) {
        // SAFETY: the planner's structures are valid; paths live in its memory context.
        unsafe {
            let Some(info) = self.parameters() else { return };
            let entry = *(*self.root).simple_rte_array.add((*self.inner).relid as usize);
            let (relation, _) = definition((*entry).relid).or_report();
            let planned = Planned {
                root: self.root,
                rel: self.inner,
                table: (*entry).relid,
                relation,
            };
            let restrictions = pg_sys::list_union_ptr((*self.extra).restrictlist, (*info).ppi_clauses);
            let mut clauses = planned.own_clauses();
            clauses.extend(plain_clauses((*info).ppi_clauses));
            let given = planned.choose(&clauses);
            if relation.required().is_empty() || !planned.complete(&given) || !self.knows_columns(restrictions) {
                return;
            }
            let numbers = integer_list([(*self.inner).relid as i32, self.kind as i32]);
            let private = pg_sys::lappend(null_mut(), numbers.cast());
            let private = pg_sys::lappend(private, restrictions.cast());
            let private = pg_sys::lappend(private, (*info).ppi_clauses.cast());
            for (outer, pathkeys) in self.outer_paths() {
                let path = self.path(outer, relation.estimate(), (*outer).rows * calls(&given));
                (*path).path.pathkeys = pathkeys;
                (*path).custom_private = pg_sys::list_copy(private);
                pg_sys::add_path(self.join, path.cast());
            }
        }
    }

    /// A path that makes so many `calls` for the rows of `outer`.
    unsafe fn path(&self, outer: *mut pg_sys::Path, estimate: Estimate, calls: f64) -> *mut pg_sys::CustomPath {
        // SAFETY: as above.
        unsafe {
            let path = make_node::<pg_sys::CustomPath>(pg_sys::NodeTag::T_CustomPath);
            (*path).path.pathtype = pg_sys::NodeTag::T_CustomScan;
            (*path).path.parent = self.join;
            (*path).path.pathtarget = (*self.join).reltarget;
            (*path).path.rows = (*self.join).rows;
            (*path).path.startup_cost = (*outer).startup_cost + estimate.cost;
            (*path).path.total_cost = (*outer).total_cost
                + estimate.cost
                + estimate.cost * calls / AT_A_TIME
                + estimate.rows * calls * ROW_COST;
            (*path).custom_paths = pg_sys::lappend(null_mut(), outer.cast());
            (*path).methods = plan::path_methods();
            path
        }
    }

    /// Paths of the outer relation that are worth a join, each with the order that rows keep if the query has a use for it:
    /// the cheapest one, those in a useful order, and the cheapest one sorted as the query asks for it, so that rows need not
    /// wait for the last one to be sorted. Without pathkeys rows come as they arrive.
    unsafe fn outer_paths(&self) -> Vec<(*mut pg_sys::Path, *mut pg_sys::List)> {
        // SAFETY: as above.
        unsafe {
            let cheapest = (*self.outer).cheapest_total_path;
            if cheapest.is_null() || !(*cheapest).param_info.is_null() {
                return Vec::new();
            }
            if self.kind == pg_sys::JoinType::JOIN_UNIQUE_OUTER {
                let unique = pg_sys::create_unique_path(self.root, self.outer, cheapest, (*self.extra).sjinfo);
                return match unique.is_null() {
                    true => Vec::new(),
                    false => vec![(unique.cast(), null_mut())],
                };
            }
            let mut paths = items::<pg_sys::Path>((*self.outer).pathlist);
            paths.retain(|path| *path != cheapest && (**path).param_info.is_null());
            paths.extend(self.sorted(cheapest));
            let keep = |path: *mut pg_sys::Path| {
                pg_sys::build_join_pathkeys(self.root, self.join, self.kind, (*path).pathkeys)
            };
            let mut kept: Vec<_> = paths.into_iter().map(|path| (path, keep(path))).collect();
            kept.retain(|(_, pathkeys)| !pathkeys.is_null());
            kept.insert(0, (cheapest, keep(cheapest)));
            kept
        }
    }

    /// A path sorted as the query asks for it, if that is by columns of the outer relation.
    unsafe fn sorted(&self, path: *mut pg_sys::Path) -> Option<*mut pg_sys::Path> {
        // SAFETY: as above.
        unsafe {
            let wanted = (*self.root).query_pathkeys;
            let is_own = |key: &*mut pg_sys::PathKey| {
                let members = items::<pg_sys::EquivalenceMember>((*(**key).pk_eclass).ec_members);
                members.into_iter().any(|member| {
                    is_a((*member).em_expr.cast(), pg_sys::NodeTag::T_Var)
                        && pg_sys::bms_is_subset((*member).em_relids, (*self.outer).relids)
                })
            };
            let keys = items::<pg_sys::PathKey>(wanted);
            if keys.is_empty() || !keys.iter().all(is_own) || pg_sys::pathkeys_contained_in(wanted, (*path).pathkeys) {
                return None;
            }
            Some(pg_sys::create_sort_path(self.root, self.outer, path, wanted, -1.0).cast())
        }
    }

    /// What the inner relation can take from the outer one: of its parameterised paths the one with most conditions.
    unsafe fn parameters(&self) -> Option<*mut pg_sys::ParamPathInfo> {
        // SAFETY: the planner's structures are valid.
        unsafe {
            let paths = items::<pg_sys::Path>((*self.inner).pathlist).into_iter();
            let usable = paths
                .map(|path| (*path).param_info)
                .filter(|info| !info.is_null() && pg_sys::bms_is_subset((**info).ppi_req_outer, (*self.outer).relids));
            usable.max_by_key(|info| items::<pg_sys::RestrictInfo>((**info).ppi_clauses).len())
        }
    }

    /// Whether everything that is read of the inner relation is a column by itself.
    unsafe fn knows_columns(&self, restrictions: *mut pg_sys::List) -> bool {
        // SAFETY: the planner's structures are valid; sets live in its memory context.
        unsafe {
            let relid = (*self.inner).relid;
            let plain = |node: &*mut pg_sys::Node| {
                is_a(*node, pg_sys::NodeTag::T_Var) && (*(*node).cast::<pg_sys::Var>()).varattno > 0
            };
            let mut read: *mut pg_sys::Bitmapset = null_mut();
            let own = items::<pg_sys::RestrictInfo>((*self.inner).baserestrictinfo);
            for one in items::<pg_sys::RestrictInfo>(restrictions).into_iter().chain(own) {
                pg_sys::pull_varattnos((*one).clause.cast(), relid, &mut read);
            }
            // System columns and whole rows come first.
            let first = pg_sys::bms_next_member(read, -1);
            let system = first >= 0 && first + pg_sys::FirstLowInvalidHeapAttributeNumber <= 0;
            !system
                && items::<pg_sys::Node>((*(*self.inner).reltarget).exprs)
                    .iter()
                    .all(plain)
        }
    }
}
