//! numpy's `.npz`: a zip archive of `.npy` arrays named as the parameters are, stored or deflated.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::Tensor;

use super::archive::{Archive, Member};
use super::files::invalid;
use super::npy::{NpyError, NpyHeader, read_header};
use super::values::read_floats;
use super::weight_file::{StoredType, TensorInfo, WeightFile};
use crate::error::{Error, Result};

/// Longest document in an archive, in bytes.
const MAX_DOCUMENT_BYTES: u64 = 128 << 20;

/// An open `.npz` file.
#[derive(Debug)]
pub(super) struct NpzFile {
    archive: Archive,
    /// By name without `.npy`.
    arrays: BTreeMap<String, (Member, NpyHeader)>,
    documents: Vec<(String, String)>,
}

impl NpzFile {
    /// Opens an archive and reads the header of every array.
    pub(super) fn open(archive: Archive) -> Result<Self> {
        let path = &archive.path;
        let (mut arrays, mut documents) = (BTreeMap::new(), Vec::new());
        for (member_name, member) in &archive.members {
            let Some(name) = member_name.strip_suffix(".npy") else {
                let text = String::from_utf8(archive.read(member_name, member, MAX_DOCUMENT_BYTES)?);
                let text = text.map_err(|_| {
                    invalid(
                        path,
                        format!("{member_name} in the archive is neither an array nor a text"),
                    )
                })?;
                documents.push((member_name.clone(), text));
                continue;
            };
            let header = read_header(&mut archive.reader(member)).map_err(|error| match error {
                NpyError::Io(error) => archive.failed(&format!("tensor {name}"), error),
                NpyError::Invalid(reason) => invalid(path, format!("tensor {name}: {reason}")),
            })?;
            let expected = header.data_bytes.map(|bytes| bytes + header.header_bytes);
            if expected.is_some_and(|bytes| bytes != member.size) {
                return Err(invalid(
                    path,
                    format!(
                        "tensor {name} of shape {:?} does not fit the {} bytes of its array",
                        header.info.shape,
                        member.size.saturating_sub(header.header_bytes)
                    ),
                ));
            }
            arrays.insert(name.to_owned(), (*member, header));
        }
        Ok(Self {
            archive,
            arrays,
            documents,
        })
    }
}

impl WeightFile for NpzFile {
    fn path(&self) -> &Path {
        &self.archive.path
    }

    fn tensors(&self) -> Vec<(&str, TensorInfo)> {
        self.arrays
            .iter()
            .map(|(name, (_, header))| (name.as_str(), header.info.clone()))
            .collect()
    }

    fn load(&self, name: &str) -> Result<Tensor> {
        let path = self.path();
        let missing = || Error::NotFound(format!("there is no tensor {name} in {}", path.display()));
        let (member, header) = self.arrays.get(name).ok_or_else(missing)?;
        header.info.check_type(path, name)?;
        let StoredType::Float(kind) = header.info.dtype else {
            return Err(missing());
        };
        let mut shape = header.info.shape.clone();
        if header.fortran {
            shape.reverse();
        }
        let tensor = read_floats(kind, &shape, path, name, |buffer| {
            let mut head = vec![0; header.header_bytes as usize];
            self.archive.fill(&format!("tensor {name}"), member, &mut head, buffer)
        })?;
        in_c_order(tensor, header.fortran)
    }

    fn documents(&self) -> Vec<(String, String)> {
        self.documents.clone()
    }
}

/// Puts the dimensions of an array in Fortran order, which were read the other way round, back.
pub(super) fn in_c_order(tensor: Tensor, fortran: bool) -> Result<Tensor> {
    if !fortran || tensor.rank() < 2 {
        return Ok(tensor);
    }
    let dimensions: Vec<usize> = (0..tensor.rank()).rev().collect();
    Ok(tensor.permute(dimensions)?.contiguous()?)
}
