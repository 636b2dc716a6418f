//! An operation, checked against the types of its inputs, and ready to run.

use std::fmt;
use std::ops::RangeInclusive;

use candle_core::{Device, Tensor};

use super::attributes::Attributes;
use super::operations::OPERATIONS;
use super::tensor_type::TensorType;
use crate::error::{Error, Result};

/// One kind of operation.
pub trait Operation: Sync {
    /// Its name.
    fn name(&self) -> &'static str;

    /// How many inputs it has.
    fn inputs(&self) -> RangeInclusive<usize>;

    /// Names of its attributes.
    fn attributes(&self) -> &'static [&'static str] {
        &[]
    }

    /// Whether the inputs may be on another device than the output.
    fn moves(&self) -> bool {
        false
    }

    /// Whether it may need a copy of its inputs while it runs.
    fn copies(&self) -> bool {
        false
    }

    /// Checks types and attributes; the number of inputs and the names of attributes have been checked.
    ///
    /// # Errors
    /// `InvalidArgument` that names shapes or attributes.
    fn prepare(&self, inputs: &[TensorType], attributes: &Attributes) -> Result<Prepared>;
}

/// Computes an output from inputs of the types that it was prepared for.
type Run = Box<dyn Fn(&[Tensor], &Monitor<'_>) -> Result<Tensor> + Send + Sync>;

/// An operation whose inputs have known types.
pub struct Prepared {
    output: TensorType,
    run: Run,
}

impl Prepared {
    /// What an operation makes, and how. `run` is not called for an output without elements.
    pub(super) fn new(
        output: TensorType,
        run: impl Fn(&[Tensor], &Monitor<'_>) -> Result<Tensor> + Send + Sync + 'static,
    ) -> Self {
        Self {
            output,
            run: Box::new(run),
        }
    }
}

/// Who watches an operation run.
pub struct Monitor<'a> {
    /// Whether it is to stop.
    pub cancelled: &'a dyn Fn() -> bool,
    /// Is told of units done, and units in all.
    pub progress: &'a dyn Fn(u64, u64),
}

impl Monitor<'_> {
    /// Tells of progress.
    ///
    /// # Errors
    /// `Cancelled` when the operation is to stop.
    pub(super) fn advance(&self, done: usize, total: usize) -> Result<()> {
        (self.progress)(done as u64, total as u64);
        match (self.cancelled)() {
            true => Err(Error::Cancelled),
            false => Ok(()),
        }
    }
}

/// An operation that can run.
pub struct Plan {
    operation: &'static dyn Operation,
    prepared: Prepared,
    workspace: u64,
}

impl fmt::Debug for Plan {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} -> {}", self.operation.name(), self.prepared.output)
    }
}

/// Checks an operation. `inputs` are the names of the inputs and their types.
///
/// # Errors
/// `NotFound` for an unknown operation, `InvalidArgument` for a wrong number of inputs, an unknown attribute, and types or
/// attributes that do not fit; the message names operation, inputs and shapes.
pub fn plan(operation: &str, inputs: &[(&str, TensorType)], attributes: &Attributes) -> Result<Plan> {
    let Some(found) = OPERATIONS.iter().find(|known| known.name() == operation) else {
        let shown: String = operation.chars().take(40).collect();
        let known: Vec<&str> = OPERATIONS.iter().map(|known| known.name()).collect();
        return Err(Error::NotFound(format!(
            "there is no operation {shown:?}; the operations are {}",
            known.join(", ")
        )));
    };
    let described: Vec<String> = inputs
        .iter()
        .map(|(name, tensor)| format!("\"{name}\" {tensor}"))
        .collect();
    let refuse = |error: Error| match error {
        Error::InvalidArgument(message) => {
            Error::InvalidArgument(format!("{operation} of {}: {message}", described.join(", ")))
        }
        other => other,
    };
    let (least, most) = (*found.inputs().start(), *found.inputs().end());
    if !found.inputs().contains(&inputs.len()) {
        let needed = match (least, most) {
            (least, most) if least == most => least.to_string(),
            (least, usize::MAX) => format!("at least {least}"),
            (least, most) => format!("{least} to {most}"),
        };
        return Err(Error::InvalidArgument(format!(
            "{operation} needs {needed} inputs, not {}",
            inputs.len()
        )));
    }
    attributes.check(operation, found.attributes())?;
    let types: Vec<TensorType> = inputs.iter().map(|(_, tensor)| tensor.clone()).collect();
    let prepared = found.prepare(&types, attributes).map_err(refuse)?;
    let all = || types.iter().chain([&prepared.output]);
    let elements: usize = all().map(TensorType::elements).sum();
    let needs = found.copies() || all().any(|tensor| tensor.element().size() < 4);
    Ok(Plan {
        operation: *found,
        prepared,
        workspace: if needs { 4 * elements as u64 } else { 0 },
    })
}

impl Plan {
    /// What it makes.
    #[must_use]
    pub fn output(&self) -> &TensorType {
        &self.prepared.output
    }

    /// Whether the inputs may be on another device than the output.
    #[must_use]
    pub fn moves(&self) -> bool {
        self.operation.moves()
    }

    /// Bytes that it may need while it runs, beside inputs and output: where there is a half type, or it copies, all of them
    /// as f32, once.
    #[must_use]
    pub fn workspace(&self) -> u64 {
        self.workspace
    }

    /// Computes the output, a contiguous tensor on `device`. The inputs are contiguous and of the types that were planned
    /// with.
    ///
    /// # Errors
    /// `InvalidArgument` for elements that do not fit, as an id without a row, `Cancelled`, and what candle fails with.
    pub fn run(&self, inputs: &[Tensor], device: &Device, monitor: &Monitor<'_>) -> Result<Tensor> {
        let output = &self.prepared.output;
        if output.elements() == 0 {
            return Ok(Tensor::zeros(output.shape(), output.element().dtype(), device)?);
        }
        monitor.advance(0, 1)?;
        let result = match self.moves() {
            true => {
                let moved: candle_core::Result<Vec<Tensor>> =
                    inputs.iter().map(|input| input.to_device(device)).collect();
                (self.prepared.run)(&moved?, monitor)?
            }
            false => (self.prepared.run)(inputs, monitor)?,
        };
        let result = result.contiguous()?;
        let made = (result.dims(), result.dtype());
        if made != (output.shape(), output.element().dtype()) {
            let message = format!("{self:?} made {made:?}");
            return Err(candle_core::Error::Msg(message).bt().into());
        }
        Ok(result)
    }
}
