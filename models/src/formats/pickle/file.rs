//! An open `.bin` file of PyTorch.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{Tensor as CandleTensor, WithDType};
use half::{bf16, f16};

use super::machine::tensors;
use super::value::Tensor;
use crate::error::{Error, Result};
use crate::formats::archive::{Archive, Member};
use crate::formats::files::invalid;
use crate::formats::values::{FloatType, byte_length, read_floats};
use crate::formats::weight_file::{StoredType, TensorInfo, WeightFile};

/// Longest pickle, in bytes: tens of thousands of tensors.
const MAX_PICKLE_BYTES: u64 = 16 << 20;
const PICKLE: &str = "data.pkl";

/// Whether an archive is PyTorch's rather than numpy's.
pub(in crate::formats) fn is_torch(archive: &Archive) -> bool {
    root(archive).is_some()
}

/// The folder within the archive that holds the pickle, with its slash.
fn root(archive: &Archive) -> Option<&str> {
    let of = |name: &String| name.strip_suffix(PICKLE).map(str::len);
    let (name, length) = archive.members.keys().find_map(|name| Some((name, of(name)?)))?;
    name.get(..length)
}

/// An open file; its pickle has been read, and every tensor lies inside its storage.
#[derive(Debug)]
pub(in crate::formats) struct PickleFile {
    archive: Archive,
    tensors: BTreeMap<String, View>,
}

/// A tensor and the member that holds its storage.
#[derive(Debug)]
struct View {
    tensor: Tensor,
    info: TensorInfo,
    /// Name of the member.
    member: String,
}

impl PickleFile {
    /// Opens an archive of `torch.save`.
    pub(in crate::formats) fn open(archive: Archive) -> Result<Self> {
        let path = &archive.path;
        let missing = || invalid(path, format!("{PICKLE} is missing"));
        let root = root(&archive).ok_or_else(missing)?;
        let member = |name: &str| Some((format!("{root}{name}"), *archive.members.get(&format!("{root}{name}"))?));
        if let Some((name, order)) = member("byteorder") {
            let order = archive.read(&name, &order, 64)?;
            if order != b"little" {
                let shown = String::from_utf8_lossy(&order).into_owned();
                return Err(invalid(
                    path,
                    format!("its byte order is {shown:?}; only little-endian files are read"),
                ));
            }
        }
        let (name, pickle) = member(PICKLE).ok_or_else(missing)?;
        let program = archive.read(&name, &pickle, MAX_PICKLE_BYTES)?;
        let mut views = BTreeMap::new();
        for (name, tensor) in tensors(&program).map_err(|reason| invalid(path, reason))? {
            let refuse = |reason: String| invalid(path, format!("tensor {name}: {reason}"));
            let key = format!("data/{}", tensor.storage.key);
            let (member, storage) =
                member(&key).ok_or_else(|| refuse(format!("its storage {key} is not in the archive")))?;
            let info = info_of(&tensor, &storage).map_err(refuse)?;
            let view = View { tensor, info, member };
            if views.insert(name.clone(), view).is_some() {
                return Err(invalid(path, format!("tensor {name} is there twice")));
            }
        }
        Ok(Self {
            tensors: views,
            archive,
        })
    }

    fn read(&self, name: &str, view: &View, kind: FloatType) -> Result<CandleTensor> {
        let (path, tensor) = (&self.archive.path, &view.tensor);
        let member = self.archive.members.get(&view.member);
        let member = member.ok_or_else(|| invalid(path, format!("{} is missing", view.member)))?;
        let element = kind.size() as u64;
        let fill = |buffer: &mut [u8]| match buffer.len() as u64 == member.size {
            // A whole storage: its checksum can be verified.
            true => self.archive.fill(&format!("tensor {name}"), member, &mut [], buffer),
            false => self
                .archive
                .read_at(&view.member, member, tensor.offset * element, buffer),
        };
        if is_contiguous(tensor) {
            return read_floats(kind, &view.info.shape, path, name, fill);
        }
        // The stretch of the storage that its elements lie in, then the elements.
        let span = span(tensor).unwrap_or(0) as usize;
        let stretch = read_floats(kind, &[span], path, name, fill)?;
        match kind {
            FloatType::F16 => gather::<f16>(&stretch, view),
            FloatType::Bf16 => gather::<bf16>(&stretch, view),
            FloatType::F32 | FloatType::F64 => gather::<f32>(&stretch, view),
        }
    }
}

