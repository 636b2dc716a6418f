//! The vector interface of kernels: sixteen `f32` lanes, whatever the registers' width.

/// Number of `f32` lanes of [`Simd::F32`], the same at every level so that results are reduced in the same order.
pub(crate) const LANES: usize = 16;

/// Operations of one instruction-set level. A value is the evidence that the machine supports it, so that the methods
/// are safe. All are lane-wise unless said otherwise.
pub(crate) trait Simd: Copy {
    /// Sixteen `f32` lanes.
    type F32: Copy;

    /// Accumulators that fit in registers beside the operands; larger tiles would spill.
    const ACCUMULATORS: usize;

    /// `value` in every lane.
    fn splat(self, value: f32) -> Self::F32;
    /// Lanes from memory.
    fn load(self, from: &[f32; LANES]) -> Self::F32;
    /// Lanes to memory.
    fn store(self, value: Self::F32, to: &mut [f32; LANES]);
    /// `a + b`.
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a - b`.
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a * b`.
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a / b`.
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a * b + c`, rounded once where the level has a fused operation.
    fn mul_add(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32;
    /// The smaller of each pair; `b` where either is NaN.
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// The larger of each pair; `b` where either is NaN.
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// Square root.
    fn sqrt(self, a: Self::F32) -> Self::F32;
    /// Nearest integer, ties to even.
    fn round(self, a: Self::F32) -> Self::F32;
    /// `a * 2^exponent` for integral exponents from -126 to 127.
    fn scale_by_power_of_two(self, a: Self::F32, exponent: Self::F32) -> Self::F32;
    /// `then` where `a < b`, otherwise (also with NaN) `otherwise`.
    fn select_less(self, a: Self::F32, b: Self::F32, then: Self::F32, otherwise: Self::F32) -> Self::F32;
    /// Sum of the lanes, as a tree of halves: lane `i` with lane `i + 8`, then `i + 4`, `i + 2`, `i + 1`.
    fn reduce_add(self, a: Self::F32) -> f32;
    /// Largest lane.
    fn reduce_max(self, a: Self::F32) -> f32;
    /// Lanes from little-endian IEEE single precision at any alignment.
    fn load_f32_bytes(self, from: &[u8; 64]) -> Self::F32;
    /// Lanes from little-endian IEEE half precision at any alignment.
    fn load_f16_bytes(self, from: &[u8; 32]) -> Self::F32;
    /// Lanes from little-endian bfloat16 at any alignment.
    fn load_bf16_bytes(self, from: &[u8; 32]) -> Self::F32;
    /// Lanes rounded to IEEE half precision, little-endian at any alignment: nearest, ties to even; too large values
    /// become infinite, NaN stays NaN.
    fn store_f16_bytes(self, value: Self::F32, to: &mut [u8; 32]);
    /// Lanes rounded to bfloat16 in the same way.
    fn store_bf16_bytes(self, value: Self::F32, to: &mut [u8; 32]);
    /// Lanes from unsigned bytes.
    fn load_u8(self, from: &[u8; LANES]) -> Self::F32;
    /// Lanes from signed bytes in two's complement.
    fn load_i8(self, from: &[u8; LANES]) -> Self::F32;
    /// `nibble * scale + offset` (as [`Simd::mul_add`]) of the low and of the high halves of the bytes. `low` and `high`
    /// are scale and offset, each with one value in all lanes.
    fn affine_nibbles(self, from: &[u8; LANES], low: [Self::F32; 2], high: [Self::F32; 2]) -> [Self::F32; 2];
    /// One IEEE half-precision value.
    fn f16(self, bits: [u8; 2]) -> f32;

    /// Four IEEE half-precision values.
    #[inline(always)]
    fn f16_quad(self, from: &[u8; 8]) -> [f32; 4] {
        std::array::from_fn(
            #[inline(always)]
            |i| self.f16([from[2 * i], from[2 * i + 1]]),
        )
    }

    /// `(nibble - 8) * scale` of the low and of the high halves of the bytes. `scale` holds one value in all lanes.
    #[inline(always)]
    fn centred_nibbles(self, from: &[u8; LANES], scale: Self::F32) -> [Self::F32; 2] {
        let affine = [scale, self.mul(scale, self.splat(-8.0))];
        self.affine_nibbles(from, affine, affine)
    }

    /// Calls `body` as a function of its own: of a part of a long kernel the compiler keeps the sums in registers, where in
    /// the whole it would give up.
    #[inline(always)]
    fn apart<R>(self, body: impl FnOnce(Self) -> R) -> R {
        body(self)
    }

    /// Asks for the cache line at `offset` behind the start of `from`, which may lie outside of it.
    #[inline(always)]
    fn prefetch(self, from: &[u8], offset: usize) {
        let _ = (from, offset);
    }

    /// Sums of the lanes of sixteen vectors, each reduced like [`Simd::reduce_add`].
    #[inline(always)]
    fn reduce_add_each(self, vectors: [Self::F32; LANES]) -> [f32; LANES] {
        let mut sums = [0.0; LANES];
        for (sum, vector) in sums.iter_mut().zip(vectors) {
            *sum = self.reduce_add(vector);
        }
        sums
    }

    /// The transposed square: lane `j` of vector `i` becomes lane `i` of vector `j`.
    #[inline(always)]
    fn transpose(self, vectors: [Self::F32; LANES]) -> [Self::F32; LANES] {
        let mut rows = [[0.0; LANES]; LANES];
        for (row, vector) in rows.iter_mut().zip(vectors) {
            self.store(vector, row);
        }
        std::array::from_fn(
            #[inline(always)]
            |j| {
                self.load(&std::array::from_fn(
                    #[inline(always)]
                    |i| rows[i][j],
                ))
            },
        )
    }

    /// Up to sixteen lanes from memory, zeros in the others.
    #[inline(always)]
    fn load_partial(self, from: &[f32]) -> Self::F32 {
        self.load_partial_or(from, 0.0)
    }

    /// Up to sixteen lanes from memory, `fill` in the others.
    #[inline(always)]
    fn load_partial_or(self, from: &[f32], fill: f32) -> Self::F32 {
        let mut lanes = [fill; LANES];
        lanes[..from.len()].copy_from_slice(from);
        self.load(&lanes)
    }

    /// The first lanes to memory, as many as `to` holds.
    #[inline(always)]
    fn store_partial(self, value: Self::F32, to: &mut [f32]) {
        let mut lanes = [0.0; LANES];
        self.store(value, &mut lanes);
        to.copy_from_slice(&lanes[..to.len()]);
    }

    /// Lanes from the first sixteen elements of `from`.
    #[inline(always)]
    fn load_at(self, from: &[f32], offset: usize) -> Self::F32 {
        // The conversion cannot fail: the slice has LANES elements.
        match from[offset..offset + LANES].first_chunk() {
            Some(lanes) => self.load(lanes),
            None => self.splat(0.0),
        }
    }

    /// Lanes to the sixteen elements of `to` from `offset` on.
    #[inline(always)]
    fn store_at(self, value: Self::F32, to: &mut [f32], offset: usize) {
        if let Some(lanes) = to[offset..offset + LANES].first_chunk_mut() {
            self.store(value, lanes);
        }
    }
}
