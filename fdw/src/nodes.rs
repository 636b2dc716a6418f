//! Small readers of PostgreSQL's lists and nodes.
#![allow(unsafe_code)]

use pgrx::pg_sys;

/// The pointers of a list.
///
/// # Safety
/// `list` is NIL or a list of pointers to `T`.
pub(crate) unsafe fn items<T>(list: *mut pg_sys::List) -> Vec<*mut T> {
    if list.is_null() {
        return Vec::new();
    }
    // SAFETY: a list has `length` elements; the caller says that they are pointers to T.
    unsafe {
        (0..(*list).length as usize)
            .map(|index| (*(*list).elements.add(index)).ptr_value.cast())
            .collect()
    }
}

/// The numbers of an integer list.
///
/// # Safety
/// `list` is NIL or an integer list.
pub(crate) unsafe fn integers(list: *mut pg_sys::List) -> Vec<i32> {
    if list.is_null() {
        return Vec::new();
    }
    // SAFETY: a list has `length` elements; the caller says that they are integers.
    unsafe {
        (0..(*list).length as usize)
            .map(|index| (*(*list).elements.add(index)).int_value)
            .collect()
    }
}

/// An integer list, in the current memory context.
pub(crate) fn integer_list(numbers: impl IntoIterator<Item = i32>) -> *mut pg_sys::List {
    let mut list = std::ptr::null_mut();
    for number in numbers {
        // SAFETY: `list` is NIL or the list made by the call before.
        list = unsafe { pg_sys::lappend_int(list, number) };
    }
    list
}

/// A node of PostgreSQL's, all zeros but for its tag, in the current memory context.
///
/// # Safety
/// `T` begins with a node tag and may be all zeros.
pub(crate) unsafe fn make_node<T>(tag: pg_sys::NodeTag) -> *mut T {
    // SAFETY: the memory is large enough, and the caller says that a tag comes first.
    unsafe {
        let node = pg_sys::palloc0(size_of::<T>());
        node.cast::<pg_sys::NodeTag>().write(tag);
        node.cast()
    }
}
