//! `devices`: what models can be placed on.

use candle_compute_proto::v1::{DescribeExecutorRequest, ListDevicesRequest};
use pgrx::PgSqlErrorCode;

use crate::client::read;
use crate::relation::{Call, Column, Relation, Rows, Work, output};
use crate::values::{Kind, Value};

/// One row per device.
pub(crate) struct Devices;

const COLUMNS: &[Column] = &[
    output("name", Kind::Text),
    output("kind", Kind::Text),
    output("description", Kind::Text),
    output("threads", Kind::Int),
    output("simd", Kind::Text),
    output("memory_bytes", Kind::BigInt),
    output("memory_used_bytes", Kind::BigInt),
    output("available", Kind::Boolean),
    output("reason", Kind::Text),
];

impl Relation for Devices {
    fn name(&self) -> &'static str {
        "devices"
    }

    fn columns(&self) -> &'static [Column] {
        COLUMNS
    }

    fn select(&self, call: Call, rows: Rows) -> Work<()> {
        Box::pin(async move {
            let devices = match read!(call.client, telemetry.list_devices(ListDevicesRequest {})).await {
                // A server of tensors alone.
                Err(error) if error.code == PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED => {
                    let request = DescribeExecutorRequest {};
                    read!(call.client, tensors.describe_executor(request)).await?.devices
                }
                listed => listed?.devices,
            };
            for device in devices {
                let row = vec![
                    device.name.into(),
                    device.kind.into(),
                    Value::text_or_null(device.description),
                    device.threads.into(),
                    Value::text_or_null(device.simd),
                    if device.memory_bytes == 0 {
                        Value::Null
                    } else {
                        Value::count(device.memory_bytes)
                    },
                    Value::count(device.memory_used_bytes),
                    device.available.into(),
                    Value::text_or_null(device.reason),
                ];
                if !rows.row(row).await {
                    break;
                }
            }
            Ok(())
        })
    }
}
