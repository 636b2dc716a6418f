//! What calls have answered, for calls with equal inputs: a bounded number of bytes of the last ones.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::rc::Rc;

use crate::relation::{Inputs, Row};
use crate::values::Value;

/// Bytes kept.
const LIMIT: usize = 4 << 20;

/// The rows of a call, as far as they have been read.
#[derive(Default)]
pub(super) struct Kept {
    rows: RefCell<Vec<Row>>,
    /// Whether further calls may find them.
    known: Cell<bool>,
    /// Whether there are no more.
    complete: Cell<bool>,
}

impl Kept {
    pub(super) fn row(&self, number: usize) -> Option<Row> {
        self.rows.borrow().get(number).cloned()
    }

    /// Whether all rows are there.
    pub(super) fn is_complete(&self) -> bool {
        self.complete.get()
    }

    /// All rows are there.
    pub(super) fn complete(&self) {
        self.complete.set(true);
    }

    fn bytes(&self) -> usize {
        self.rows.borrow().iter().map(bytes).sum()
    }
}

pub(super) type Answer = Rc<Kept>;

/// The answers of the last calls, by their inputs.
#[derive(Default)]
pub(super) struct Answers {
    by_inputs: HashMap<String, Answer>,
    /// The inputs in the order of the calls.
    order: VecDeque<String>,
    /// Bytes of inputs and rows, those of answers that have been dropped since not counted.
    bytes: usize,
}

impl Answers {
    /// The answer of a call with equal inputs.
    pub(super) fn find(&self, inputs: &Inputs) -> Option<Answer> {
        self.by_inputs.get(&key(inputs)).cloned()
    }

    /// The answer, to be added to, of a call that begins.
    pub(super) fn begin(&mut self, inputs: &Inputs) -> Answer {
        let (key, answer) = (key(inputs), Answer::default());
        answer.known.set(true);
        self.bytes += 2 * key.len();
        self.order.push_back(key.clone());
        self.by_inputs.insert(key, Rc::clone(&answer));
        answer
    }

    /// Adds a row to the answer of a call. Older answers make room for it.
    pub(super) fn add(&mut self, answer: &Answer, row: &Row) {
        // Who found the answer before it was forgotten still reads all of it.
        if !answer.known.get() && Rc::strong_count(answer) == 1 {
            return;
        }
        answer.rows.borrow_mut().push(row.clone());
        if !answer.known.get() {
            return;
        }
        self.bytes += bytes(row);
        while self.bytes > LIMIT
            && let Some(oldest) = self.order.pop_front()
        {
            self.bytes -= 2 * oldest.len();
            if let Some(forgotten) = self.by_inputs.remove(&oldest) {
                self.bytes -= forgotten.bytes();
                forgotten.known.set(false);
            }
        }
    }
}

fn key(inputs: &Inputs) -> String {
    format!("{inputs:?}")
}

fn bytes(row: &Row) -> usize {
    let held = |value: &Value| match value {
        Value::Text(text) => text.len(),
        Value::Bytes(bytes) => bytes.len(),
        Value::Ints(numbers) => size_of_val(numbers.as_slice()),
        _ => 0,
    };
    row.iter().map(|value| size_of::<Value>() + held(value)).sum()
}
