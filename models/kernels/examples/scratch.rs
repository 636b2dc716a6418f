#![allow(unsafe_code, missing_docs)]
use candle_kernels_cpu::{MatrixRef, matmul, threads};
use std::time::Instant;
fn best(mut run: impl FnMut()) -> f64 {
    run();
    let (begin, mut best) = (Instant::now(), f64::INFINITY);
    while begin.elapsed().as_millis() < 1200 {
        let start = Instant::now();
        run();
        best = best.min(start.elapsed().as_secs_f64());
    }
    best
}
fn values(length: usize) -> Vec<f32> {
    (0..length)
        .map(|i| ((i * 7919 % 2003) as f32 - 1001.0) / 1001.0)
        .collect()
}
fn main() {
    threads::set(1);
    for (m, k, n) in [
        (1024, 768, 3072),
        (1024, 3072, 768),
        (1024, 768, 768),
        (333, 768, 50257),
    ] {
        let (a, b) = (values(m * k), values(k * n));
        let mut out = vec![0.0f32; m * n];
        let gf = |s: f64| 2.0 * (m * k * n) as f64 / s / 1e9;
        for (name, ta, tb) in [("nn", false, false), ("nt", false, true), ("tn", true, false)] {
            let va = if ta {
                MatrixRef::new(&a, k, m).transpose()
            } else {
                MatrixRef::new(&a, m, k)
            };
            let vb = if tb {
                MatrixRef::new(&b, n, k).transpose()
            } else {
                MatrixRef::new(&b, k, n)
            };
            let own = gf(best(|| matmul(va, vb, false, &mut out)));
            let (ars, acs) = if ta { (1, m as isize) } else { (k as isize, 1) };
            let (brs, bcs) = if tb { (1, k as isize) } else { (n as isize, 1) };
            let theirs = gf(best(|| unsafe {
                gemm::gemm(
                    m,
                    n,
                    k,
                    out.as_mut_ptr(),
                    1,
                    n as isize,
                    false,
                    a.as_ptr(),
                    acs,
                    ars,
                    b.as_ptr(),
                    bcs,
                    brs,
                    1.0,
                    1.0,
                    false,
                    false,
                    false,
                    gemm::Parallelism::None,
                )
            }));
            println!("{m}x{k}x{n} {name}: own {own:.1} gemm {theirs:.1} GF/s");
        }
    }
}
