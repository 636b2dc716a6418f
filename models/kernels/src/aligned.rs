//! Buffers of panels: packed operands begin at a cache line, since loads across two are slower.

/// Bytes of a cache line.
const LINE: usize = 64;

/// A buffer of words that begin at a cache line.
pub(crate) struct Aligned(Vec<f32>);

impl Aligned {
    pub(crate) const fn new() -> Self {
        Self(Vec::new())
    }

    /// `length` words, of any value.
    pub(crate) fn words(&mut self, length: usize) -> &mut [f32] {
        let needed = length + LINE / size_of::<f32>();
        if self.0.len() < needed {
            // Nothing is worth copying.
            self.0.clear();
            self.0.resize(needed, 0.0);
        }
        let start = self.0.as_ptr().align_offset(LINE);
        &mut self.0[start..start + length]
    }
}

impl Default for Aligned {
    fn default() -> Self {
        Self::new()
    }
}
