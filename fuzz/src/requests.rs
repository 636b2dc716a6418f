//! Calls of the server, through everything that a call goes through.

use std::sync::{Mutex, OnceLock, PoisonError};

use compute_server::in_process::InProcess;

static SERVER: OnceLock<Mutex<InProcess>> = OnceLock::new();

/// Calls a method with a message: the first line names the method, or its first byte chooses one, and the rest is the
/// message.
pub fn run(data: &[u8]) {
    let Some(choice) = data.first() else { return };
    let end = data.iter().position(|byte| *byte == b'\n').unwrap_or(0);
    let (name, message) = (&data[..end], &data[end + 1..]);
    let server = SERVER.get_or_init(|| {
        let started = InProcess::start(&crate::files::folder("server"));
        Mutex::new(started.unwrap_or_else(|error| panic!("the server does not start: {error}")))
    });
    let server = server.lock().unwrap_or_else(PoisonError::into_inner);
    let methods = server.methods();
    let named = |path: &&&str| path.rsplit('/').next().map(str::as_bytes) == Some(name);
    let method = methods
        .iter()
        .find(named)
        .unwrap_or(&methods[usize::from(*choice) % methods.len()]);
    let answer = server.call(method, message);
    assert!(
        !answer.is_defect(),
        "{method} answers {answer:?} to {} bytes",
        message.len()
    );
}
