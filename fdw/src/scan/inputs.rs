//! The inputs of a scan: evaluated when the first row is asked for, kept for as long as the scan runs, combined where
//! there are alternatives.
#![allow(unsafe_code)]

use std::sync::Arc;

use pgrx::{PgSqlErrorCode, pg_sys};

use super::plan::Private;
use super::state::{Begin, Source};
use crate::error::{Error, Result};
use crate::relation::{Inputs, Role, Row};
use crate::table::Table;
use crate::values::{SqlType, Value, read, read_elements, write};

/// An expression that gives an input.
pub(super) struct Binding {
    /// Index of the attribute that echoes it.
    pub(super) attribute: usize,
    /// Position in the relation's columns.
    pub(super) column: usize,
    any: bool,
    sql_type: SqlType,
    expression: *mut pg_sys::ExprState,
}

/// A value of an input: as the server gets it, and as rows echo it.
#[derive(Clone)]
pub(super) struct Alternative {
    value: Value,
    pub(super) datum: pg_sys::Datum,
}

/// All combinations of the alternatives, the last input varying fastest.
pub(super) struct Combinations {
    alternatives: Vec<Vec<Alternative>>,
    next: Vec<usize>,
    done: bool,
}

impl Binding {
    /// Prepares the plan's expressions.
    ///
    /// # Safety
    /// `node` is a scan whose plan has these expressions, in the order of the inputs of `private`.
    pub(super) unsafe fn prepare(
        node: *mut pg_sys::PlanState,
        expressions: *mut pg_sys::List,
        table: &Table,
        private: &Private,
    ) -> Vec<Self> {
        // SAFETY: the caller's promise; expression states live as long as the scan.
        unsafe {
            let states = pg_sys::ExecInitExprList(expressions, node);
            let expressions = crate::nodes::items::<pg_sys::Node>(expressions);
            let states = crate::nodes::items::<pg_sys::ExprState>(states);
            let inputs = private.attributes.iter().zip(&private.any);
            let prepared = inputs.zip(expressions.into_iter().zip(states));
            prepared
                .filter_map(|((attribute, any), (expression, state))| {
                    let attribute = usize::try_from(*attribute - 1).ok()?;
                    let column = table.attributes.get(attribute).copied().flatten()?.column;
                    let sql_type = SqlType::new(pg_sys::exprType(expression), -1);
                    Some(Self {
                        attribute,
                        column,
                        any: *any,
                        sql_type,
                        expression: state,
                    })
                })
                .collect()
        }
    }

    /// Evaluates the expression. Without an alternative there are no rows: NULL equals nothing.
    ///
    /// # Safety
    /// `context` is the scan's, and the current memory context lives as long as the inputs are used.
    unsafe fn evaluate(&self, context: *mut pg_sys::ExprContext, table: &Table) -> Result<Vec<Alternative>> {
        let Some(attribute) = table.attributes.get(self.attribute).copied().flatten() else {
            return Ok(Vec::new());
        };
        let column = &table.relation.columns()[self.column];
        let mut null = false;
        // SAFETY: the caller's promise.
        let datum = unsafe { pg_sys::ExecEvalExpr(self.expression, context, &mut null) };
        if null {
            return Ok(Vec::new());
        }
        let given = if self.any {
            read_elements(column.name, datum, self.sql_type)?
        } else {
            vec![(datum, self.sql_type)]
        };
        let mut alternatives: Vec<Alternative> = Vec::with_capacity(given.len());
        let mut seen = std::collections::HashSet::new();
        for (datum, sql_type) in given {
            let value = read(column.name, column.kind, datum, sql_type)?;
            if self.any && !seen.insert(format!("{value:?}")) {
                continue;
            }
            let datum = if sql_type.oid == attribute.sql_type.oid {
                copy(datum, sql_type)
            } else {
                write(column.name, &value, attribute.sql_type)?.unwrap_or(pg_sys::Datum::null())
            };
            alternatives.push(Alternative { value, datum });
        }
        Ok(alternatives)
    }
}

/// A copy of a datum in the current memory context.
fn copy(datum: pg_sys::Datum, sql_type: SqlType) -> pg_sys::Datum {
    let (mut length, mut by_value, mut align) = (0_i16, false, 0 as std::ffi::c_char);
    // SAFETY: the datum is not NULL and of this type. Toasted values are expanded first, as the copy may outlive them.
    unsafe {
        pg_sys::get_typlenbyvalalign(sql_type.oid, &mut length, &mut by_value, &mut align);
        let plain = if length == -1 {
            pg_sys::Datum::from(pg_sys::pg_detoast_datum(datum.cast_mut_ptr()))
        } else {
            datum
        };
        pg_sys::datumCopy(plain, by_value, i32::from(length))
    }
}

