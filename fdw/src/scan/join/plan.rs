//! The plan node: what it shows of the outer plan's rows and of the relation's, the expressions that give inputs, and the
//! conditions that are left.
#![allow(unsafe_code)]

use std::ptr::null_mut;

use pgrx::prelude::*;

use super::execute;
use crate::error::OrReport;
use crate::nodes::{integer_list, integers, items, make_node};
use crate::relation::Role;
use crate::scan::clauses::{Planned, plain_clauses};
use crate::scan::plan::Private;
use crate::table::definition;

/// The name that EXPLAIN shows.
const NAME: &std::ffi::CStr = c"Candle Join";

/// A structure of pointers that never changes.
struct Constant<T>(T);

// SAFETY: nothing writes to it, and the pointers in it are to constants and functions.
unsafe impl<T> Sync for Constant<T> {}

static PATH: Constant<pg_sys::CustomPathMethods> = Constant(pg_sys::CustomPathMethods {
    CustomName: NAME.as_ptr(),
    PlanCustomPath: Some(plan_custom_path),
    ReparameterizeCustomPathByChild: None,
});

static SCAN: Constant<pg_sys::CustomScanMethods> = Constant(pg_sys::CustomScanMethods {
    CustomName: NAME.as_ptr(),
    CreateCustomScanState: Some(execute::create_custom_scan_state),
});

/// Lets PostgreSQL find the node's methods when it copies a plan.
pub(super) fn register() {
    // SAFETY: the methods live for ever.
    unsafe { pg_sys::RegisterCustomScanMethods(&raw const SCAN.0) }
}

pub(super) fn path_methods() -> *const pg_sys::CustomPathMethods {
    &raw const PATH.0
}

/// What the node is to know when it runs, as it travels in the plan.
pub(super) struct JoinPrivate {
    pub(super) scan: Private,
    /// Which of the node's tables, in the order of their indexes, is the relation.
    pub(super) rank: usize,
    /// Columns of the outer plan, which come first.
    pub(super) outer_columns: usize,
    /// Whether outer rows without a match are rows, too.
    pub(super) left: bool,
    /// Whether rows come in the order of the outer plan's, as the plan above relies on it.
    pub(super) ordered: bool,
    /// Attributes of the relation that follow them.
    pub(super) attributes: Vec<i32>,
}

impl JoinPrivate {
    fn store(&self) -> *mut pg_sys::List {
        let [left, ordered] = [self.left, self.ordered].map(i32::from);
        let numbers = [self.rank as i32, self.outer_columns as i32, left, ordered];
        let lists = [
            self.scan.store(),
            integer_list(numbers),
            integer_list(self.attributes.iter().copied()),
        ];
        // SAFETY: appends to NIL or to the list made before.
        lists
            .into_iter()
            .fold(null_mut(), |all, list| unsafe { pg_sys::lappend(all, list.cast()) })
    }

    /// Reads what `store` wrote.
    ///
    /// # Safety
    /// `list` was made by it.
    pub(super) unsafe fn load(list: *mut pg_sys::List) -> Self {
        // SAFETY: the caller's promise.
        unsafe {
            let lists = items::<pg_sys::List>(list);
            let numbers = integers(lists[1]);
            Self {
                scan: Private::load(lists[0]),
                rank: numbers[0] as usize,
                outer_columns: numbers[1] as usize,
                left: numbers[2] != 0,
                ordered: numbers[3] != 0,
                attributes: integers(lists[2]),
            }
        }
    }
}

