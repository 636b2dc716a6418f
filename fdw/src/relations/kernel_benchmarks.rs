//! `kernel_benchmarks`: SELECT measures the server's kernels.

use std::collections::HashMap;

use candle_compute_proto::v1::{KernelMeasurement, RunKernelBenchmarksRequest};

use crate::client::read;
use crate::error::{Error, Result};
use crate::functions::sql_kernel_baseline;
use crate::relation::{Call, Column, Estimate, Relation, Row, Rows, Work, key, output};
use crate::relations::tensors;
use crate::values::{Kind, Value};

/// One row per kernel, shape, type and variant, measured while the query runs.
pub(crate) struct KernelBenchmarks;

const COLUMNS: &[Column] = &[
    key("kernel", Kind::Text),
    output("shape", Kind::IntArray),
    output("dtype", Kind::Text),
    output("variant", Kind::Text),
    output("value", Kind::Double),
    output("unit", Kind::Text),
    output("ratio_to_portable", Kind::Double),
    output("ratio_to_sql", Kind::Double),
];

/// Kernels whose arithmetic `candle.sql_kernel_baseline` does in SQL.
const WITH_BASELINE: &[&str] = &[
    "matmul",
    "linear",
    "attention_forward",
    "gelu_tanh",
    "silu_gate",
    "rms_norm",
    "layer_norm",
    "adamw",
    "sum_of_squares",
];

impl Relation for KernelBenchmarks {
    fn name(&self) -> &'static str {
        "kernel_benchmarks"
    }

    fn columns(&self) -> &'static [Column] {
        COLUMNS
    }

    fn estimate(&self) -> Estimate {
        Estimate { rows: 80.0, cost: 1e6 }
    }

    fn select(&self, call: Call, rows: Rows) -> Work<()> {
        // Here and not in the work, which must not call PostgreSQL.
        let baselines = baselines(&call);
        Box::pin(async move {
            let baselines = baselines?;
            let request = RunKernelBenchmarksRequest {
                kernels: call.inputs.wanted("kernel"),
            };
            let mut figures = read!(call.client, telemetry.run_kernel_benchmarks(request)).await?;
            while let Some(message) = call.client.next(&mut figures).await? {
                let measurement = message.measurement.ok_or_else(|| Error::protocol("measurement"))?;
                if !rows.row(row(measurement, &baselines)).await {
                    break;
                }
            }
            Ok(())
        })
    }
}

/// The rates in SQL of the kernels that the query measures, where it asks for the ratio.
fn baselines(call: &Call) -> Result<HashMap<&'static str, f64>> {
    if !call.needs("ratio_to_sql") {
        return Ok(HashMap::new());
    }
    let kernel = call.inputs.text("kernel");
    let wanted = |name: &str| kernel.as_deref().is_none_or(|kernel| kernel == name);
    let mut baselines = HashMap::new();
    for name in WITH_BASELINE.iter().filter(|name| wanted(name)) {
        if let Some(rate) = sql_kernel_baseline(name)? {
            baselines.insert(*name, rate);
        }
    }
    Ok(baselines)
}

fn row(measurement: KernelMeasurement, baselines: &HashMap<&'static str, f64>) -> Row {
    // Bytes are comparable only where the elements are of the same type as in SQL.
    let comparable = measurement.unit == "GFLOP/s" || measurement.dtype == "f32";
    let baseline = baselines.get(measurement.kernel.as_str()).filter(|_| comparable);
    let ratio = baseline.map(|rate| measurement.value / rate);
    vec![
        measurement.kernel.into(),
        tensors::shape(&measurement.shape),
        measurement.dtype.into(),
        measurement.variant.into(),
        measurement.value.into(),
        measurement.unit.into(),
        measurement.ratio_to_portable.into(),
        ratio.map_or(Value::Null, Value::Double),
    ]
}
