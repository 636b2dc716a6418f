//! Run-time choice of instruction set, and the sixteen-lane vectors that every kernel is written in.
//!
//! A kernel's body is one generic function over `Simd`; `dispatch!` compiles it once per [`Level`] and calls the one
//! asked for. The level is found once per process and can be lowered with `COMPUTE_SERVER_SIMD`.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod lanes;
mod level;
pub(crate) mod math;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512;
pub(crate) use lanes::{LANES, Simd};
#[cfg(target_arch = "aarch64")]
pub(crate) use neon::Neon;
pub(crate) use portable::Portable;

pub(crate) use level::with_level;
pub use level::{Level, LevelError, available, initialize, level};

/// Calls a generic kernel body, whose first argument is the [`Simd`] token, compiled for the given level.
///
/// The body must be `#[inline(always)]`, otherwise it is compiled without the level's instructions.
macro_rules! dispatch {
    ($level:expr, $body:ident $(::<$($generic:ty),+>)? ($($argument:expr),* $(,)?)) => {
        match $level {
            #[cfg(target_arch = "x86_64")]
            $crate::simd::Level::Avx512 => {
                $crate::simd::Avx512::run(#[inline(always)] |simd| $body $(::<$($generic),+, _>)? (simd, $($argument),*))
            }
            #[cfg(target_arch = "x86_64")]
            $crate::simd::Level::Avx2 => {
                $crate::simd::Avx2::run(#[inline(always)] |simd| $body $(::<$($generic),+, _>)? (simd, $($argument),*))
            }
            #[cfg(target_arch = "aarch64")]
            $crate::simd::Level::Neon => {
                $crate::simd::Neon::run(#[inline(always)] |simd| $body $(::<$($generic),+, _>)? (simd, $($argument),*))
            }
            _ => $body $(::<$($generic),+, _>)? ($crate::simd::Portable, $($argument),*),
        }
    };
}
pub(crate) use dispatch;
