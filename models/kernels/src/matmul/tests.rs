use half::{bf16, f16};

use super::*;
use crate::simd::available;
use crate::test_util::{assert_close, random};
use crate::threads;

/// The products of `a` `[m, k]` and `b` `[k, n]` in double precision.
fn oracle(a: &[f32], b: &[f32], [m, k, n]: [usize; 3]) -> Vec<f32> {
    let product = |i: usize| {
        (0..k)
            .map(|l| f64::from(a[i / n * k + l]) * f64::from(b[l * n + i % n]))
            .sum::<f64>()
    };
    (0..m * n).map(|i| product(i) as f32).collect()
}

fn stored_transposed<T: Copy>(x: &[T], rows: usize, columns: usize) -> Vec<T> {
    (0..x.len()).map(|i| x[i % rows * columns + i / rows]).collect()
}

/// Both orders in memory of one matrix.
fn orders<'a, T>(
    [plain, transposed]: [&'a [T]; 2],
    view: impl Fn(&'a [T], usize, usize) -> MatrixRef<'a>,
    [rows, columns]: [usize; 2],
) -> [MatrixRef<'a>; 2] {
    [view(plain, rows, columns), view(transposed, columns, rows).transpose()]
}

const SHAPES: [[usize; 3]; 6] = [
    [1, 1, 1],
    [7, 33, 5],
    [65, 7, 130],
    [130, 401, 49],
    [3, 0, 2],
    [9, 800, 17],
];

#[test]
fn products_of_all_orders_agree_with_the_definition_at_every_level() {
    for shape @ [m, k, n] in SHAPES {
        let (a, b, start) = (random(m * k, 1), random(k * n, 2), random(m * n, 3));
        let want = oracle(&a, &b, shape);
        let added: Vec<f32> = want.iter().zip(&start).map(|(want, start)| want + start).collect();
        let (a_turned, b_turned) = (stored_transposed(&a, m, k), stored_transposed(&b, k, n));
        for level in available() {
            for a in orders([&a, &a_turned], MatrixRef::new, [m, k]) {
                for b in orders([&b, &b_turned], MatrixRef::new, [k, n]) {
                    if k > 0 {
                        let mut out = start.clone();
                        blocks::product(tile::Widened(level), a, b, true, &mut out);
                        assert_close(&out, &added, 2e-5);
                    }
                    let mut out = start.clone();
                    matmul_with(level, a, b, false, &mut out);
                    assert_close(&out, &want, 2e-5);
                    let mut out = start.clone();
                    matmul_with(level, a, b, true, &mut out);
                    assert_close(&out, &added, 2e-5);
                }
            }
        }
    }
}

fn rounded(x: Vec<f32>) -> (Vec<bf16>, Vec<f32>) {
    let half: Vec<bf16> = x.into_iter().map(bf16::from_f32).collect();
    let wide = half.iter().map(|value| value.to_f32()).collect();
    (half, wide)
}

/// Every way to multiply two half matrices that the machine has.
fn half_products(a: MatrixRef<'_>, b: MatrixRef<'_>, length: usize) -> Vec<Vec<f32>> {
    let mut products = vec![];
    let mut add = |product: &dyn Fn(&mut [f32])| {
        let mut out = vec![1.0; length];
        product(&mut out);
        products.push(out);
    };
    for level in available() {
        add(&|out| blocks::product(tile::Widened(level), a, b, true, out));
    }
    let dtype = if a.is_bf16() && b.is_bf16() { "bf16" } else { "f16" };
    for pairs in Pairs::available(dtype) {
        add(&|out| pairs.product(a, b, true, out));
    }
    products
}

#[test]
fn products_of_bf16_agree_in_every_way() {
    for shape @ [m, k, n] in SHAPES.into_iter().filter(|shape| shape[1] > 0) {
        let ((a, wide_a), (b, wide_b)) = (rounded(random(m * k, 1)), rounded(random(k * n, 2)));
        let want: Vec<f32> = oracle(&wide_a, &wide_b, shape).iter().map(|x| x + 1.0).collect();
        let (a_turned, b_turned) = (stored_transposed(&a, m, k), stored_transposed(&b, k, n));
        for a in orders([&a, &a_turned], MatrixRef::bf16, [m, k]) {
            for b in orders([&b, &b_turned], MatrixRef::bf16, [k, n]) {
                for out in half_products(a, b, m * n) {
                    // An integer's error is at most 2^-13, a term's twice that, and the errors' signs are random.
                    assert_close(&out, &want, 2.5e-4 * (k as f32).sqrt());
                }
            }
        }
    }
}

#[test]
fn values_of_four_octaves_are_multiplied_exactly() {
    let [m, k, n] = [19, 700, 53];
    // Sums of such products are exact in f32 too.
    let values = |count: usize, seed: u64| random(count, seed).iter().map(|x| (x * 128.0).round() / 8.0).collect();
    let ((a, wide_a), (b, wide_b)) = (rounded(values(m * k, 1)), rounded(values(k * n, 2)));
    let want: Vec<f32> = oracle(&wide_a, &wide_b, [m, k, n]).iter().map(|x| x + 1.0).collect();
    for out in half_products(MatrixRef::bf16(&a, m, k), MatrixRef::bf16(&b, k, n), m * n) {
        assert_eq!(out, want);
    }
}

#[test]
fn values_that_are_not_finite_stay_visible_and_extreme_ones_do_not_overflow() {
    let (k, n) = (300, 3);
    let column = vec![bf16::from_f32(0.5); k * n];
    for bad in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
        let mut row = vec![bf16::ONE; k];
        row[130] = bf16::from_f32(bad);
        for out in half_products(MatrixRef::bf16(&row, 1, k), MatrixRef::bf16(&column, k, n), n) {
            assert!(out.iter().all(|x| !x.is_finite()), "{out:?}");
        }
    }
    // The largest integers everywhere, and the largest and smallest numbers.
    for (x, y) in [
        (255.0, -255.0),
        (2f32.powi(127), 2f32.powi(-126)),
        (2f32.powi(-100), 2f32.powi(100)),
        (0.0, 1.0),
    ] {
        let (a, b) = (vec![bf16::from_f32(x); k], vec![bf16::from_f32(y); k * n]);
        for out in half_products(MatrixRef::bf16(&a, 1, k), MatrixRef::bf16(&b, k, n), n) {
            assert_close(&out, &[k as f32 * x * y + 1.0; 3], 1e-5);
        }
    }
}

