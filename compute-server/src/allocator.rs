//! The allocator: mimalloc, told to keep the pages that are freed.
//!
//! A training step frees and allocates the same few gigabytes; giving the pages back to the system in between costs a
//! quarter of the step in page faults.
#![allow(unsafe_code)]

use std::ffi::{c_int, c_long};

use mimalloc::MiMalloc;

#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

/// `mi_option_purge_delay` of mimalloc's `mi_option_e`.
const PURGE_DELAY: c_int = 15;

unsafe extern "C" {
    /// mimalloc's `mi_option_set`, which the library linked by the crate `mimalloc` exports.
    fn mi_option_set(option: c_int, value: c_long);
}

/// Never gives freed pages back, unless the environment (`MIMALLOC_PURGE_DELAY`, in milliseconds) says otherwise.
pub(crate) fn keep_pages() {
    if std::env::var_os("MIMALLOC_PURGE_DELAY").is_none() {
        // SAFETY: the function takes two integers, writes one word of the library's options, and may be called at any
        // time; the option's number exists in every version of mimalloc since 2.1.
        unsafe { mi_option_set(PURGE_DELAY, -1) };
    }
}
