//! A tensor: its elements, what has arrived of them, or what they wait for.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use candle_compute_proto::v1;
use candle_models::Tensor;
use candle_models::executor::{Buffer, ElementType, TensorType};

use super::operation::Facts;
use crate::chunks::CHUNK_ELEMENTS;
use crate::devices;
use crate::error::{Error, Result};
use crate::memory::Reservation;

/// A named tensor. Its elements do not change once they are complete.
pub(crate) struct StoredTensor {
    /// Unique in the executor.
    pub(crate) id: u64,
    /// Its name.
    pub(crate) name: String,
    /// Type and shape.
    pub(crate) tensor_type: TensorType,
    /// Where it is.
    pub(crate) device: String,
    /// Whether others than its session will see it.
    pub(crate) persistent: bool,
    /// The operation that makes it.
    pub(crate) made_by: Option<Arc<Facts>>,
    /// When it was made.
    pub(super) created_at: SystemTime,
    pub(super) content: Mutex<Content>,
    /// What it takes of the memory.
    pub(super) _memory: Reservation,
}

/// The elements of a tensor.
pub(super) enum Content {
    /// Chunks have arrived.
    Received(Received),
    /// Elements on the device.
    Ready(Tensor),
    /// The operation has not ended.
    Pending,
    /// Its operation failed.
    Failed(Failure),
}

/// The chunks that have arrived.
pub(super) struct Received {
    buffer: Buffer,
    chunks: Vec<bool>,
}

/// Why an operation has no result.
#[derive(Debug, Clone)]
pub(crate) struct Failure {
    /// The operation, and why it failed.
    pub(crate) message: String,
    /// The operation that failed first, and why: the message of a chain of operations names its ends, not every link.
    pub(crate) cause: Arc<str>,
    /// Whether somebody cancelled it.
    pub(crate) cancelled: bool,
    /// How a call that wants the result fails.
    pub(crate) code: tonic::Code,
    /// Likewise, in SQL.
    pub(crate) sqlstate: &'static str,
}

/// The element type of the protocol's number.
///
/// # Errors
/// `InvalidArgument` for types that no tensor has.
pub(crate) fn element_type(dtype: i32) -> Result<ElementType> {
    match v1::DataType::try_from(dtype) {
        Ok(v1::DataType::Unspecified | v1::DataType::F32) => Ok(ElementType::F32),
        Ok(v1::DataType::F16) => Ok(ElementType::F16),
        Ok(v1::DataType::Bf16) => Ok(ElementType::Bf16),
        Ok(v1::DataType::I32) => Ok(ElementType::I32),
        Ok(v1::DataType::Q8) | Err(_) => Err(Error::invalid(format!(
            "{dtype} is no data type of tensors; they have f32, f16, bf16 or i32"
        ))),
    }
}

/// The protocol's number of an element type.
pub(crate) fn data_type(element: ElementType) -> v1::DataType {
    match element {
        ElementType::F32 => v1::DataType::F32,
        ElementType::F16 => v1::DataType::F16,
        ElementType::Bf16 => v1::DataType::Bf16,
        ElementType::I32 => v1::DataType::I32,
    }
}

impl Content {
    /// Nothing has arrived yet.
    pub(super) fn empty(tensor: &TensorType) -> Self {
        Self::Received(Received {
            buffer: Buffer::new(tensor),
            chunks: vec![false; chunk_count(tensor)],
        })
    }
}

/// Number of chunks, at least 1.
fn chunk_count(tensor: &TensorType) -> usize {
    tensor.elements().div_ceil(CHUNK_ELEMENTS).max(1)
}

impl StoredTensor {
    /// Number of chunks, at least 1.
    pub(crate) fn chunks(&self) -> usize {
        chunk_count(&self.tensor_type)
    }

