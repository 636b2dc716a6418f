//! Everything that is measured, at one moment.

use std::collections::BTreeMap;

use candle_models::CacheUsage;
use prometheus::IntCounter;
use prometheus::core::Collector;
use prometheus::proto::{LabelPair, MetricFamily};

use super::model::gauge;
use crate::app::App;
use crate::error::{Error, Result};
use crate::names::ModelKey;
use crate::requests::Phase;

/// The measurements, by name.
///
/// # Errors
/// `Internal`, for a defect of the names of instruments.
pub(crate) fn gather(app: &App) -> Result<Vec<MetricFamily>> {
    let mut families = Families::default();
    app.metrics.visit(app, |instrument| families.add(instrument, &[]))?;
    for model in app.registry.list() {
        let labels = labels(&model.key());
        model
            .facts()
            .metrics
            .visit(|instrument| families.add(instrument, &labels))?;
        pages(&model.facts().pages.usage(), &labels, &mut families)?;
    }
    requests(app, &mut families)?;
    Ok(families.0.into_values().collect())
}

/// The pages of a model's caches.
fn pages(usage: &CacheUsage, labels: &[LabelPair], families: &mut Families) -> Result<()> {
    let gauges = [
        (
            "candle_kv_cache_bytes",
            "Bytes of keys and values that the model holds",
            usage.pages * usage.page_bytes,
        ),
        (
            "candle_kv_cache_pages",
            "Pages of keys and values that the model holds",
            usage.pages,
        ),
        (
            "candle_kv_cache_unused_pages",
            "Of these, pages that no generation uses, kept for prompts that begin alike",
            usage.unused_pages,
        ),
    ];
    for (name, help, value) in gauges {
        families.add(&gauge(name, help, value as f64)?, labels);
    }
    let help = "Pages of keys and values that were given up to make room";
    let evicted = IntCounter::new("candle_kv_cache_evicted_pages_total", help)
        .map_err(|error| Error::Internal(error.to_string()))?;
    evicted.inc_by(usage.evicted_pages);
    families.add(&evicted, labels);
    Ok(())
}

/// Running and waiting work, by model and kind.
fn requests(app: &App, families: &mut Families) -> Result<()> {
    let mut counts: BTreeMap<(String, &'static str), [u64; 2]> = BTreeMap::new();
    for model in app.registry.list() {
        counts.insert((model.name().to_owned(), "generate"), [0; 2]);
    }
    for request in app.requests.list() {
        let count = counts.entry((request.model.clone(), request.kind)).or_default();
        count[usize::from(request.phase() == Phase::Queued)] += 1;
    }
    for ((model, kind), [running, waiting]) in counts {
        let labels = [pair("kind", kind), pair("model_name", &model)];
        let running = gauge("candle_requests_running", "Requests that are worked on", running as f64)?;
        families.add(&running, &labels);
        let waiting = gauge(
            "candle_requests_waiting",
            "Requests that wait for their turn",
            waiting as f64,
        )?;
        families.add(&waiting, &labels);
    }
    Ok(())
}

/// Families of the same name from several models, as one.
#[derive(Default)]
struct Families(BTreeMap<String, MetricFamily>);

impl Families {
    /// Adds an instrument, whose samples get `labels` as well.
    fn add(&mut self, instrument: &dyn Collector, labels: &[LabelPair]) {
        // A counter that counts by labels has no sample before the first; an empty family could not be written.
        let families = instrument
            .collect()
            .into_iter()
            .filter(|family| !family.get_metric().is_empty());
        for mut family in families {
            for metric in family.mut_metric() {
                let mut all = metric.take_label();
                all.extend_from_slice(labels);
                metric.set_label(all);
            }
            match self.0.get_mut(family.name()) {
                Some(present) => present.mut_metric().append(family.mut_metric()),
                None => {
                    self.0.insert(family.name().to_owned(), family);
                }
            }
        }
    }
}

fn labels(key: &ModelKey) -> Vec<LabelPair> {
    let mut labels = vec![pair("model_name", &key.model)];
    labels.extend(key.adapter.as_ref().map(|adapter| pair("adapter", adapter)));
    labels
}

fn pair(name: &str, value: &str) -> LabelPair {
    let mut pair = LabelPair::default();
    pair.set_name(name.to_owned());
    pair.set_value(value.to_owned());
    pair
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::{ModelMetrics, samples};
    use candle_compute_proto::v1;

    #[test]
    fn two_models_share_a_family_and_keep_their_labels() {
        let mut families = Families::default();
        for (name, tokens) in [("a", 3), ("b", 4)] {
            let metrics = ModelMetrics::new().unwrap();
            metrics.decoded(2);
            metrics.generated();
            metrics.generated();
            metrics.finished(&v1::GenerationSummary {
                finish_reason: "length".into(),
                completion_tokens: tokens,
                duration_ms: 100.0,
                time_to_first_token_ms: 40.0,
                ..Default::default()
            });
            let labels = labels(&ModelKey::new(name, ""));
            metrics.visit(|instrument| families.add(instrument, &labels)).unwrap();
        }
        let families: Vec<MetricFamily> = families.0.into_values().collect();
        let text = prometheus::TextEncoder::new().encode_to_string(&families).unwrap();
        assert_eq!(text.matches("# TYPE candle_batch_size histogram").count(), 1);
        assert!(
            text.contains("candle_generation_tokens_total{model_name=\"b\"} 2"),
            "{text}"
        );
        assert!(
            text.contains("candle_requests_finished_total{finish_reason=\"length\",model_name=\"a\"} 1"),
            "{text}"
        );
        // Every line of the text is a sample of the relation.
        let lines = text.lines().filter(|line| !line.starts_with('#')).count();
        let samples = samples(&families);
        assert_eq!(samples.len(), lines);
        let sum = samples
            .iter()
            .find(|sample| sample.name == "candle_time_per_output_token_seconds_sum");
        assert!((sum.unwrap().value - 0.03).abs() < 1e-9);
    }
}
