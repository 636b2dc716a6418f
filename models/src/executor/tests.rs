//! The operations against PyTorch (`tests/golden/executor.py`), and what they refuse.

use std::cell::Cell;
use std::path::Path;

use candle_core::{DType, Device, Tensor};

use super::*;
use crate::error::Error;

fn element(dtype: DType) -> ElementType {
    let found = ElementType::ALL.into_iter().find(|element| element.dtype() == dtype);
    found.unwrap_or_else(|| panic!("{dtype:?}"))
}

fn type_of(tensor: &Tensor) -> TensorType {
    TensorType::new(element(tensor.dtype()), tensor.dims()).unwrap()
}

const WATCH: Monitor<'static> = Monitor {
    cancelled: &|| false,
    progress: &|_, _| (),
};

fn planned(operation: &str, inputs: &[TensorType], attributes: &str) -> crate::Result<Plan> {
    let names = ["a", "b", "c", "d"];
    let inputs: Vec<(&str, TensorType)> = names.iter().copied().zip(inputs.iter().cloned()).collect();
    plan(operation, &inputs, &Attributes::parse(attributes).unwrap())
}

fn compute(operation: &str, inputs: &[Tensor], attributes: &str) -> crate::Result<Tensor> {
    let types: Vec<TensorType> = inputs.iter().map(type_of).collect();
    planned(operation, &types, attributes)?.run(inputs, &Device::Cpu, &WATCH)
}

#[test]
fn every_operation_computes_what_pytorch_does() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden");
    let golden = candle_core::safetensors::load(folder.join("executor.golden.safetensors"), &Device::Cpu).unwrap();
    let cases = std::fs::read(folder.join("executor.golden.json")).unwrap();
    let cases: Vec<serde_json::Value> = serde_json::from_slice(&cases).unwrap();
    let mut tested: Vec<&str> = Vec::new();
    for case in &cases {
        let (name, operation) = (case["name"].as_str().unwrap(), case["operation"].as_str().unwrap());
        let count = case["inputs"].as_u64().unwrap();
        let inputs: Vec<Tensor> = (0..count)
            .map(|index| golden[&format!("{name}.{index}")].clone())
            .collect();
        let expected = &golden[&format!("{name}.out")];
        let found =
            compute(operation, &inputs, &case["attributes"].to_string()).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(
            (found.dims(), found.dtype()),
            (expected.dims(), expected.dtype()),
            "{name}"
        );
        let values = |x: &Tensor| {
            x.to_dtype(DType::F64)
                .unwrap()
                .flatten_all()
                .unwrap()
                .to_vec1::<f64>()
                .unwrap()
        };
        // One unit in the last place of a half type where a sum in another order is rounded to its neighbour.
        let tolerance = match expected.dtype() {
            DType::BF16 => 8e-3,
            DType::F16 => 1e-3,
            DType::I32 => 0.0,
            _ => 2e-6,
        };
        for (index, (found, expected)) in values(&found).iter().zip(values(expected)).enumerate() {
            let close = (found - expected).abs() <= tolerance * expected.abs().max(1.0);
            let same = *found == expected || found.is_nan() && expected.is_nan();
            assert!(close || same, "{name}[{index}]: {found}, not {expected}");
        }
        tested.push(operation);
    }
    for known in OPERATIONS {
        assert!(tested.contains(&known.name()), "{} has no case", known.name());
    }
}

