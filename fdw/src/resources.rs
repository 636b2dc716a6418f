//! State that PostgreSQL holds by a raw pointer, and that must not outlive its (sub)transaction: the End callbacks do
//! not run on an abort, so the transaction callbacks release what they would have.
#![allow(unsafe_code)]

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::c_void;

use pgrx::pg_sys;

struct Entry {
    level: pg_sys::SubTransactionId,
    release: unsafe fn(*mut c_void),
}

thread_local! {
    static OWNED: RefCell<HashMap<usize, Entry>> = RefCell::new(HashMap::new());
}

unsafe fn drop_box<T>(pointer: *mut c_void) {
    // SAFETY: `own` made the pointer from a Box<T>, and its entry is removed before it is released.
    drop(unsafe { Box::from_raw(pointer.cast::<T>()) });
}

/// Gives `state` to the current subtransaction. The pointer is good until `release` or the subtransaction's abort.
pub(crate) fn own<T: 'static>(state: T) -> *mut T {
    let pointer = Box::into_raw(Box::new(state));
    // SAFETY: reads a variable of the backend.
    let level = unsafe { pg_sys::GetCurrentSubTransactionId() };
    OWNED.with_borrow_mut(|owned| {
        owned.insert(
            pointer as usize,
            Entry {
                level,
                release: drop_box::<T>,
            },
        )
    });
    pointer
}

/// Drops what `own` answered, if it has not been dropped yet.
pub(crate) fn release<T>(pointer: *mut T) {
    release_where(|key, _| key == pointer as usize);
}

/// Drops everything that belongs to the aborted subtransaction, or to all of them.
pub(crate) fn abort(level: Option<pg_sys::SubTransactionId>) {
    release_where(|_, entry| level.is_none_or(|level| entry.level == level));
}

/// Gives what belongs to a subtransaction that ended well to its parent.
pub(crate) fn promote(level: pg_sys::SubTransactionId, parent: pg_sys::SubTransactionId) {
    OWNED.with_borrow_mut(|owned| {
        owned
            .values_mut()
            .filter(|entry| entry.level == level)
            .for_each(|entry| entry.level = parent);
    });
}

fn release_where(which: impl Fn(usize, &Entry) -> bool) {
    let gone: Vec<(usize, Entry)> =
        OWNED.with_borrow_mut(|owned| owned.extract_if(|key, entry| which(*key, entry)).collect());
    for (pointer, entry) in gone {
        // SAFETY: the entry was made by `own` for this pointer and is not in the map any more.
        unsafe { (entry.release)(pointer as *mut c_void) };
    }
}