/// Callback: makes the plan of the chosen path.
#[pg_guard]
unsafe extern "C-unwind" fn plan_custom_path(
    root: *mut pg_sys::PlannerInfo,
    rel: *mut pg_sys::RelOptInfo,
    path: *mut pg_sys::CustomPath,
    targets: *mut pg_sys::List,
    _clauses: *mut pg_sys::List,
    plans: *mut pg_sys::List,
) -> *mut pg_sys::Plan {
    // SAFETY: the planner passes valid structures, and `add_paths` made the path.
    unsafe {
        let private = items::<pg_sys::List>((*path).custom_private);
        let (numbers, restrictions, parameters) = (integers(private[0]), private[1], private[2]);
        let index = numbers[0] as usize;
        let left = numbers[1] == pg_sys::JoinType::JOIN_LEFT as i32;
        let table = (**(*root).simple_rte_array.add(index)).relid;
        let (relation, _) = definition(table).or_report();
        let inner = *(*root).simple_rel_array.add(index);
        let planned = Planned {
            root,
            rel: inner,
            table,
            relation,
        };
        let mut clauses = planned.own_clauses();
        clauses.extend(plain_clauses(parameters));
        let given = planned.choose(&clauses);
        let conditions = Conditions::of(restrictions, &clauses, (*rel).relids, left);
        let gives = |clause: &*mut pg_sys::Node| {
            let found = given.iter().find(|one| one.clause == *clause);
            found.is_some_and(|one| relation.columns()[one.column].role == Role::Input)
        };
        let matching: Vec<_> = conditions.matching.into_iter().filter(|one| !gives(one)).collect();
        let unusable = matching.iter().flat_map(|clause| planned.unusable(*clause));
        let unusable = unusable.filter(|(_, column)| given.iter().all(|one| one.column != *column));

        let outer_targets = (*items::<pg_sys::Plan>(plans)[0]).targetlist;
        let filter = node_list(&conditions.filter);
        let read = [node_list(&matching), filter, targets, (*(*rel).reltarget).exprs];
        let (shown, attributes) = shown_columns(outer_targets, &read, index as i32);
        let values: Vec<_> = given.iter().map(|one| one.value).collect();
        let scan = Private {
            attributes: given.iter().map(|one| i32::from(one.attribute)).collect(),
            any: given.iter().map(|one| one.any).collect(),
            needed: attributes.clone(),
            unusable: unusable.map(|(attribute, _)| attribute).collect(),
            limit: Private::limit(root),
        };
        let private = JoinPrivate {
            scan,
            rank: pg_sys::bms_member_index((*rel).relids, index as i32).unsigned_abs() as usize,
            outer_columns: items::<pg_sys::TargetEntry>(outer_targets).len(),
            left,
            ordered: !(*path).path.pathkeys.is_null(),
            attributes,
        };
        let node = make_node::<pg_sys::CustomScan>(pg_sys::NodeTag::T_CustomScan);
        (*node).scan.plan.targetlist = targets;
        (*node).scan.plan.qual = filter;
        (*node).custom_plans = plans;
        let expressions = pg_sys::lappend(null_mut(), node_list(&values).cast());
        (*node).custom_exprs = pg_sys::lappend(expressions, node_list(&matching).cast());
        (*node).custom_private = private.store();
        (*node).custom_scan_tlist = shown;
        (*node).methods = &raw const SCAN.0;
        node.cast()
    }
}

/// The conditions of the join.
struct Conditions {
    /// Of the pairs of rows that match.
    matching: Vec<*mut pg_sys::Node>,
    /// Of the rows that come out, those included that are there without a match.
    filter: Vec<*mut pg_sys::Node>,
}

impl Conditions {
    /// Sorts the join's `restrictions`; `clauses` are the relation's own and those by which it takes inputs.
    unsafe fn of(
        restrictions: *mut pg_sys::List,
        clauses: &[*mut pg_sys::Node],
        relids: pg_sys::Relids,
        left: bool,
    ) -> Self {
        let (mut matching, mut filter) = (clauses.to_vec(), Vec::new());
        // SAFETY: a list of RestrictInfo.
        for one in unsafe { items::<pg_sys::RestrictInfo>(restrictions) } {
            // SAFETY: the planner's structures are valid.
            let (clause, above) = unsafe {
                let above = (*one).is_pushed_down || !pg_sys::bms_is_subset((*one).required_relids, relids);
                ((*one).clause.cast::<pg_sys::Node>(), above)
            };
            if matching.contains(&clause) {
                continue;
            }
            match left && above {
                true => filter.push(clause),
                false => matching.push(clause),
            }
        }
        Self { matching, filter }
    }
}

/// The columns that the node's expressions speak of: those of the outer plan, then those that are read of the relation,
/// whose attributes are answered, too.
unsafe fn shown_columns(
    outer: *mut pg_sys::List,
    read: &[*mut pg_sys::List],
    index: i32,
) -> (*mut pg_sys::List, Vec<i32>) {
    // SAFETY: lists of expressions of the planner; everything is made in its memory context.
    unsafe {
        let (mut shown, mut number) = (null_mut(), 0);
        let mut show = |expression: *mut pg_sys::Expr| {
            number += 1;
            let copy = pg_sys::copyObjectImpl(expression.cast()).cast();
            shown = pg_sys::lappend(shown, pg_sys::makeTargetEntry(copy, number, null_mut(), false).cast());
        };
        for target in items::<pg_sys::TargetEntry>(outer) {
            show((*target).expr);
        }
        let flags = pg_sys::PVC_RECURSE_AGGREGATES | pg_sys::PVC_RECURSE_WINDOWFUNCS | pg_sys::PVC_RECURSE_PLACEHOLDERS;
        let mut attributes = Vec::new();
        for list in read {
            let variables = pg_sys::pull_var_clause((*list).cast(), flags as i32);
            for variable in items::<pg_sys::Var>(variables) {
                let attribute = i32::from((*variable).varattno);
                if (*variable).varno == index && !attributes.contains(&attribute) {
                    attributes.push(attribute);
                    show(variable.cast());
                }
            }
        }
        (shown, attributes)
    }
}

unsafe fn node_list(nodes: &[*mut pg_sys::Node]) -> *mut pg_sys::List {
    // SAFETY: copies valid expressions and appends to NIL or to the list made before.
    nodes.iter().fold(null_mut(), |list, node| unsafe {
        pg_sys::lappend(list, pg_sys::copyObjectImpl(node.cast()))
    })
}
