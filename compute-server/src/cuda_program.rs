//! The program with CUDA, `compute-server-cuda`, beside this one.
//!
//! It needs the driver's library to start at all, so it cannot be the program that everybody starts. The plain program
//! hands over to it where it can start, and otherwise serves by itself and knows the reason.

use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};
use std::sync::OnceLock;

/// What the program with CUDA is called; `scripts/build-cuda` puts it beside this one.
const NAME: &str = "compute-server-cuda";

static REFUSAL: OnceLock<String> = OnceLock::new();

/// Goes on as the program with CUDA, with the same arguments, in the same process. Returns where there is none, where it
/// does not start, and in that program itself.
pub fn hand_over() {
    if cfg!(feature = "cuda") {
        return;
    }
    if let Some(refusal) = attempt() {
        // Asked for once, at the start.
        let _ = REFUSAL.set(refusal);
    }
}

/// Why the program with CUDA did not take over; none where nobody looked for it, or there is none.
pub(crate) fn refusal() -> Option<&'static str> {
    REFUSAL.get().map(String::as_str)
}

fn attempt() -> Option<String> {
    let program = std::env::current_exe().ok()?.with_file_name(NAME);
    if !program.is_file() {
        return None;
    }
    // Started for nothing once: what it lacks is then known before this program is gone.
    let tried = Command::new(&program).arg("--version").stdin(Stdio::null()).output();
    let error = match tried {
        Ok(output) if output.status.success() => Command::new(&program).args(std::env::args_os().skip(1)).exec(),
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            return Some(format!("{NAME} does not start: {}", first_line(&said)));
        }
        Err(error) => error,
    };
    Some(format!("{NAME} does not start: {error}"))
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or("it says nothing")
}