    /// Elements of a chunk.
    pub(crate) fn range(&self, chunk: usize) -> Range<usize> {
        let start = chunk * CHUNK_ELEMENTS;
        start..self.tensor_type.elements().min(start + CHUNK_ELEMENTS)
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Content> {
        self.content.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a chunk.
    ///
    /// # Errors
    /// `InvalidArgument` for a chunk that it does not have or of another size, `NameTaken` for one that is there already.
    pub(super) fn put(&self, number: usize, data: &[u8]) -> Result<()> {
        let name = &self.name;
        let refuse = |what: String| Error::invalid(format!("tensor \"{name}\", chunk {number}: {what}"));
        let chunks = self.chunks();
        if number >= chunks {
            let what = format!("a tensor of {} has {chunks} chunks, numbered from 0", self.tensor_type);
            return Err(refuse(what));
        }
        let range = self.range(number);
        let needed = range.len() * self.tensor_type.element().size();
        if data.len() != needed {
            return Err(refuse(format!(
                "its data has {} bytes, but {} elements of {} are {needed}",
                data.len(),
                range.len(),
                self.tensor_type.element()
            )));
        }
        match &mut *self.lock() {
            Content::Received(received) if !received.chunks[number] => {
                received.buffer.write(range.start, data);
                received.chunks[number] = true;
                Ok(())
            }
            Content::Received(_) if chunks > 1 => Err(Error::NameTaken {
                kind: "chunk",
                name: format!("{number} of tensor {name}"),
            }),
            _ => Err(Error::NameTaken {
                kind: "tensor",
                name: name.clone(),
            }),
        }
    }

    /// Takes a chunk back.
    ///
    /// # Errors
    /// Those of copying from the device.
    pub(super) fn take_back(&self, number: usize) -> Result<()> {
        let mut content = self.lock();
        if let Content::Ready(tensor) = &*content {
            let buffer = Buffer::of(tensor)?;
            let chunks = vec![true; self.chunks()];
            *content = Content::Received(Received { buffer, chunks });
        }
        if let Content::Received(received) = &mut *content
            && let Some(present) = received.chunks.get_mut(number)
        {
            *present = false;
        }
        Ok(())
    }

    /// Refuses a tensor of which chunks are missing.
    ///
    /// # Errors
    /// `Precondition` that names the first one.
    pub(crate) fn check_complete(&self) -> Result<()> {
        let Content::Received(received) = &*self.lock() else {
            return Ok(());
        };
        match received.chunks.iter().position(|present| !present) {
            None => Ok(()),
            Some(missing) => Err(Error::Precondition {
                message: format!(
                    "tensor \"{}\" is incomplete: chunk {missing} of {} is missing",
                    self.name,
                    received.chunks.len()
                ),
                hint: "Insert all chunks first; they are numbered from 0.",
            }),
        }
    }

    /// Whether its operation has not ended.
    pub(super) fn is_pending(&self) -> bool {
        matches!(&*self.lock(), Content::Pending)
    }

    /// The elements. None while the operation has not ended.
    ///
    /// # Errors
    /// `OperationFailed`, `Precondition` for an incomplete tensor, and those of copying to the device.
    pub(crate) fn value(&self) -> Result<Option<Tensor>> {
        self.check_complete()?;
        let mut content = self.lock();
        let received = match &mut *content {
            Content::Ready(tensor) => return Ok(Some(tensor.clone())),
            Content::Pending => return Ok(None),
            Content::Failed(failure) => return Err(self.failed(failure)),
            Content::Received(received) => received,
        };
        let device = devices::open(&self.device)?;
        let nothing = Buffer::new(&TensorType::new(self.tensor_type.element(), &[0])?);
        let buffer = std::mem::replace(&mut received.buffer, nothing);
        let tensor = buffer.into_tensor(self.tensor_type.shape(), &device)?;
        *content = Content::Ready(tensor.clone());
        Ok(Some(tensor))
    }

    /// As [`value`](Self::value), once the operation has ended.
    ///
    /// # Errors
    /// As [`value`](Self::value).
    pub(crate) async fn wait(&self) -> Result<Tensor> {
        if let Some(operation) = &self.made_by {
            operation.ended().await;
        }
        self.value()?
            .ok_or_else(|| Error::Internal(format!("tensor \"{}\" is pending without an operation", self.name)))
    }

    /// Its operation's failure, if it failed.
    pub(super) fn failure(&self) -> Option<Failure> {
        match &*self.lock() {
            Content::Failed(failure) => Some(failure.clone()),
            _ => None,
        }
    }

    fn failed(&self, failure: &Failure) -> Error {
        Error::OperationFailed {
            message: format!("tensor \"{}\" was not computed: {}", self.name, failure.message),
            code: failure.code,
            sqlstate: failure.sqlstate,
        }
    }

    /// What the protocol tells of it.
    pub(crate) fn describe(&self) -> v1::Tensor {
        let (mut error, mut received) = (String::new(), Vec::new());
        let status = match &*self.lock() {
            Content::Ready(_) => v1::TensorStatus::Ready,
            Content::Pending => v1::TensorStatus::Pending,
            Content::Failed(failure) => {
                error.clone_from(&failure.message);
                v1::TensorStatus::Failed
            }
            Content::Received(arrived) if arrived.chunks.iter().all(|present| *present) => v1::TensorStatus::Ready,
            Content::Received(arrived) => {
                let numbers = (0u32..).zip(&arrived.chunks);
                received = numbers
                    .filter_map(|(number, present)| present.then_some(number))
                    .collect();
                v1::TensorStatus::Incomplete
            }
        };
        v1::Tensor {
            name: self.name.clone(),
            device: self.device.clone(),
            dtype: data_type(self.tensor_type.element()).into(),
            shape: self.shape(),
            elements: self.tensor_type.elements() as u64,
            chunks: u32::try_from(self.chunks()).unwrap_or(u32::MAX),
            persistent: self.persistent,
            status: status.into(),
            error,
            operation_id: self.made_by.as_ref().map_or(0, |operation| operation.id),
            created_at: Some(self.created_at.into()),
            received,
        }
    }

    /// A chunk without its data.
    pub(crate) fn describe_chunk(&self, number: usize) -> v1::TensorChunk {
        let range = self.range(number);
        v1::TensorChunk {
            name: self.name.clone(),
            dtype: data_type(self.tensor_type.element()).into(),
            shape: self.shape(),
            chunk: u32::try_from(number).unwrap_or(u32::MAX),
            offset: range.start as u64,
            elements: range.len() as u64,
            ..Default::default()
        }
    }

    fn shape(&self) -> Vec<u64> {
        self.tensor_type.shape().iter().map(|size| *size as u64).collect()
    }
}
