//! Preloaded (`LD_PRELOAD`) into a process, kills it by SIGKILL just before its n-th change of files below a folder: the
//! opening of a file for writing, a write, flush, truncation, rename, link, removal, or new folder. Of a write half is
//! done. Nothing in the program itself is changed or knows of it.
//!
//! | variable | meaning |
//! | --- | --- |
//! | `KILL_POINTS_FOLDER` | the folder, absolute, without links |
//! | `KILL_POINTS_ARMED` | changes count as soon as this file exists |
//! | `KILL_POINTS_AT` | which change kills, from 1 |
//!
//! What it kills at is said on stderr: `killed at rename`.
#![cfg(target_os = "linux")]
#![allow(unsafe_code)]

use std::ffi::{CStr, CString, OsStr, c_char, c_int, c_uint, c_void};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

unsafe extern "C" {
    fn dlsym(handle: *mut c_void, name: *const c_char) -> *mut c_void;
    fn access(path: *const c_char, mode: c_int) -> c_int;
    fn readlink(path: *const c_char, buffer: *mut c_char, size: usize) -> isize;
    fn getpid() -> c_int;
    fn kill(process: c_int, signal: c_int) -> c_int;
    fn pause() -> c_int;
}

/// glibc's `RTLD_NEXT`: the definition after this library's.
const NEXT: *mut c_void = -1isize as *mut c_void;
/// `AT_FDCWD`.
const WORKING_DIRECTORY: c_int = -100;
/// `O_WRONLY | O_RDWR | O_CREAT`.
const WRITING: c_int = 0o103;
const SIGKILL: c_int = 9;

struct Plan {
    folder: PathBuf,
    armed: CString,
    at: u64,
}

static CHANGES: AtomicU64 = AtomicU64::new(0);

/// What the environment asks for; none without it.
fn plan() -> Option<&'static Plan> {
    static PLAN: OnceLock<Option<Plan>> = OnceLock::new();
    let read = || {
        Some(Plan {
            folder: std::env::var_os("KILL_POINTS_FOLDER")?.into(),
            armed: CString::new(std::env::var_os("KILL_POINTS_ARMED")?.into_vec()).ok()?,
            at: std::env::var("KILL_POINTS_AT").ok()?.parse().ok()?,
        })
    };
    PLAN.get_or_init(read).as_ref()
}

/// Whether the change of a file that `path` finds is the one.
fn is_reached(path: impl FnOnce() -> Option<PathBuf>) -> bool {
    let Some(plan) = plan() else { return false };
    // SAFETY: a string that ends in 0.
    let armed = unsafe { access(plan.armed.as_ptr(), 0) } == 0;
    armed
        && path().is_some_and(|path| path.starts_with(&plan.folder))
        && CHANGES.fetch_add(1, Ordering::SeqCst) + 1 == plan.at
}

fn end(operation: &str) -> ! {
    eprintln!("killed at {operation}");
    loop {
        // SAFETY: no memory is involved.
        unsafe {
            kill(getpid(), SIGKILL);
            pause();
        }
    }
}

fn check(operation: &str, path: impl FnOnce() -> Option<PathBuf>) {
    if is_reached(path) {
        end(operation);
    }
}

/// The path that a caller gave.
///
/// # Safety
/// `path` is null or ends in 0, as the C library asks for.
unsafe fn given(path: *const c_char) -> Option<PathBuf> {
    if path.is_null() {
        return None;
    }
    // SAFETY: the caller's promise.
    let path = unsafe { CStr::from_ptr(path) };
    Some(PathBuf::from(OsStr::from_bytes(path.to_bytes())))
}

/// The path of an open file.
fn path_of(file: c_int) -> Option<PathBuf> {
    let link = CString::new(format!("/proc/self/fd/{file}")).ok()?;
    let mut buffer = [0u8; 4096];
    // SAFETY: the buffer has the size that is given.
    let length = unsafe { readlink(link.as_ptr(), buffer.as_mut_ptr().cast(), buffer.len()) };
    let length = usize::try_from(length).ok()?;
    Some(PathBuf::from(OsStr::from_bytes(&buffer[..length])))
}

