//! Measurement of the kernels on demand, on one thread and at every level of the machine.
//!
//! A measurement takes about a twentieth of a second. It runs on the calling thread alone, so that models which compute
//! at the same time keep the pool; the figures are those of one thread.

mod list;
mod prepare;

use std::time::{Duration, Instant};

use crate::matmul::Pairs;
use crate::simd::{Level, available, with_level};
use crate::threads;

/// Time that runs of one measurement take, about; one warming run comes before.
const MEASURING: Duration = Duration::from_millis(40);

/// What a figure counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// 10^9 additions and multiplications a second.
    Gflops,
    /// 10^9 bytes, read and written, a second.
    GigabytesPerSecond,
}

impl Unit {
    /// Its usual sign.
    pub const fn name(self) -> &'static str {
        match self {
            Unit::Gflops => "GFLOP/s",
            Unit::GigabytesPerSecond => "GB/s",
        }
    }
}

/// One figure.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measurement {
    /// The kernel, as its function is called.
    pub kernel: &'static str,
    /// Its sizes: of products `[m, k, n]`, of attention `[tokens, heads, head_dim]`, of the head `[tokens, width,
    /// vocabulary]`, otherwise of the output.
    pub shape: &'static [usize],
    /// Type of its weights, or of both operands.
    pub dtype: &'static str,
    /// The level, or `avx512_vnni` and `avx512_bf16` for products by those instructions.
    pub variant: &'static str,
    /// The rate of the fastest run.
    pub value: f64,
    /// What the rate counts.
    pub unit: Unit,
    /// The rate over that of the portable level.
    pub ratio_to_portable: f64,
}

/// How a kernel is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Variant {
    Level(Level),
    Pairs(Pairs),
}

impl Variant {
    fn name(self) -> &'static str {
        match self {
            Variant::Level(level) => level.name(),
            Variant::Pairs(pairs) => pairs.name(),
        }
    }
}

/// A kernel at one shape.
struct Benchmark {
    kernel: &'static str,
    shape: &'static [usize],
    dtype: &'static str,
    unit: Unit,
    /// Operations or bytes of a run.
    amount: f64,
    /// Makes the data, and what runs the kernel on it.
    prepare: fn(&Benchmark, Variant) -> Box<dyn FnMut()>,
}

impl Benchmark {
    fn variants(&self) -> Vec<Variant> {
        let levels = available().into_iter().map(Variant::Level);
        let pairs = match self.kernel {
            "matmul" => Pairs::available(self.dtype),
            _ => vec![],
        };
        levels.chain(pairs.into_iter().map(Variant::Pairs)).collect()
    }

    /// Amount a second.
    fn rate(&self, variant: Variant) -> f64 {
        let level = match variant {
            Variant::Level(level) => level,
            Variant::Pairs(_) => Level::Avx512,
        };
        let seconds = with_level(level, || threads::alone(|| fastest((self.prepare)(self, variant))));
        self.amount / seconds / 1e9
    }
}

/// Seconds of the fastest of some runs, after one that warms caches and pages.
fn fastest(mut run: impl FnMut()) -> f64 {
    run();
    let (begin, mut fastest) = (Instant::now(), f64::INFINITY);
    while fastest.is_infinite() || begin.elapsed() < MEASURING {
        let start = Instant::now();
        run();
        fastest = fastest.min(start.elapsed().as_secs_f64());
    }
    fastest.max(1e-9)
}

/// The kernels that can be measured.
pub fn kernels() -> Vec<&'static str> {
    let mut names: Vec<_> = list::BENCHMARKS.iter().map(|benchmark| benchmark.kernel).collect();
    names.dedup();
    names
}

/// Number of measurements that [`measure`] would make of these kernels.
pub fn count(wanted: &dyn Fn(&str) -> bool) -> usize {
    let benchmarks = list::BENCHMARKS.iter().filter(|benchmark| wanted(benchmark.kernel));
    benchmarks.map(|benchmark| benchmark.variants().len()).sum()
}

/// Measures the kernels that `wanted` names, and hands over each figure, the portable level's of each shape first; stops
/// where `each` answers false.
pub fn measure(wanted: &dyn Fn(&str) -> bool, each: &mut dyn FnMut(Measurement) -> bool) {
    for benchmark in list::BENCHMARKS.iter().filter(|benchmark| wanted(benchmark.kernel)) {
        let mut portable = f64::NAN;
        for variant in benchmark.variants() {
            let value = benchmark.rate(variant);
            if variant == Variant::Level(Level::Portable) {
                portable = value;
            }
            let measurement = Measurement {
                kernel: benchmark.kernel,
                shape: benchmark.shape,
                dtype: benchmark.dtype,
                variant: variant.name(),
                value,
                unit: benchmark.unit,
                ratio_to_portable: value / portable,
            };
            if !each(measurement) {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_variant_of_a_kernel_is_measured_once_and_the_portable_first() {
        let mut figures = vec![];
        measure(&|kernel| kernel == "rms_norm", &mut |figure| {
            figures.push(figure);
            true
        });
        assert_eq!(figures.len(), count(&|kernel| kernel == "rms_norm"));
        let variants: Vec<_> = figures.iter().map(|figure| figure.variant).collect();
        let levels: Vec<_> = available().into_iter().map(Level::name).collect();
        assert_eq!(variants, levels);
        assert_eq!(figures[0].ratio_to_portable, 1.0);
        assert!(
            figures
                .iter()
                .all(|figure| figure.value > 0.0 && figure.value.is_finite())
        );
    }

    #[test]
    fn measuring_stops_when_told() {
        let mut seen = 0;
        measure(&|_| true, &mut |_| {
            seen += 1;
            seen < 2
        });
        assert_eq!(seen, 2);
    }

    #[test]
    fn every_kernel_runs_in_every_variant() {
        for benchmark in list::BENCHMARKS {
            for variant in benchmark.variants() {
                let mut run = (benchmark.prepare)(benchmark, variant);
                with_level(available()[0], || threads::alone(&mut run));
            }
        }
        assert!(kernels().len() > 10);
    }
}