/// What is known of a tensor, once it is certain that it lies inside its storage.
fn info_of(tensor: &Tensor, member: &Member) -> Result<TensorInfo, String> {
    let storage = &tensor.storage;
    let (kind, element) = match storage.dtype {
        "float32" => (Some(FloatType::F32), 4),
        "float16" => (Some(FloatType::F16), 2),
        "bfloat16" => (Some(FloatType::Bf16), 2),
        "float64" => (Some(FloatType::F64), 8),
        "int64" => (None, 8),
        "int32" => (None, 4),
        "int16" => (None, 2),
        _ => (None, 1),
    };
    if storage.elements.checked_mul(element) != Some(member.size) {
        return Err(format!(
            "its storage of {} {} has {} bytes in the archive",
            storage.elements, storage.dtype, member.size
        ));
    }
    let shape: Vec<usize> = tensor.shape.iter().map(|&size| size as usize).collect();
    let elements = byte_length(&shape, 1).ok_or_else(|| format!("it has the impossible shape {shape:?}"))?;
    let span = span(tensor).ok_or("it has impossible strides")?;
    if tensor.offset.checked_add(span).is_none_or(|end| end > storage.elements) {
        return Err(format!(
            "it reaches to element {} of a storage of {}",
            tensor.offset.saturating_add(span),
            storage.elements
        ));
    }
    if elements > span {
        return Err("its strides repeat elements: save it contiguous".to_owned());
    }
    Ok(TensorInfo {
        dtype: kind.map_or_else(|| StoredType::Other(storage.dtype.to_owned()), StoredType::Float),
        bytes: elements * element.min(4),
        shape,
    })
}

/// Number of elements from its first to its last in the storage, both included; 0 for an empty tensor.
fn span(tensor: &Tensor) -> Option<u64> {
    if tensor.shape.contains(&0) {
        return Some(0);
    }
    let mut last = 0u64;
    for (size, stride) in tensor.shape.iter().zip(&tensor.strides) {
        last = last.checked_add((size - 1).checked_mul(*stride)?)?;
    }
    last.checked_add(1)
}

fn is_contiguous(tensor: &Tensor) -> bool {
    let mut expected = 1u64;
    for (size, stride) in tensor.shape.iter().zip(&tensor.strides).rev() {
        if *size > 1 && *stride != expected {
            return false;
        }
        expected = expected.saturating_mul(*size);
    }
    true
}

/// The elements of a view in row-major order.
fn gather<T: WithDType>(stretch: &CandleTensor, view: &View) -> Result<CandleTensor> {
    let stretch = stretch.to_vec1::<T>()?;
    let (shape, strides) = (&view.info.shape, &view.tensor.strides);
    let mut values = Vec::with_capacity(shape.iter().product());
    let (mut index, mut place) = (vec![0; shape.len()], 0usize);
    for _ in 0..shape.iter().product() {
        values.push(stretch[place]);
        for axis in (0..shape.len()).rev() {
            let stride = strides[axis] as usize;
            index[axis] += 1;
            // A dimension of one index may have any stride.
            place = place.wrapping_add(stride);
            if index[axis] < shape[axis] {
                break;
            }
            place = place.wrapping_sub(stride.wrapping_mul(shape[axis]));
            index[axis] = 0;
        }
    }
    Ok(CandleTensor::from_vec(
        values,
        shape.as_slice(),
        &candle_core::Device::Cpu,
    )?)
}

impl WeightFile for PickleFile {
    fn path(&self) -> &Path {
        &self.archive.path
    }

    fn tensors(&self) -> Vec<(&str, TensorInfo)> {
        self.tensors
            .iter()
            .map(|(name, view)| (name.as_str(), view.info.clone()))
            .collect()
    }

    fn load(&self, name: &str) -> Result<CandleTensor> {
        let path = self.path();
        let missing = || Error::NotFound(format!("there is no tensor {name} in {}", path.display()));
        let view = self.tensors.get(name).ok_or_else(missing)?;
        view.info.check_type(path, name)?;
        match view.info.dtype {
            StoredType::Float(kind) => self.read(name, view, kind),
            StoredType::Other(_) => Err(missing()),
        }
    }
}