impl Combinations {
    /// Evaluates the inputs.
    ///
    /// # Safety
    /// `context` is the scan's, and `memory` lives as long as the combinations.
    pub(super) unsafe fn evaluate(
        bindings: &[Binding],
        context: *mut pg_sys::ExprContext,
        memory: pg_sys::MemoryContext,
        table: &Table,
    ) -> Result<Self> {
        // SAFETY: the caller's promise. An error that unwinds from here ends the transaction, which resets the current
        // memory context.
        let alternatives: Result<Vec<Vec<Alternative>>> = unsafe {
            let before = pg_sys::MemoryContextSwitchTo(memory);
            let alternatives = bindings
                .iter()
                .map(|binding| binding.evaluate(context, table))
                .collect();
            pg_sys::MemoryContextSwitchTo(before);
            alternatives
        };
        let alternatives = alternatives?;
        let done = alternatives.iter().any(Vec::is_empty);
        Ok(Self {
            next: vec![0; alternatives.len()],
            alternatives,
            done,
        })
    }

    /// The next combination: the inputs, and for each binding the datum to echo.
    pub(super) fn advance(&mut self, bindings: &[Binding], table: &Table) -> Option<(Arc<Inputs>, Echo)> {
        if self.done {
            return None;
        }
        let mut inputs = Inputs::new(table.relation.columns());
        let mut echo = Vec::with_capacity(bindings.len());
        for ((binding, alternatives), index) in bindings.iter().zip(&self.alternatives).zip(&self.next) {
            let alternative = alternatives.get(*index)?;
            inputs.set(binding.column, alternative.value.clone());
            echo.push(alternative.datum);
        }
        self.step();
        Some((Arc::new(inputs), echo.into()))
    }

    /// Whether there are no more.
    pub(super) fn is_done(&self) -> bool {
        self.done
    }

    fn step(&mut self) {
        for (index, alternatives) in self.next.iter_mut().zip(&self.alternatives).rev() {
            *index += 1;
            if *index < alternatives.len() {
                return;
            }
            *index = 0;
        }
        self.done = true;
    }
}

/// The combinations as calls; rows come back with the datums that they echo.
pub(super) struct Inputting<'a> {
    pub(super) combinations: &'a mut Combinations,
    pub(super) bindings: &'a [Binding],
    pub(super) table: &'a Table,
}

impl Source for Inputting<'_> {
    type Tag = Echo;

    fn next(&mut self) -> Result<Option<Begin<Echo>>> {
        let next = self.combinations.advance(self.bindings, self.table);
        Ok(next.map(|(inputs, echo)| Begin {
            inputs: Some(inputs),
            tag: echo,
        }))
    }
}

/// For each binding the datum that rows echo.
pub(super) type Echo = std::rc::Rc<[pg_sys::Datum]>;

/// The datum of an attribute of a row that the server has answered; none for NULL.
pub(super) fn datum_of(
    table: &Table,
    bindings: &[Binding],
    row: &Row,
    echo: &[pg_sys::Datum],
    index: usize,
) -> Result<Option<pg_sys::Datum>> {
    let Some(attribute) = &table.attributes[index] else {
        return Ok(None);
    };
    match &row[attribute.column] {
        Value::Echo => {
            let binding = bindings.iter().position(|binding| binding.attribute == index);
            Ok(binding.and_then(|binding| echo.get(binding).copied()))
        }
        value => write(
            table.relation.columns()[attribute.column].name,
            value,
            attribute.sql_type,
        ),
    }
}

/// Refuses a scan that lacks a required input, or that asks of an input what cannot be told to the server.
pub(super) fn check(table: &Table, private: &Private, bindings: &[Binding]) -> Result<()> {
    let relation = table.relation;
    let code = PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE;
    let hint = "Give inputs in WHERE as column = value, column = ANY (array), or by a join on the column. \
                A volatile function gives one when it is written as (SELECT function()).";
    let name_of = |attribute: &i32| {
        let attribute = table
            .attributes
            .get(usize::try_from(attribute - 1).ok()?)
            .copied()
            .flatten()?;
        Some(relation.columns()[attribute.column].name)
    };
    for group in relation.required() {
        let given = bindings
            .iter()
            .any(|binding| group.contains(&relation.columns()[binding.column].name));
        if !given {
            let names: Vec<String> = group.iter().map(|name| format!("\"{name}\"")).collect();
            let message = format!(
                "a query of \"{}\" needs a value for {}",
                relation.name(),
                names.join(" or ")
            );
            return Err(Error::new(code, message).hint(hint));
        }
    }
    if let Some(name) = private.unusable.iter().find_map(name_of) {
        debug_assert!(
            relation
                .columns()
                .iter()
                .any(|column| column.name == name && column.role == Role::Input)
        );
        return Err(Error::new(
            code,
            format!("\"{name}\" is an input, and this condition gives it no value"),
        )
        .hint(hint));
    }
    Ok(())
}
