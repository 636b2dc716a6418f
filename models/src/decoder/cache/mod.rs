//! Keys and values of the past, in pages of [`PAGE_POSITIONS`] positions that sequences with the same beginning share.
//!
//! A [`KeyValueCache`] is one sequence's table of pages. A [`PagePool`] makes pages for the sequences of a model within
//! the memory that its [`PageMemory`] grants, and keeps full ones findable by their tokens, so that a prompt which begins
//! like an earlier one is not computed again (as vLLM's prefix caching; Kwon et al., arXiv:2309.06180).

mod page;
mod pool;
mod prefix;
mod sequence;

pub use page::{PAGE_POSITIONS, PageMemory};
pub use pool::{CacheUsage, PagePool};
pub use prefix::{Place, Scope};
pub use sequence::KeyValueCache;

#[cfg(test)]
use page::PageShape;
#[cfg(test)]
mod tests;
