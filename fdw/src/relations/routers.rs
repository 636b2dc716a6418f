//! `routers`: what the router of each layer does with each expert. UPDATE of `enabled`, `bias` and `weights` changes it.

use candle_compute_proto::v1::{ListRoutersRequest, RouterExpert, UpdateRouterRequest};

use crate::client::{read, write};
use crate::error::{Error, Result};
use crate::relation::{
    Assignments, Call, Column, Estimate, Inputs, Relation, Row, Rows, Work, Writer, Writes, key, missing, output,
};
use crate::values::{Kind, Value};

/// One row per model, layer and expert.
pub(crate) struct Routers;

const COLUMNS: &[Column] = &[
    key("model", Kind::Text),
    key("layer", Kind::Int),
    key("expert", Kind::Int),
    output("enabled", Kind::Boolean),
    output("bias", Kind::Real),
    output("weights", Kind::RealArray),
];

impl Relation for Routers {
    fn name(&self) -> &'static str {
        "routers"
    }

    fn columns(&self) -> &'static [Column] {
        COLUMNS
    }

    fn estimate(&self) -> Estimate {
        Estimate {
            rows: 100.0,
            cost: 100.0,
        }
    }

    fn select(&self, call: Call, rows: Rows) -> Work<()> {
        Box::pin(async move {
            let without_weights = !call.needs("weights");
            let request = ListRoutersRequest {
                transaction: call.transaction.clone(),
                models: call.inputs.wanted("model"),
                layer: given(&call.inputs, "layer")?,
                expert: given(&call.inputs, "expert")?,
                without_weights,
            };
            let mut stream = read!(call.client, experts.list_routers(request)).await?;
            while let Some(message) = call.client.next(&mut stream).await? {
                for router in message.routers {
                    if !rows.row(row(router, without_weights)).await {
                        return Ok(());
                    }
                }
            }
            Ok(())
        })
    }

    fn writes(&self) -> Writes {
        Writes {
            update: &["enabled", "bias", "weights"],
            ..Writes::default()
        }
    }

    fn identity(&self) -> &'static [&'static str] {
        &["model", "layer", "expert"]
    }

    fn update(&self, writer: Writer, row: Inputs, new: Assignments) -> Work<()> {
        Box::pin(async move {
            let (enabled, bias) = (new.values.boolean("enabled"), new.values.real("bias"));
            let weights = new.values.reals("weights");
            let given = [
                ("enabled", enabled.is_some()),
                ("bias", bias.is_some()),
                ("weights", weights.is_some()),
            ];
            if let Some((name, _)) = given.iter().find(|(name, given)| new.sets(name) && !given) {
                return Err(missing(name));
            }
            let request = UpdateRouterRequest {
                transaction: writer.transaction.clone(),
                model: row.required("model")?,
                layer: number(&row, "layer")?,
                expert: number(&row, "expert")?,
                enabled,
                bias,
                has_weights: weights.is_some(),
                weights: weights.map(|bytes| floats(&bytes)).unwrap_or_default(),
            };
            write!(writer.client, experts.update_router(request)).await?;
            Ok(())
        })
    }
}

fn number(row: &Inputs, name: &str) -> Result<u32> {
    given(row, name)?.ok_or_else(|| missing(name))
}

/// The number, where one is given.
fn given(inputs: &Inputs, name: &str) -> Result<Option<u32>> {
    let checked = |number: i64| {
        u32::try_from(number).map_err(|_| Error::bad_value(format!("{name} must be at least 0, not {number}")))
    };
    inputs.integer(name).map(checked).transpose()
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    let (values, _) = bytes.as_chunks::<4>();
    values.iter().copied().map(f32::from_le_bytes).collect()
}

fn row(router: RouterExpert, without_weights: bool) -> Row {
    let weights = router.weights.iter().flat_map(|weight| weight.to_le_bytes());
    vec![
        router.model.into(),
        router.layer.into(),
        router.expert.into(),
        router.enabled.into(),
        router.bias.into(),
        match without_weights {
            true => Value::Null,
            false => Value::Reals(weights.collect::<Vec<u8>>().into()),
        },
    ]
}
