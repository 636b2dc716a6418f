//! The kernels that are measured, with shapes of GPT-2 and sizes that take a few milliseconds.

use super::{Benchmark, Unit, prepare};

/// The benchmarks, those of one kernel next to each other.
pub(super) const BENCHMARKS: &[Benchmark] = &[
    product("f32"),
    product("bf16"),
    product("f16"),
    linear("f32", VECTOR_PRODUCT, 32.0),
    linear("bf16", VECTOR_PRODUCT, 16.0),
    linear("f16", VECTOR_PRODUCT, 16.0),
    linear("q4_0", VECTOR_PRODUCT, 4.5),
    linear("q4_1", VECTOR_PRODUCT, 5.0),
    linear("q8_0", VECTOR_PRODUCT, 8.5),
    linear("q4_k", VECTOR_PRODUCT, 4.5),
    linear("q6_k", VECTOR_PRODUCT, 6.5625),
    linear("f32", BATCH_PRODUCT, 32.0),
    linear("bf16", BATCH_PRODUCT, 16.0),
    linear("q4_1", BATCH_PRODUCT, 5.0),
    linear("q4_k", BATCH_PRODUCT, 4.5),
    // Two products over half of the square of tokens, and five.
    flops("attention_forward", ATTENTION, 2.0 * SQUARE, prepare::attention_forward),
    flops(
        "attention_backward",
        ATTENTION,
        5.0 * SQUARE,
        prepare::attention_backward,
    ),
    flops("cross_entropy_head", HEAD, 6.0 * of(HEAD), prepare::cross_entropy_head),
    bytes("layer_norm", ROWS, 8.0, prepare::layer_norm),
    bytes("layer_norm_backward", ROWS, 16.0, prepare::layer_norm_backward),
    bytes("rms_norm", ROWS, 8.0, prepare::rms_norm),
    bytes("gelu_tanh", WIDE_ROWS, 8.0, prepare::gelu_tanh),
    bytes("gelu_tanh_backward", WIDE_ROWS, 12.0, prepare::gelu_tanh_backward),
    bytes("silu_gate", WIDE_ROWS, 12.0, prepare::silu_gate),
    bytes("silu_gate_backward", WIDE_ROWS, 20.0, prepare::silu_gate_backward),
    bytes("rotary", ATTENTION, 8.0, prepare::rotary),
    bytes("embedding_scatter_add", ROWS, 12.0, prepare::embedding_scatter_add),
    bytes("adamw", PARAMETERS, 28.0, prepare::adamw),
    bytes("sum_of_squares", PARAMETERS, 4.0, prepare::sum_of_squares),
    bytes("f32_to_bf16", PARAMETERS, 6.0, prepare::f32_to_bf16),
];

const PRODUCT: &[usize] = &[256, 768, 768];
const VECTOR_PRODUCT: &[usize] = &[1, 768, 3072];
const BATCH_PRODUCT: &[usize] = &[8, 768, 3072];
const ATTENTION: &[usize] = &[256, 12, 64];
const SQUARE: f64 = (ATTENTION[0] * ATTENTION[0] * ATTENTION[1] * ATTENTION[2]) as f64;
const HEAD: &[usize] = &[16, 768, 4096];
const ROWS: &[usize] = &[256, 768];
const WIDE_ROWS: &[usize] = &[256, 3072];
const PARAMETERS: &[usize] = &[1 << 22];

/// Elements of a shape.
const fn of(shape: &[usize]) -> f64 {
    let (mut product, mut index) = (1, 0);
    while index < shape.len() {
        product *= shape[index];
        index += 1;
    }
    product as f64
}

const fn product(dtype: &'static str) -> Benchmark {
    Benchmark {
        dtype,
        ..flops("matmul", PRODUCT, 2.0 * of(PRODUCT), prepare::matmul)
    }
}

/// One or a few rows of inputs: at best as fast as the weights, of so many bits, are read.
const fn linear(dtype: &'static str, shape: &'static [usize], bits: f64) -> Benchmark {
    Benchmark {
        dtype,
        amount: bits / 8.0 * (shape[1] * shape[2]) as f64,
        ..bytes("linear", shape, 0.0, prepare::linear)
    }
}

const fn flops(
    kernel: &'static str,
    shape: &'static [usize],
    amount: f64,
    prepare: fn(&Benchmark, super::Variant) -> Box<dyn FnMut()>,
) -> Benchmark {
    Benchmark {
        kernel,
        shape,
        dtype: "f32",
        unit: Unit::Gflops,
        amount,
        prepare,
    }
}

/// `each` is the bytes read and written for each element of the shape.
const fn bytes(
    kernel: &'static str,
    shape: &'static [usize],
    each: f64,
    prepare: fn(&Benchmark, super::Variant) -> Box<dyn FnMut()>,
) -> Benchmark {
    Benchmark {
        kernel,
        shape,
        dtype: "f32",
        unit: Unit::GigabytesPerSecond,
        amount: each * of(shape),
        prepare,
    }
}