/// A path that is relative to an open folder.
fn path_at(folder: c_int, path: Option<PathBuf>) -> Option<PathBuf> {
    let path = path?;
    match path.is_absolute() || folder == WORKING_DIRECTORY {
        true => Some(path),
        false => Some(path_of(folder)?.join(Path::new(&path))),
    }
}

/// The C library's own function of that name and type.
macro_rules! next {
    ($name:ident: $type:ty) => {{
        static FOUND: OnceLock<usize> = OnceLock::new();
        let found = *FOUND.get_or_init(|| {
            // SAFETY: the name ends in 0.
            unsafe { dlsym(NEXT, concat!(stringify!($name), "\0").as_ptr().cast()) as usize }
        });
        assert!(found != 0, stringify!($name));
        // SAFETY: the C library's function of this name has this type.
        unsafe { std::mem::transmute::<usize, $type>(found) }
    }};
}

/// Functions that change something at the path that `$path` gives, and are otherwise the C library's.
macro_rules! changing {
    ($($name:ident($($argument:ident: $type:ty),*) at $path:expr;)*) => {$(
        /// The C library's, which kills if it is time.
        ///
        /// # Safety
        /// As the C library's.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($argument: $type),*) -> c_int {
            check(stringify!($name), || $path);
            let next = next!($name: unsafe extern "C" fn($($type),*) -> c_int);
            // SAFETY: the caller's promise.
            unsafe { next($($argument),*) }
        }
    )*};
}

changing! {
    fsync(file: c_int) at path_of(file);
    fdatasync(file: c_int) at path_of(file);
    ftruncate64(file: c_int, length: i64) at path_of(file);
    rename(from: *const c_char, to: *const c_char) at
        // SAFETY: the caller's promise.
        unsafe { given(to) };
    link(from: *const c_char, to: *const c_char) at
        // SAFETY: the caller's promise.
        unsafe { given(to) };
    linkat(from_folder: c_int, from: *const c_char, folder: c_int, to: *const c_char, flags: c_int) at
        // SAFETY: the caller's promise.
        path_at(folder, unsafe { given(to) });
    unlink(path: *const c_char) at
        // SAFETY: the caller's promise.
        unsafe { given(path) };
    unlinkat(folder: c_int, path: *const c_char, flags: c_int) at
        // SAFETY: the caller's promise.
        path_at(folder, unsafe { given(path) });
    rmdir(path: *const c_char) at
        // SAFETY: the caller's promise.
        unsafe { given(path) };
    mkdir(path: *const c_char, mode: c_uint) at
        // SAFETY: the caller's promise.
        unsafe { given(path) };
}

/// Functions that open a file. The C library's take the mode as an optional argument, which is passed as here.
macro_rules! opening {
    ($($name:ident($($folder:ident)?);)*) => {$(
        /// The C library's, which kills if the file is to be written and it is time.
        ///
        /// # Safety
        /// As the C library's.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($folder: c_int,)? path: *const c_char, flags: c_int, mode: c_uint) -> c_int {
            if flags & WRITING != 0 {
                let folder = WORKING_DIRECTORY;
                $(let folder = { let _ = folder; $folder };)?
                // SAFETY: the caller's promise.
                check("open", || path_at(folder, unsafe { given(path) }));
            }
            type Open = unsafe extern "C" fn($(opening!(@type $folder),)? *const c_char, c_int, ...) -> c_int;
            let next = next!($name: Open);
            // SAFETY: the caller's promise.
            unsafe { next($($folder,)? path, flags, mode) }
        }
    )*};
    (@type $folder:ident) => { c_int };
}

opening! {
    open();
    open64();
    openat(folder);
    openat64(folder);
}

/// The C library's, which does half of it and kills if it is time.
///
/// # Safety
/// As the C library's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn write(file: c_int, data: *const c_void, size: usize) -> isize {
    let next = next!(write: unsafe extern "C" fn(c_int, *const c_void, usize) -> isize);
    if is_reached(|| path_of(file)) {
        // SAFETY: the caller's promise, for less.
        unsafe { next(file, data, size / 2) };
        end("write");
    }
    // SAFETY: the caller's promise.
    unsafe { next(file, data, size) }
}