#[test]
fn half_operands_are_those_of_their_widened_values() {
    for shape @ [m, k, n] in SHAPES {
        let a: Vec<bf16> = random(m * k, 1).into_iter().map(bf16::from_f32).collect();
        let b: Vec<f16> = random(k * n, 2).into_iter().map(f16::from_f32).collect();
        let wide_a: Vec<f32> = a.iter().map(|value| value.to_f32()).collect();
        let wide_b: Vec<f32> = b.iter().map(|value| value.to_f32()).collect();
        let want = oracle(&wide_a, &wide_b, shape);
        let (a_turned, b_turned) = (stored_transposed(&a, m, k), stored_transposed(&b, k, n));
        for level in available() {
            for a in orders([&a, &a_turned], MatrixRef::bf16, [m, k]) {
                for b in orders([&b, &b_turned], MatrixRef::f16, [k, n]) {
                    let mut out = vec![f32::NAN; m * n];
                    matmul_with(level, a, b, false, &mut out);
                    assert_close(
                        &out,
                        &want,
                        if level == Level::Avx512 {
                            2.5e-4 * (k as f32).sqrt()
                        } else {
                            2e-5
                        },
                    );
                }
            }
        }
    }
}

/// Shapes whose even pieces would leave a row or a column alone among them.
#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let _turn = threads::turn();
    for [m, k, n] in [
        [300, 500, 900],
        [1025, 30, 49],
        [129, 700, 1441],
        [1, 40, 2000],
        [2049, 9, 1],
    ] {
        let (a, b) = (random(m * k, 1), random(k * n, 2));
        let half: Vec<bf16> = b.iter().copied().map(bf16::from_f32).collect();
        let product = |count: usize| {
            threads::set(count);
            let (mut out, mut of_half) = (vec![0.0; m * n], vec![0.0; m * n]);
            let a = MatrixRef::new(&a, m, k);
            matmul(a, MatrixRef::new(&b, k, n), false, &mut out);
            matmul(a, MatrixRef::bf16(&half, k, n), false, &mut of_half);
            [out, of_half]
        };
        let one = product(1);
        for count in [2, 3, 7, 16] {
            assert_eq!(one, product(count), "[{m}, {k}] times [{k}, {n}] on {count} threads");
        }
    }
    threads::set(0);
}

#[test]
#[should_panic(expected = "[2, 3] times [2, 2]")]
fn unfitting_shapes_are_named() {
    matmul(
        MatrixRef::new(&[0.0; 6], 2, 3),
        MatrixRef::new(&[0.0; 4], 2, 2),
        false,
        &mut [0.0; 4],
    );
}

#[test]
fn groups_are_the_same_as_each_alone() {
    let shapes = SHAPES.map(|[m, k, n]| (random(m * k, 1), random(k * n, 2), [m, k, n]));
    for accumulate in [false, true] {
        let mut outputs: Vec<Vec<f32>> = shapes.iter().map(|(_, _, [m, _, n])| random(m * n, 3)).collect();
        let groups = shapes
            .iter()
            .zip(&mut outputs)
            .map(|((a, b, [m, k, n]), out)| MatmulGroup {
                a: MatrixRef::new(a, *m, *k),
                b: MatrixRef::new(b, *k, *n),
                out,
            });
        matmul_groups(groups.collect(), accumulate);
        for ((a, b, [m, k, n]), found) in shapes.iter().zip(&outputs) {
            let mut alone = random(m * n, 3);
            matmul(
                MatrixRef::new(a, *m, *k),
                MatrixRef::new(b, *k, *n),
                accumulate,
                &mut alone,
            );
            assert_eq!(*found, alone);
        }
    }
}
