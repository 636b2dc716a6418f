//! PyTorch's `.bin`: a zip archive of storages and a pickle that says which tensors lie in them.
//!
//! A pickle is a program, and running it would run whatever its author wanted. Here it is read by a machine that has only
//! the instructions and the names that `torch.save` needs for a dictionary of tensors, and that never calls anything.

mod file;
mod machine;
mod value;

pub(super) use file::{PickleFile, is_torch};
