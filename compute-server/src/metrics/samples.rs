//! Measurements as rows: name, labels, value, as Prometheus's text format has lines.

use std::collections::HashMap;

use candle_compute_proto::v1;
use prometheus::proto::{Metric, MetricFamily, MetricType};

/// The samples of `families`. A histogram is one for each bucket, and its sum and count.
pub(crate) fn samples(families: &[MetricFamily]) -> Vec<v1::MetricSample> {
    let mut samples = Vec::new();
    for family in families {
        for metric in family.get_metric() {
            add(&mut samples, family, metric);
        }
    }
    samples
}

fn add(samples: &mut Vec<v1::MetricSample>, family: &MetricFamily, metric: &Metric) {
    let labels: HashMap<String, String> = metric
        .get_label()
        .iter()
        .map(|pair| (pair.name().to_owned(), pair.value().to_owned()))
        .collect();
    let mut push = |suffix: &str, bound: Option<f64>, value: f64| {
        let mut labels = labels.clone();
        labels.extend(bound.map(|bound| ("le".to_owned(), written(bound))));
        samples.push(v1::MetricSample {
            name: format!("{}{suffix}", family.name()),
            labels,
            value,
        });
    };
    match family.get_field_type() {
        MetricType::COUNTER => push("", None, metric.get_counter().get_value()),
        MetricType::HISTOGRAM => {
            let histogram = metric.get_histogram();
            for bucket in histogram.get_bucket() {
                push("_bucket", Some(bucket.upper_bound()), bucket.cumulative_count() as f64);
            }
            push("_bucket", Some(f64::INFINITY), histogram.get_sample_count() as f64);
            push("_sum", None, histogram.get_sample_sum());
            push("_count", None, histogram.get_sample_count() as f64);
        }
        _ => push("", None, metric.get_gauge().get_value()),
    }
}

fn written(bound: f64) -> String {
    match bound.is_infinite() {
        true => "+Inf".to_owned(),
        false => bound.to_string(),
    }
}