#[test]
fn what_does_not_fit_is_refused_by_names_and_shapes() {
    let of = |element, shape: &[usize]| TensorType::new(element, shape).unwrap();
    let f32 = |shape: &[usize]| of(ElementType::F32, shape);
    let ids = of(ElementType::I32, &[2]);
    let cases: &[(&str, &[TensorType], &str, &str)] = &[
        (
            "matmul",
            &[f32(&[2, 3]), f32(&[4, 5])],
            "",
            "\"a\" f32 [2, 3], \"b\" f32 [4, 5]",
        ),
        ("matmul", &[f32(&[2, 3]), f32(&[4, 5])], "", "3 is not 4"),
        ("matmul", &[f32(&[3]), f32(&[3, 5])], "", "at least 2 dimensions"),
        ("matmul", &[f32(&[2, 3, 3]), f32(&[4, 3, 3])], "", "broadcast"),
        (
            "matmul",
            &[f32(&[3, 3]), of(ElementType::F16, &[3, 3])],
            "",
            "f32 and f16",
        ),
        ("matmul", &[ids.clone(), ids.clone()], "", "cast"),
        ("matmul", &[f32(&[3, 3])], "", "needs 2 inputs, not 1"),
        ("add", &[f32(&[2]), f32(&[3])], "", "[2] and [3]"),
        ("div", &[ids.clone(), ids.clone()], "", "i32"),
        ("softmax", &[f32(&[])], "", "scalar"),
        ("softmax", &[f32(&[2])], r#"{"axis": 1}"#, "axis is 1"),
        ("softmax", &[f32(&[2])], r#"{"dim": 1}"#, "no attribute \"dim\""),
        ("layer_norm", &[f32(&[2, 3]), f32(&[2])], "", "weight is f32 [2]"),
        ("layer_norm", &[f32(&[2, 3])], r#"{"epsilon": -1}"#, "epsilon is -1"),
        ("layer_norm", &[f32(&[3]), of(ElementType::F16, &[3])], "", "f32 or f32"),
        ("gelu", &[f32(&[3])], r#"{"approximate": "fast"}"#, "none or tanh"),
        ("transpose", &[f32(&[3])], "", "fewer than 2"),
        ("transpose", &[f32(&[3, 2])], r#"{"axes": [0, 0]}"#, "each of the 2"),
        ("reshape", &[f32(&[3, 2])], r#"{"shape": [4, -1]}"#, "[4, -1]"),
        ("reshape", &[f32(&[0])], r#"{"shape": [0, -1]}"#, "[0, -1]"),
        ("reshape", &[f32(&[1])], r#"{"shape": [-2]}"#, "[-2]"),
        ("reshape", &[f32(&[1])], "", "shape is required"),
        ("slice", &[f32(&[3])], r#"{"axis": 0, "end": 4}"#, "end is 4"),
        (
            "slice",
            &[f32(&[3])],
            r#"{"axis": 0, "start": 2, "end": 1}"#,
            "before start",
        ),
        ("concatenate", &[f32(&[3, 1]), f32(&[2, 1])], r#"{"axis": 1}"#, "differ"),
        ("concatenate", &[], "", "at least 1"),
        ("embedding", &[f32(&[2]), f32(&[3])], "", "must be i32"),
        ("embedding", &[ids, f32(&[])], "", "no rows"),
        ("cast", &[f32(&[2])], r#"{"dtype": "f8"}"#, "\"f8\""),
    ];
    for (operation, inputs, attributes, expected) in cases {
        let error = planned(operation, inputs, attributes).unwrap_err();
        assert!(matches!(error, Error::InvalidArgument(_)), "{operation}: {error:?}");
        assert!(error.to_string().contains(expected), "{operation}: {error}");
    }
    let error = planned("convolve", &[], "").unwrap_err();
    assert!(
        matches!(error, Error::NotFound(_)) && error.to_string().contains("matmul"),
        "{error}"
    );
}

#[test]
fn elements_that_do_not_fit_fail_the_run() {
    let ids = Tensor::new(&[0i32, 3], &Device::Cpu).unwrap();
    let table = Tensor::zeros((3, 2), DType::F32, &Device::Cpu).unwrap();
    let error = compute("embedding", &[ids, table.clone()], "").unwrap_err().to_string();
    assert!(error.contains("element 1 of the ids is 3"), "{error}");
    let negative = Tensor::new(&[-1i32], &Device::Cpu).unwrap();
    assert!(compute("embedding", &[negative, table], "").is_err());
    for value in [f32::NAN, f32::INFINITY, 2_147_483_648.0, -2_147_483_904.0] {
        let x = Tensor::new(&[0.0, value], &Device::Cpu).unwrap();
        let error = compute("cast", &[x], r#"{"dtype": "i32"}"#).unwrap_err().to_string();
        assert!(error.contains("element 1"), "{error}");
    }
}

#[test]
fn products_of_halves_lose_no_small_element() {
    let cases: [(DType, &[f32], &[f32], f32); 4] = [
        (DType::BF16, &[1e30, 1.0], &[0.0, 1.0], 1.0),
        (DType::F16, &[60_000.0, 0.001], &[0.0, 1.0], 0.001),
        (DType::BF16, &[1e30, 1.0, 1.0, 1.0], &[0.0, 1.0, 1.0, 1.0], 3.0),
        (DType::F16, &[f32::INFINITY, 1.0], &[1.0, 1.0], f32::INFINITY),
    ];
    for (dtype, row, column, expected) in cases {
        let matrix = |values: &[f32], shape: (usize, usize)| {
            let values = Tensor::from_vec(values.to_vec(), shape, &Device::Cpu).unwrap();
            values.to_dtype(dtype).unwrap()
        };
        let inputs = [matrix(row, (1, row.len())), matrix(column, (column.len(), 1))];
        let found = compute("matmul", &inputs, "").unwrap();
        let found = found
            .to_dtype(DType::F32)
            .unwrap()
            .flatten_all()
            .unwrap()
            .to_vec1::<f32>()
            .unwrap();
        let close = found[0] == expected || (found[0] - expected).abs() < 1e-6;
        assert!(close, "{dtype:?}: {found:?}, not {expected}");
    }
}

#[test]
fn a_product_without_elements_is_planned_at_once() {
    // A list of its products would take more memory than there is.
    let many = TensorType::new(ElementType::F32, &[2_147_483_647, 100_000_000, 0, 0]).unwrap();
    let plan = planned("matmul", &[many.clone(), many.clone()], "").unwrap();
    assert_eq!(plan.output(), &many);
}

#[test]
fn an_operation_stops_between_two_blocks() {
    // Four blocks of rows.
    let x = Tensor::zeros((4, 1 << 21), DType::F16, &Device::Cpu).unwrap();
    for (operation, inputs) in [
        ("softmax", vec![x.clone()]),
        ("silu", vec![x.clone()]),
        ("sum", vec![x]),
    ] {
        let types: Vec<TensorType> = inputs.iter().map(type_of).collect();
        let plan = planned(operation, &types, "").unwrap();
        let told = Cell::new(0);
        let monitor = Monitor {
            cancelled: &|| told.get() >= 2,
            progress: &|_, _| told.set(told.get() + 1),
        };
        let stopped = plan.run(&inputs, &Device::Cpu, &monitor);
        assert!(matches!(stopped, Err(Error::Cancelled)), "{operation}");
        assert_eq!(told.get(), 2, "{operation}");
    }
}

#[test]
fn a_large_product_is_that_of_its_parts() {
    // Enough for several blocks of rows.
    let noise = |rows: usize, columns: usize| {
        let values = (0..rows * columns).map(|i| ((i * 7919) % 1013) as f32 / 1013.0 - 0.5);
        Tensor::from_vec(values.collect::<Vec<f32>>(), (rows, columns), &Device::Cpu).unwrap()
    };
    let (a, b) = (noise(130, 12_000), noise(12_000, 6_000));
    let expected = compute("matmul", &[a.narrow(0, 128, 2).unwrap().copy().unwrap(), b.clone()], "").unwrap();
    for (a, attributes) in [
        (a.clone(), ""),
        (a.t().unwrap().contiguous().unwrap(), r#"{"transpose_a": true}"#),
    ] {
        let steps = Cell::new(0);
        let monitor = Monitor {
            cancelled: &|| false,
            progress: &|_, _| steps.set(steps.get() + 1),
        };
        let plan = planned("matmul", &[type_of(&a), type_of(&b)], attributes).unwrap();
        let found = plan.run(&[a, b.clone()], &Device::Cpu, &monitor).unwrap();
        assert!(steps.get() > 3, "{}", steps.get());
        let last = found.narrow(0, 128, 2).unwrap();
        let difference = (last - &expected).unwrap().abs().unwrap().flatten_all().unwrap();
        assert!(difference.max(0).unwrap().to_scalar::<f32>().unwrap() < 1e-3);
    }
}
