//! Detection of the instruction-set level and its override by the environment.

use std::cell::Cell;
use std::fmt;
use std::sync::OnceLock;

/// Name of the environment variable that lowers the level.
const VARIABLE: &str = "COMPUTE_SERVER_SIMD";

/// An instruction-set level that kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Level {
    /// What the compilation target guarantees; the oracle of the others.
    Portable,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// x86-64 with AVX-512 F, BW, VL and DQ.
    Avx512,
    /// aarch64 with NEON. The same generic bodies; checked by the compiler, but never run.
    Neon,
}

impl Level {
    const ALL: [Level; 4] = [Level::Portable, Level::Avx2, Level::Avx512, Level::Neon];

    /// The name that `COMPUTE_SERVER_SIMD` takes.
    pub const fn name(self) -> &'static str {
        match self {
            Level::Portable => "portable",
            Level::Avx2 => "avx2",
            Level::Avx512 => "avx512",
            Level::Neon => "neon",
        }
    }

    /// Whether this machine can run the level.
    pub fn is_available(self) -> bool {
        match self {
            Level::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => {
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => {
                Level::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512dq")
            }
            #[cfg(target_arch = "aarch64")]
            Level::Neon => std::arch::is_aarch64_feature_detected!("neon"),
            #[allow(unreachable_patterns)]
            _ => false,
        }
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// `COMPUTE_SERVER_SIMD` asked for a level that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LevelError {
    requested: String,
    known: bool,
}

impl fmt::Display for LevelError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = available().into_iter().map(Level::name).collect();
        let problem = if self.known {
            "is not supported by this machine"
        } else {
            "is not a known level"
        };
        write!(
            f,
            "{VARIABLE}={} {problem}; use one of {}, or unset it",
            self.requested,
            names.join(", ")
        )
    }
}

impl std::error::Error for LevelError {}

/// The levels this machine can run, plainest first.
pub fn available() -> Vec<Level> {
    Level::ALL.into_iter().filter(|level| level.is_available()).collect()
}

/// Finds the level, honouring `COMPUTE_SERVER_SIMD` (`portable`, `avx2`, `avx512`, `neon`). A server calls this once at
/// its start to report a bad value.
///
/// # Errors
/// Where the variable names an unknown level or one this machine cannot run.
pub fn initialize() -> Result<Level, LevelError> {
    static LEVEL: OnceLock<Result<Level, LevelError>> = OnceLock::new();
    LEVEL
        .get_or_init(|| choose(std::env::var(VARIABLE).ok().as_deref()))
        .clone()
}

thread_local! {
    /// What [`with_level`] chose for this thread.
    static CHOSEN: Cell<Option<Level>> = const { Cell::new(None) };
}

/// The level that kernels use: [`initialize`]'s, or `Portable` where that failed.
pub fn level() -> Level {
    static LEVEL: OnceLock<Level> = OnceLock::new();
    match CHOSEN.get() {
        Some(level) => level,
        None => *LEVEL.get_or_init(|| initialize().unwrap_or(Level::Portable)),
    }
}

/// Calls `body`, whose kernels use another level.
///
/// # Panics
/// Where the machine lacks it.
pub(crate) fn with_level<R>(level: Level, body: impl FnOnce() -> R) -> R {
    struct Before(Option<Level>);
    impl Drop for Before {
        fn drop(&mut self) {
            CHOSEN.set(self.0);
        }
    }
    assert!(level.is_available(), "this machine has no {level}");
    let _before = Before(CHOSEN.replace(Some(level)));
    body()
}

/// The level for a given value of the variable.
fn choose(requested: Option<&str>) -> Result<Level, LevelError> {
    let Some(requested) = requested.map(str::trim).filter(|name| !name.is_empty()) else {
        return Ok(available().last().copied().unwrap_or(Level::Portable));
    };
    let known = Level::ALL.into_iter().find(|level| level.name() == requested);
    match known {
        Some(level) if level.is_available() => Ok(level),
        _ => Err(LevelError {
            requested: requested.to_owned(),
            known: known.is_some(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_level_is_chosen_without_a_request() {
        assert_eq!(choose(None), Ok(*available().last().unwrap()));
        assert_eq!(choose(Some("")), choose(None));
    }

    #[test]
    fn a_request_is_honoured_or_refused_with_the_choices() {
        assert_eq!(choose(Some("portable")), Ok(Level::Portable));
        let message = choose(Some("sse9")).unwrap_err().to_string();
        assert!(
            message.contains("COMPUTE_SERVER_SIMD=sse9 is not a known level"),
            "{message}"
        );
        assert!(message.contains("portable"), "{message}");
    }

    #[test]
    fn an_unsupported_level_is_refused() {
        for level in Level::ALL.into_iter().filter(|level| !level.is_available()) {
            let message = choose(Some(level.name())).unwrap_err().to_string();
            assert!(message.contains("not supported by this machine"), "{message}");
        }
    }
}
